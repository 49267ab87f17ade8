"""Where the code that a process measured came from: `--ab` must not measure one tree twice."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import harness

DEPTH = 3  # of folders that are looked into for packages of a tree


class WrongTreeError(Exception):
    """What was measured is not the code of this side."""


def check_origin(path: Path | None, tree: Path, other: Path | None) -> None:
    """Refuse code that is not of the tree which this process should measure.

    Compiled extensions that are installed are not told apart: nothing in Python says whose they
    are.

    Args:
        path: the file of guards, or None.
        tree: where there is another, something must be of this one: the file, or what was imported.
        other: of it nothing, but for this harness and what is installed there; None: no such tree.

    Raises:
        WrongTreeError: that is not so, or a package of the tree was imported as it is installed.
    """
    installed, standard = _folders("purelib", "platlib"), _folders("stdlib", "platstdlib")
    measuring = Path(harness.__file__).resolve().parent
    packages = {package.name: package for package in _packages(tree)}
    found = other is None or (path is not None and path.is_relative_to(tree))
    for name, file in _imported():
        if file.is_relative_to(measuring):
            continue
        if _inside(file, installed) and name in packages:
            raise WrongTreeError(
                f"{name} was imported from {file.parent}, where it is installed, and not from "
                f"{packages[name].relative_to(tree)}: install it with pip install --editable, or "
                "let it lie at the top of the repository, or in its src"
            )
        if _inside(file, [*installed, *standard]):
            continue
        if other is not None and file.is_relative_to(other):
            raise WrongTreeError(
                f"{file} was imported where that of the other side should have been: let modules "
                "lie at the top of the repository, in its src, or beside the file of guards"
            )
        found |= file.is_relative_to(tree)
    if not found:
        raise WrongTreeError(
            "nothing of the repository was imported, so there is nothing to compare: put what is "
            "guarded into a module that the file of guards imports"
        )


def _imported() -> Iterator[tuple[str, Path]]:
    """The name of the package or module, and the file, of everything that was imported."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        # torch.ops, not a file, calls itself "_ops.py".
        if isinstance(file, str) and Path(file).is_absolute():
            yield name.partition(".")[0], Path(file).resolve()


def _packages(tree: Path) -> Iterator[Path]:
    """The packages of a tree that lie in no other, not far below its top."""
    folders = [tree]
    for _ in range(DEPTH):
        inner = [
            entry
            for folder in folders
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        ]
        folders = [entry for entry in inner if not (entry / "__init__.py").is_file()]
        yield from (entry for entry in inner if (entry / "__init__.py").is_file())


def _folders(*names: str) -> list[Path]:
    return [Path(sysconfig.get_path(name)).resolve() for name in names]


def _inside(file: Path, folders: list[Path]) -> bool:
    return any(file.is_relative_to(folder) for folder in folders)
