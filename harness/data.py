"""Real bytes to train on, without a network: the Python sources of the standard library and torch.

Whole files are documents; each goes to training or validation by the hash of its name.
"""

import functools
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VALIDATION_SHARE = 16  # one document in 16
SEPARATOR = b"\0"  # never occurs in source text


@dataclass(frozen=True)
class Corpus:
    """Byte streams for training and validation, and the hash that pins them."""

    name: str
    train: Tensor  # (bytes,) uint8
    validation: Tensor  # (bytes,) uint8
    sha256: str
    documents: int

    def batch(
        self, batch: int, seq_len: int, generator: torch.Generator, *, validation: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Random windows: inputs and next bytes, each (B, T) int64.

        Raises:
            ValueError: the stream is shorter than one window.
        """
        stream = self.validation if validation else self.train
        if len(stream) <= seq_len:
            raise ValueError(f"{self.name}: {len(stream)} bytes are too few for T = {seq_len}")
        starts = torch.randint(len(stream) - seq_len, (batch,), generator=generator)
        windows = stream[starts[:, None] + torch.arange(seq_len + 1)].long()  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]


@functools.cache
def python_source() -> Corpus:
    """The Python files of the standard library and of torch, tests left out."""
    library, torch_package = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent
    skipped = {"site-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
    named = {
        f"{root.name}/{path.relative_to(root).as_posix()}": path
        for root in (library, torch_package)
        for path in root.rglob("*.py")
        if not skipped & set(path.relative_to(root).parts)
    }
    streams: dict[bool, list[bytes]] = {False: [], True: []}
    digest = hashlib.sha256()
    for name in sorted(named):
        text = named[name].read_bytes()
        digest.update(name.encode() + SEPARATOR + text + SEPARATOR)
        held_out = hashlib.sha256(name.encode()).digest()[0] % VALIDATION_SHARE == 0
        streams[held_out].append(text + SEPARATOR)
    train, validation = (
        torch.from_numpy(np.frombuffer(b"".join(streams[part]), dtype=np.uint8).copy())
        for part in (False, True)
    )
    return Corpus("python-source", train, validation, digest.hexdigest(), len(named))
