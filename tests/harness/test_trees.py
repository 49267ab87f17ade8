import pytest

from guarded import GUARDS, SLOW, commit, git
from harness import processes, trees
from harness.processes import Asked

ALONE = """
import torch
from harness.guards import Guard

GUARDS = [Guard("scan", lambda x: x.cumsum(0), lambda: (torch.arange(8.0),))]
"""
ELSEWHERE = GUARDS.replace(
    "import torch",
    """
import sys
from pathlib import Path
import torch

sys.path.insert(0, str(Path("../mine/python").resolve()))
""",
)


def seconds(side):
    """What the sides' only process says of the cell "scan", in ms."""
    return processes.several(side, ["scan"], 1, Asked()).ms("scan")[0]


def test_each_side_measures_its_own_tree(repository):
    (repository / "src" / "mine.py").write_text(SLOW)
    with trees.working(repository / "guards.py") as now, trees.beside(now, "HEAD") as (old, new):
        assert 2 < seconds(old) < 3 < seconds(new)
        assert (old.folder / "guards.py").is_file()
        place = old.folder
    assert not place.exists()


def test_modules_beside_the_file_of_guards_are_of_their_tree(repository):
    (repository / "bench").mkdir()
    (repository / "guards.py").rename(repository / "bench" / "guards.py")
    (repository / "src" / "mine.py").rename(repository / "bench" / "mine.py")
    commit(repository)
    (repository / "bench" / "mine.py").write_text(SLOW)
    path = repository / "bench" / "guards.py"
    with trees.working(path) as now, trees.beside(now, "HEAD") as (old, new):
        assert 2 < seconds(old) < 3 < seconds(new)


def test_where_the_commit_has_no_file_of_guards_that_of_now_names_what_is_guarded(repository):
    (repository / "other.py").write_text(GUARDS)
    with trees.working(repository / "other.py") as now, trees.beside(now, "HEAD") as (old, _):
        assert old.path == repository / "other.py"
        assert seconds(old) > 2


def test_code_of_the_other_tree_is_not_measured(repository):
    (repository / "python").mkdir()
    (repository / "src" / "mine.py").rename(repository / "python" / "mine.py")
    commit(repository)
    # The package lies where no side looks for it.
    (repository / "other.py").write_text(ELSEWHERE.replace("../mine", str(repository)))
    with trees.working(repository / "other.py") as now, trees.beside(now, "HEAD") as (old, _):
        said = "^scan, HEAD: .*mine.py was imported where that of the other side"
        with pytest.raises(ValueError, match=said):
            seconds(old)


def test_where_nothing_differs_nothing_is_compared(repository):
    (repository / "alone.py").write_text(ALONE)
    with trees.working(repository / "alone.py") as now, trees.beside(now, "HEAD") as (old, new):
        assert seconds(new) > 0  # its file of guards is of this tree
        with pytest.raises(ValueError, match=r"^scan, HEAD: nothing of the repository was"):
            seconds(old)


@pytest.mark.parametrize("variable", ["GIT_INDEX_FILE", "GIT_DIR", "GIT_WORK_TREE"])
def test_in_a_hook_of_git_nothing_of_the_repository_changes(repository, monkeypatch, variable):
    """There git names its index, which is about to become a commit, or another repository."""
    index = repository / ".git" / "index"
    (repository / "src" / "mine.py").write_text(SLOW)
    (repository / "more.py").write_text("")
    git(repository, "add", "-A")
    before = index.read_bytes()
    places = {"GIT_INDEX_FILE": index, "GIT_DIR": repository / "src", "GIT_WORK_TREE": "src"}
    monkeypatch.setenv(variable, str(places[variable]))
    with trees.working(repository / "guards.py") as now, trees.beside(now, "HEAD") as (old, _):
        assert now.tree == repository
        assert "0.002" in (old.tree / "src" / "mine.py").read_text()
        assert not (old.tree / "more.py").exists()
    assert index.read_bytes() == before


def test_hooks_are_not_run_and_no_worktree_is_made(repository):
    hook = repository / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    with trees.working(repository / "guards.py") as now, trees.beside(now, "HEAD") as (old, _):
        assert (old.tree / "guards.py").is_file()
        assert not (repository / ".git" / "worktrees").exists()


def test_files_that_archives_leave_out_are_in_the_tree(repository):
    (repository / ".gitattributes").write_text("guards.py export-ignore\n")
    commit(repository)
    with trees.working(repository / "guards.py") as now, trees.beside(now, "HEAD") as (old, _):
        assert old.path == old.tree / "guards.py"


def test_a_shallow_clone_is_said_to_be_one(repository, tmp_path):
    (repository / "more.py").write_text("")
    commit(repository)
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", "shallow")
    with pytest.raises(ValueError, match=r"'HEAD~1' in .*, a shallow clone: git fetch"):
        trees.commit_of(tmp_path / "shallow", "HEAD~1")


@pytest.mark.parametrize("reference", ["nowhere", "--help"])
def test_a_commit_that_is_not_there_is_said(repository, reference):
    with (
        trees.working(repository / "guards.py") as now,
        pytest.raises(ValueError, match=f"git knows no commit '{reference}'"),
        trees.beside(now, reference),
    ):
        pass


def test_outside_of_a_repository_there_is_nothing_beside(tmp_path):
    (tmp_path / "guards.py").write_text(GUARDS)
    with trees.working(tmp_path / "guards.py") as now:
        assert now.tree is None
        with (
            pytest.raises(ValueError, match=r"lies in no git repository \(git rev-parse: fatal"),
            trees.beside(now, "HEAD"),
        ):
            pass


def test_python_files_that_git_does_not_know_are_uncommitted(repository):
    assert trees.uncommitted(repository) == []
    (repository / "notes.txt").write_text("nothing that is run")
    assert trees.uncommitted(repository) == []
    (repository / "more.py").write_text("")
    (repository / "src" / "mine.py").write_text(SLOW)
    assert trees.uncommitted(repository) == ["src/mine.py", "more.py"]


def test_without_git_there_is_no_repository(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="git cannot be run: No such file"):
        trees.repository(repository)
