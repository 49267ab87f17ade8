import sysconfig
from pathlib import Path

import pytest

import harness
from harness import origin

INSTALLED = Path(sysconfig.get_path("purelib")).resolve()
HERE = Path(harness.__file__).resolve()


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "python" / "mine").mkdir(parents=True)
    (tmp_path / "python" / "mine" / "__init__.py").touch()
    return tmp_path


def imported(monkeypatch, *files):
    monkeypatch.setattr(origin, "_imported", lambda: iter(files))


def test_a_package_of_the_tree_that_is_imported_as_it_is_installed_is_refused(tree, monkeypatch):
    imported(monkeypatch, ("mine", INSTALLED / "mine" / "__init__.py"))
    with pytest.raises(origin.WrongTreeError, match="and not from python/mine: install it with"):
        origin.check_origin(None, tree, None)
    imported(monkeypatch, ("torch", INSTALLED / "torch" / "__init__.py"))
    origin.check_origin(None, tree, None)


def test_the_harness_that_measures_may_be_of_the_other_side(tree, monkeypatch):
    mine = ("mine", tree / "python" / "mine" / "__init__.py")
    imported(monkeypatch, ("harness", HERE), mine)
    origin.check_origin(None, tree, HERE.parents[1])
    imported(monkeypatch, ("theirs", HERE.parents[1] / "theirs.py"), mine)
    with pytest.raises(origin.WrongTreeError, match="where that of the other side should"):
        origin.check_origin(None, tree, HERE.parents[1])


def test_something_of_the_tree_must_have_been_imported(tree, monkeypatch):
    imported(monkeypatch, ("json", Path(sysconfig.get_path("stdlib")).resolve() / "json.py"))
    with pytest.raises(origin.WrongTreeError, match="nothing of the repository was imported"):
        origin.check_origin(None, tree, tree.parent)
