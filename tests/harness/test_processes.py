from dataclasses import replace

import pytest

from harness import processes, trees
from harness.processes import Asked, Side
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
    side = Side(name="now", path=repository / "guards.py")
    asked = Asked(time_limit_s=3)
    times = processes.several(side, processes.listed(side, asked).names, 1, asked)
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
    asked = Asked(anchors=True)
    with trees.working(repository / "guards.py") as side:
        times = processes.several(side, ["scan"], 1, asked)
        slowed = processes.several(replace(side, slowed=0.5), ["scan"], 1, asked)
    assert set(times.cells["scan"][0]) == {"cell_ms", "matmul_ms", "copy_ms"}
    assert slowed.ms("scan")[0] / times.ms("scan")[0] == pytest.approx(1.5, rel=0.2)


def test_cells_that_cannot_be_listed_are_said(tmp_path):
    (tmp_path / "guards.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=r"^now: ZeroDivisionError"):
        processes.listed(Side(name="now", path=tmp_path / "guards.py"), Asked())


@pytest.fixture
def seen(monkeypatch):
    """What pretended processes were asked to time: side, cell, whether to compare."""
    asked_for = []

    class Pretended(processes._Process):
        def start(self):
            pass

        def time(self, name, *, checked):
            asked_for.append((self._side.name, name, checked))
            if (self._side.name, name) in (("new", "fails"), ("old", "is new")):
                self._into.faults[name] = ("error", "as it is")
            else:
                self._into.cells.setdefault(name, []).append({"cell_ms": 1.0})

    monkeypatch.setattr(processes, "_Process", Pretended)
    return asked_for


def test_sides_take_turns_cell_by_cell_and_the_ends_compare_results(seen):
    old, new = processes.pairs(OLD, NEW, ["a", "b"], 4, Asked())
    first = [("old", "a"), ("new", "a"), ("old", "b"), ("new", "b")]
    second = [("new", "a"), ("old", "a"), ("new", "b"), ("old", "b")]
    assert [(side, cell) for side, cell, _ in seen] == [*first, *second] * 2
    assert [checked for *_, checked in seen] == [True] * 4 + [False] * 8 + [True] * 4
    assert len(old.ms("a")) == len(new.ms("b")) == 4


def test_a_cell_that_fails_on_one_side_is_left_out_of_further_pairs(seen):
    old, new = processes.pairs(OLD, NEW, ["fails", "is new", "a"], 3, Asked())
    for name in ("fails", "is new"):
        assert [(side, cell) for side, cell, _ in seen if cell == name] == [
            ("old", name), ("new", name),
        ]  # fmt: skip
    assert (len(old.ms("fails")), len(new.ms("is new")), len(new.ms("a"))) == (1, 1, 3)


def test_a_pair_lives_at_the_same_time(repository):
    (repository / "guards.py").write_text(BROKEN)
    side = Side(name="now", path=repository / "guards.py")
    cells = ["dies", "works"]
    old, new = processes.pairs(side, replace(side, name="again"), cells, 2, Asked())
    assert len(old.ms("works")) == len(new.ms("works")) == 2
    for times in (old, new):
        assert times.faults["dies"][0] == "crashed"


def test_no_process_outlives_its_pair(monkeypatch):
    running, most = set(), 0

    class Pretended:
        def __init__(self, *_, **__):
            nonlocal most
            self.environment = {}
            running.add(self)
            most = max(most, len(running))

        def ask(self, *_, **__):
            return {"status": "ok", "metrics": {"cell_ms": 1.0}}

        def kill(self):
            running.remove(self)

    monkeypatch.setattr(processes, "Worker", Pretended)
    processes.pairs(OLD, NEW, ["a"], 3, Asked())
    assert (most, running) == (2, set())
    processes.several(NEW, ["a"], 3, Asked())
    assert (most, running) == (2, set())


def test_a_process_that_does_not_start_is_said(monkeypatch):
    def no(*_, **__):
        raise WorkerFailedError("crashed", "no memory", "")

    monkeypatch.setattr(processes, "Worker", no)
    with pytest.raises(WorkerFailedError, match="no memory"):
        processes.listed(NEW, Asked())
    with pytest.raises(WorkerFailedError, match="no memory"):
        processes.pairs(OLD, NEW, ["a"], 7, Asked())
