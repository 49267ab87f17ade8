"""Trees of code that a check measures: the one that is there, and that of a commit beside it.

What is guarded lies in modules at the top of a repository, in its `src`, or beside the file of
guards. A side imports from there before anywhere else. This harness measures both sides, whatever
they have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import harness
from harness.environment import git
from harness.processes import Side


@contextmanager
def working(path: Path | None) -> Iterator[Side]:
    """The tree around a file of guards, or around the working directory, as it is now.

    Args:
        path: of the file; None: what is guarded without one.
    """
    place = Path.cwd() if path is None else path.resolve().parent
    with tempfile.TemporaryDirectory(prefix="seqscale-") as folder:
        own = Path(folder).resolve()
        (own / "harness").symlink_to(Path(harness.__file__).resolve().parent)
        side = Side(name="now", path=path and path.resolve(), first=(own,), folder=place)
        try:
            root = repository(place)
        except ValueError:
            yield side if path is None else replace(side, first=(own, place))
            return
        yield replace(side, first=(own, *_importable(place, root)), tree=root)


@contextmanager
def beside(now: Side, reference: str) -> Iterator[tuple[Side, Side]]:
    """The tree of a commit in a folder of its own, gone afterwards, and `now` kept from it.

    Its own file of guards names what is guarded there; where it has none, that of `now` does. The
    folder is no worktree that git knows of: neither its index, nor its hooks, nor its list of
    worktrees is touched, so nothing of it can be left behind. Submodules are not in it.

    Raises:
        ValueError: no repository, or no such commit.
    """
    root = now.tree or repository(now.folder)
    commit = commit_of(root, reference)
    with tempfile.TemporaryDirectory(prefix="seqscale-") as folder:
        tree, index = Path(folder).resolve() / "tree", Path(folder).resolve() / "index"
        tree.mkdir()
        git(root, "read-tree", commit, index=index)
        git(root, "checkout-index", "--all", f"--prefix={tree}/", index=index)
        place = tree / now.folder.relative_to(root)
        path = now.path and tree / now.path.relative_to(root)
        old = Side(
            name=reference,
            path=path if path and path.is_file() else now.path,
            first=(now.first[0], *_importable(place, tree)),
            folder=place if place.is_dir() else tree,
            tree=tree,
            other=root,
        )
        yield old, replace(now, other=tree)


def repository(place: Path) -> Path:
    """The top of the git repository that a folder lies in.

    Raises:
        ValueError: it lies in none, or there is no git.
    """
    try:
        return Path(git(place, "rev-parse", "--show-toplevel")).resolve()
    except ValueError as error:
        raise ValueError(f"{place} lies in no git repository ({error})") from None


def commit_of(root: Path, reference: str) -> str:
    """The hash of a commit, branch or tag.

    Raises:
        ValueError: git knows none of that name.
    """
    try:
        return git(root, "rev-parse", "--verify", "--end-of-options", f"{reference}^{{commit}}")
    except ValueError:
        shallow = git(root, "rev-parse", "--is-shallow-repository") == "true"
        hint = ", a shallow clone: git fetch --unshallow gets the others" if shallow else ""
        raise ValueError(f"git knows no commit {reference!r} in {root}{hint}") from None


def uncommitted(root: Path) -> list[str]:
    """Files that differ from the commit, and Python files that git does not know."""
    changed = git(root, "diff", "--name-only", "HEAD").splitlines()
    return changed + git(root, "ls-files", "--others", "--exclude-standard", "*.py").splitlines()


def is_tracked(path: Path) -> bool:
    """Whether a file is of what git keeps."""
    return bool(git(path.parent, "ls-files", "--", path.name))


def _importable(place: Path, tree: Path) -> tuple[Path, ...]:
    """The folders that a tree's packages, and modules in a folder of it, are imported from."""
    found = dict.fromkeys((place, tree, tree / "src"))
    return tuple(folder for folder in found if folder.is_dir())
