import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import archs
from harness import guards
from harness.guards import Guard

BASE = "from harness.guards import Guard\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that names a guard."""
    (tmp_path / "scans.py").write_text(f"{BASE}GUARDS = [Guard('scan of a package', print)]\n")
    info = tmp_path / "scans-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scans\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[seqscale.guards]\nall = scans:GUARDS\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    guards._cells.cache_clear()
    yield tmp_path
    guards._cells.cache_clear()
    sys.modules.pop("scans", None)


def test_every_operation_is_guarded_in_few_cells():
    names = guards.names("cpu")
    assert len(names) <= 24
    for op in ("attention", "ssd", "wkv7", "long_conv", "short_conv"):
        phases = {name.split()[1] for name in names if name.startswith(op)}
        assert phases == ({"forward"} if op == "short_conv" else {"forward", "backward"})
    assert any(name.startswith("short_conv forward and backward") for name in names)


def test_cells_of_packages_are_guarded_too(package):
    assert "scan of a package" in guards.names("cpu")


def test_only_what_lies_in_a_tree_is_asked_for(package):
    ours = Path(archs.__file__).resolve().parent.parent
    assert guards.names("cpu", tree=package) == ["scan of a package"]
    assert "scan of a package" not in guards.names("cpu", tree=ours)
    assert len(guards.names("cpu", tree=ours)) == len(guards.names("cpu")) - 1
    assert guards.names("cpu", tree=package / "none") == []


@pytest.mark.parametrize("name", [n for n in guards.names("cpu") if n.startswith("short_conv")])
def test_short_convolutions_return_what_they_should(name):
    cell = guards.prepare(name, "cpu")
    cell.function()
    assert cell.fault() is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("GUARD = []", "has no list GUARDS of harness.guards.Guard"),
        ("GUARDS = None", "guards.py: None is no list of harness.guards.Guard"),
        ("GUARDS = [3]", "3 is no harness.guards.Guard"),
        (f"{BASE}GUARDS = [Guard(3, print)]", "called by a text, not 3"),
        (f"{BASE}GUARDS = [Guard('a', 3)]", "call is not callable"),
        (f"{BASE}GUARDS = [Guard('a', print), Guard('a', print)]", "two cells are called 'a'"),
    ],
)
def test_a_file_of_guards_that_is_none_is_refused(tmp_path, text, said):
    (tmp_path / "guards.py").write_text(text)
    with pytest.raises(ValueError, match=said):
        guards.names("cpu", tmp_path / "guards.py")


def test_a_file_of_guards_is_run_once(tmp_path):
    text = "from pathlib import Path\nPath(__file__).with_name('ran').open('a').write('x')\n"
    path = tmp_path / "guards.py"
    path.write_text(f"{text}{BASE}GUARDS = [Guard('a', print), Guard('b', print)]")
    for name in guards.names("cpu", path):
        guards.prepare(name, "cpu", path)
    assert (tmp_path / "ran").read_text() == "x"


def test_the_reference_is_not_run_where_nothing_is_compared():
    def reference():
        raise AssertionError

    cell = guards._guarded(Guard("a", lambda: torch.ones(1), reference=reference))
    cell.function()
    with pytest.raises(AssertionError):
        cell.fault()


def fault(call, reference=None):
    return guards._guarded(Guard("a", call, lambda: (torch.ones(3),), reference)).fault()


def test_a_reference_that_is_false_is_one():
    """As a module without parts is."""
    assert not torch.nn.Sequential()
    assert fault(lambda x: x + 1, torch.nn.Sequential()) == "relative error 1.0e+00, allowed 1e-03"


@dataclass
class Out:
    y: torch.Tensor
    name: str = "y"


def test_a_dataclass_is_looked_into():
    assert fault(Out) is None
    assert fault(lambda x: Out(x + 1), Out) == "relative error 1.0e+00, allowed 1e-03"
    assert fault(lambda x: Out(x * float("nan"))) == "relative error nan, allowed 1e-03"


@pytest.mark.parametrize("result", [None, "done", [], object(), Out])
def test_a_result_that_cannot_be_compared_is_a_fault(result):
    why = "returns no tensor, array or number to compare"
    assert fault(lambda x: result) == f"the call {why}"
    assert fault(lambda x: x, lambda x: result) == f"the reference {why}"
