from pathlib import Path

import pytest

from guarded import GUARDS, SLOW, git
from harness import baseline, processes, stored_check, trees
from harness.baseline import BaselineError, RefusedError
from harness.processes import Asked, Listed, Side
from test_baseline import CELLS, HERE
from test_baseline import measured as taken

SIDE, ASKED, LISTED = Side(name="now"), Asked(), Listed(list(CELLS), HERE)


@pytest.fixture
def kept():
    return baseline.taken(taken(seed=50), CELLS, "c0ffee", "2026-01-01", "first")


def said(monkeypatch, *rounds):
    """What processes say in each measurement: ratios by cell."""
    left = list(rounds)

    def several(side, cells, count, asked, *, on_process):
        assert asked.anchors
        on_process(count, count)
        return taken(left.pop(0), count=count, seed=9 + len(left), cells=cells)

    monkeypatch.setattr(processes, "several", several)
    return left


def verdicts_of(report):
    return {row.name: str(row.verdict) for row in report.rows}


def test_unchanged_code_is_measured_once(monkeypatch, kept):
    left = said(monkeypatch, {})
    report, times = stored_check.check(kept, SIDE, LISTED, ASKED)
    assert set(verdicts_of(report).values()) == {"SAME"}
    assert (left, len(times.ms(CELLS[0]))) == ([], 12)


def test_a_change_must_show_in_fresh_processes(monkeypatch, kept):
    left = said(monkeypatch, {"ssd forward": 1.3, "ssd backward": 1.3}, {"ssd forward": 1.3})
    report, _ = stored_check.check(kept, SIDE, LISTED, ASKED)
    assert verdicts_of(report) == {
        "ssd forward": "REGRESSION", "ssd backward": "SAME", "attention forward": "SAME",
    }  # fmt: skip
    assert left == []
    assert report.exit_code == 1


def test_another_device_is_refused_before_anything_is_measured(monkeypatch, kept):
    left = said(monkeypatch, {})
    monkeypatch.setattr(stored_check, "clean_commit", lambda side: "c0ffee")
    there = Listed(list(CELLS), {**HERE, "device": "other"})
    for measure in (stored_check.check, lambda *a: stored_check.update(*a, "why")):
        with pytest.raises(BaselineError, match="of another place: device other, not a CPU"):
            measure(kept, SIDE, there, ASKED)
    assert len(left) == 1


def test_a_tree_that_is_not_committed_has_no_baseline(repository, monkeypatch, kept):
    left = said(monkeypatch, {})
    (repository / "src" / "mine.py").write_text(SLOW)
    with trees.working(Path("guards.py")) as side:
        for write in (
            lambda: stored_check.calibrate(side, LISTED, ASKED, "why"),
            lambda: stored_check.update(kept, side, LISTED, ASKED, "why"),
        ):
            with pytest.raises(RefusedError, match=r"not committed \(src/mine.py\): commit them"):
                write()
    assert len(left) == 1


def test_code_without_a_commit_has_no_baseline(tmp_path):
    (tmp_path / "guards.py").write_text(GUARDS)
    with (
        trees.working(tmp_path / "guards.py") as side,
        pytest.raises(RefusedError, match="has no commit: a baseline says whose code it is"),
    ):
        stored_check.calibrate(side, LISTED, ASKED, "why")


def test_code_that_git_ignores_has_no_baseline(repository):
    (repository / ".git" / "info" / "exclude").write_text("mine_guards.py\n")
    (repository / "mine_guards.py").write_text(GUARDS)
    with (
        trees.working(Path("mine_guards.py")) as side,
        pytest.raises(RefusedError, match=r"git ignores .*mine_guards\.py: .* commit it first"),
    ):
        stored_check.calibrate(side, LISTED, ASKED, "why")


def test_a_repository_without_a_commit_has_no_baseline(repository):
    git(repository, "update-ref", "-d", "HEAD")
    with (
        trees.working(Path("guards.py")) as side,
        pytest.raises(RefusedError, match="has no commit: a baseline says whose code it is"),
    ):
        stored_check.calibrate(side, LISTED, ASKED, "why")


def test_there_is_no_baseline_of_no_cell(repository):
    with (
        trees.working(Path("guards.py")) as side,
        pytest.raises(RefusedError, match="there is no cell to take a baseline of"),
    ):
        stored_check.calibrate(side, Listed([], HERE), ASKED, "why")


def test_a_name_that_no_cell_has_is_not_accepted(monkeypatch, kept):
    monkeypatch.setattr(stored_check, "clean_commit", lambda side: "beef")
    with pytest.raises(ValueError, match="unknown cell 'typo'"):
        stored_check.update(kept, SIDE, LISTED, ASKED, "why", ["ssd*", "typo"])


def test_a_red_check_is_not_written(monkeypatch, kept):
    monkeypatch.setattr(stored_check, "clean_commit", lambda side: "beef")
    said(monkeypatch, {"ssd forward": 1.3}, {"ssd forward": 1.3, "ssd backward": 0.8})
    with pytest.raises(RefusedError, match="ssd forward is REGRESSION"):
        stored_check.update(kept, SIDE, LISTED, ASKED, "why")
    made, changed = stored_check.update(kept, SIDE, LISTED, ASKED, "why", ["ssd f*"])
    assert changed == ["ssd forward", "ssd backward"]
    assert made.cells["ssd forward"].commit == "beef"
    assert made.cells["attention forward"] == kept.cells["attention forward"]


def test_cells_are_timed_beside_anchors(repository):
    with trees.working(Path("guards.py")) as side:
        times = stored_check.measure(side, ["scan"], ASKED, 1)
    (metrics,) = times.cells["scan"]
    assert all(metrics[f"{anchor}_ms"] > 0 for anchor in baseline.ANCHORS)
