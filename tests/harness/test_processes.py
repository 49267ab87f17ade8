import pytest

from harness import processes, trees
from harness.processes import Asked, Side, Times
from harness.run import WorkerFailedError

OLD, NEW = Side(name="old"), Side(name="new")
BROKEN = """
import ctypes
import time
import numpy as np
import torch
from harness.guards import Guard

calls = 0


def drifts(x):
    global calls
    calls += 1
    return x + (calls > 5)


GUARDS = [
    Guard("raises", lambda: 1 / 0),
    Guard("dies", lambda: ctypes.string_at(0)),
    Guard("hangs", lambda: time.sleep(60)),
    Guard("wrong", lambda x: x + 1, lambda: (torch.ones(3),), lambda x: x),
    Guard("wrong array", lambda: np.ones(3), reference=lambda: np.zeros(3)),
    Guard("wrong number", lambda: 1.0, reference=lambda: 2.0),
    Guard("wrong phase", lambda x: x, lambda: (torch.ones(3) * 1j,), lambda x: -x),
    Guard("nothing to compare", lambda: "a", reference=lambda: "b"),
    Guard("not a number", lambda x: x / 0, lambda: (torch.zeros(3),)),
    Guard("other shape", lambda x: x[1:], lambda: (torch.ones(3),), lambda x: x),
    Guard("wrong later", drifts, lambda: (torch.ones(3),)),
    Guard("empty", lambda: torch.ones(0), reference=lambda: torch.ones(0)),
    Guard("works", lambda x: x.cumsum(0), lambda: (torch.ones(3),), lambda x: x.cumsum(0)),
]
"""


def test_each_failure_is_told_and_the_others_are_timed(repository):
    (repository / "guards.py").write_text(BROKEN)
    times = Times()
    side = Side(name="now", path=repository / "guards.py")
    asked = Asked(time_limit_s=3)
    processes.run(side, processes.listed(side, asked).names, asked, times, checked=True)
    assert list(times.cells) == ["empty", "works"]
    assert times.ms("works")[0] > 0
    assert {name: status for name, (status, _) in times.faults.items()} == {
        "raises": "error",
        "dies": "crashed",
        "hangs": "timeout",
        "wrong": "wrong",
        "wrong array": "wrong",
        "wrong number": "wrong",
        "wrong phase": "wrong",
        "nothing to compare": "wrong",
        "not a number": "wrong",
        "other shape": "wrong",
        "wrong later": "wrong",
    }


def test_anchors_are_timed_beside_a_cell_and_a_slow_down_can_be_asked_for(repository):
    times, slowed = Times(), Times()
    asked = Asked(anchors=True)
    with trees.working(repository / "guards.py") as side:
        processes.run(side, ["scan"], asked, times)
        slow = Side(name="slow", path=side.path, first=side.first, slowed=0.5)
        processes.run(slow, ["scan"], asked, slowed)
    assert set(times.cells["scan"][0]) == {"cell_ms", "matmul_ms", "copy_ms"}
    assert slowed.ms("scan")[0] / times.ms("scan")[0] == pytest.approx(1.5, rel=0.2)


def test_cells_that_cannot_be_listed_are_said(tmp_path):
    (tmp_path / "guards.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=r"^now: ZeroDivisionError"):
        processes.listed(Side(name="now", path=tmp_path / "guards.py"), Asked())


def test_sides_take_turns_and_the_ends_compare_results(monkeypatch):
    seen = []

    def run(side, cells, asked, into, *, checked=False):
        seen.append((side.name, checked))
        for name in cells:
            into.cells.setdefault(name, []).append({"cell_ms": 1.0})

    monkeypatch.setattr(processes, "run", run)
    old, new = processes.pairs(OLD, NEW, ["a"], 4, Asked())
    assert [name for name, _ in seen] == ["old", "new", "new", "old"] * 2
    assert [checked for _, checked in seen] == [True] * 2 + [False] * 4 + [True] * 2
    assert len(old.ms("a")) == len(new.ms("a")) == 4


def test_a_process_that_does_not_start_is_said(monkeypatch):
    def no(*_, **__):
        raise WorkerFailedError("crashed", "no memory", "")

    monkeypatch.setattr(processes, "Worker", no)
    with pytest.raises(WorkerFailedError, match="no memory"):
        processes.listed(NEW, Asked())
