"""A corpus on disk: little-endian tokens, training then validation, and a JSON sidecar.

The sidecar, PATH.json, says what the tokens are and pins them by their SHA-256. The token file is
replaced first and the sidecar last, so that a writer killed between the two leaves a pair that
does not match, which loading refuses.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from harness.corpus import UNITS, Corpus, Stream, pin
from harness.record import replacing, write_atomically

SCHEMA = 1
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
READ_BYTES = 1 << 22  # at once; a multiple of every token's size
KEYS = {
    "schema": int,
    "unit": str,
    "alphabet": str | None,
    "vocab_size": int,
    "dtype": str,
    "train_tokens": int,
    "validation_tokens": int,
    "sha256": str,
    "source": str,
    "documents": int,
    "bytes_per_token": int | float,
}


def sidecar(path: Path) -> Path:
    """Where the sidecar of a token file lies."""
    return path.with_name(path.name + ".json")


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned integer that holds every token."""
    return np.dtype(DTYPES[str(np.min_scalar_type(vocab_size - 1))])


def write(path: Path, corpus: Corpus) -> None:
    """Replace the token file and its sidecar; after a crash at any moment neither is half written.

    Raises:
        OSError: disk full or no permission; no temporary file is left.
    """
    digest = hashlib.sha256()
    with replacing(path) as file:
        for part in (corpus.train, corpus.validation):
            file.write(part.data)
            digest.update(part.data)
    about = {
        "schema": SCHEMA,
        "unit": corpus.unit,
        "alphabet": corpus.alphabet,
        "vocab_size": corpus.vocab_size,
        "dtype": corpus.train.dtype.name,
        "train_tokens": len(corpus.train),
        "validation_tokens": len(corpus.validation),
        "sha256": digest.hexdigest(),
        "source": corpus.name,
        "documents": corpus.documents,
        "bytes_per_token": corpus.bytes_per_token,
    }
    write_atomically(sidecar(path), json.dumps(about, indent=1) + "\n")


def read(path: Path) -> Corpus:
    """The corpus in a token file, memory-mapped, by the name memmap:PATH.

    The whole file is read once, to hash it and to see that every token is in the vocabulary: some
    seconds a few gigabytes. Memory is not filled by it.

    Raises:
        ValueError: the path is a directory, a file of the two is missing, or they do not match;
            one line that names the file and the fix.
        OSError: no permission.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the token file in it")
    if not path.exists():
        raise _damaged(path, "not there")
    size = path.stat().st_size
    about = _about(sidecar(path))
    dtype = np.dtype(DTYPES[about["dtype"]])
    tokens = about["train_tokens"] + about["validation_tokens"]
    if size != tokens * dtype.itemsize:
        raise _damaged(path, f"{size:,} bytes, its sidecar says {tokens * dtype.itemsize:,}")
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype).max()))
    if digest.hexdigest() != about["sha256"]:
        raise _damaged(path, "its SHA-256 is not the one in its sidecar")
    if largest >= about["vocab_size"]:
        raise _damaged(path, f"token {largest} in a vocabulary of {about['vocab_size']}")
    stream: Stream = np.memmap(path, dtype, mode="r")
    train, validation = stream[: about["train_tokens"]], stream[about["train_tokens"] :]
    return Corpus(
        name=f"memmap:{path}",
        unit=about["unit"],
        train=train,
        validation=validation,
        vocab_size=about["vocab_size"],
        sha256=pin(about["unit"], about["alphabet"], len(train), about["sha256"]),
        documents=about["documents"],
        bytes_per_token=about["bytes_per_token"],
        alphabet=about["alphabet"],
    )


def _about(path: Path) -> dict[str, Any]:
    """The checked contents of a sidecar."""
    if not path.exists():
        raise _damaged(path, "not there")
    try:
        about = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # of UnicodeDecodeError and JSONDecodeError too
        raise _damaged(path, "not JSON") from None
    if not isinstance(about, dict):
        raise _damaged(path, "not a table")
    if about.get("schema", SCHEMA) != SCHEMA:
        raise _damaged(path, f"schema {about['schema']!r}, this version reads {SCHEMA}")
    for key, kind in KEYS.items():
        if key not in about:
            raise _damaged(path, f"no {key}")
        if not isinstance(about[key], kind) or isinstance(about[key], bool):
            raise _damaged(path, f"{key} is {about[key]!r:.40}")
    alphabet = about["alphabet"]
    possible = {
        "unit": about["unit"] in UNITS,
        "alphabet": (alphabet is not None) == (about["unit"] == "character")
        and (alphabet is None or len(set(alphabet)) == len(alphabet)),
        "vocab_size": about["vocab_size"] == (256 if alphabet is None else len(alphabet)),
        "dtype": about["dtype"] in DTYPES,
        "train_tokens": about["train_tokens"] > 0,
        "validation_tokens": about["validation_tokens"] > 0,
        "documents": about["documents"] > 0,
        "bytes_per_token": 1 <= about["bytes_per_token"] <= (1 if alphabet is None else 4),
    }
    for key, is_possible in possible.items():
        if not is_possible:
            raise _damaged(path, f"{key} is {about[key]!r:.40}")
    return about


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what}: run seqscale prepare again")
