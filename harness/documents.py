"""Where text comes from: documents by name, read one by one."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Documents:
    """Texts by name."""

    names: Sequence[str]  # in order; the same on every machine
    read: Callable[[str], bytes]


def python_source() -> Documents:
    """The Python files of the standard library and of torch, tests left out."""
    library, torch_package = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent
    skipped = {"site-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
    named = {
        f"{root.name}/{path.relative_to(root).as_posix()}": path
        for root in (library, torch_package)
        for path in root.rglob("*.py")
        if not skipped & set(path.relative_to(root).parts)
    }
    return Documents(sorted(named), lambda name: named[name].read_bytes())


def files(pattern: str) -> Documents:
    """The files that a glob matches, named from the folder that holds them all.

    Raises:
        ValueError: it matches none.
    """
    whole = str(Path(pattern).expanduser().absolute())
    found = [Path(path) for path in glob.glob(whole, recursive=True)]  # noqa: PTH207 (any root)
    files = [path for path in found if path.is_file()]
    if found and not files:
        raise ValueError(
            f"files:{pattern} matches a directory and no file: "
            f"give a glob of files, as files:{Path(pattern) / '*.txt'}"
        )
    if not files:
        raise ValueError(f"files:{pattern} matches no file: give another glob")
    root = os.path.commonpath([path.parent for path in files])
    named = {path.relative_to(root).as_posix(): path for path in files}
    return Documents(sorted(named), lambda name: named[name].read_bytes())


def hub(name_and_config: str) -> Documents:
    """The rows of a data set of Hugging Face, NAME or NAME:CONFIG, named by their numbers.

    Raises:
        ValueError: `datasets` is not installed, the set cannot be had, or has no column "text".
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("hf: needs the package datasets: pip install 'seqscale[hf]'") from None
    name, _, config = name_and_config.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # of several libraries: no network, no such name, a broken file
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"hf:{name_and_config}: {said}: check the name and the network") from None
    if "text" not in rows.column_names:
        raise ValueError(
            f"hf:{name_and_config}: no column text among {', '.join(rows.column_names)}: "
            "give a data set or a CONFIG that has one"
        )

    def read(row: str) -> bytes:
        text = rows[int(row)]["text"]
        if not isinstance(text, str | None):
            raise ValueError(
                f"hf:{name_and_config}: column text holds {type(text).__name__}: "
                "give a data set or a CONFIG whose column text is text"
            )
        return (text or "").encode()  # some sets have rows without any

    return Documents([str(row) for row in range(len(rows))], read)
