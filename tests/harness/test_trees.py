import pytest

from guarded import GUARDS, SLOW, commit
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
            pytest.raises(ValueError, match="lies in no git repository"),
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
