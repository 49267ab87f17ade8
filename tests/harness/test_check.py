import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from guarded import GUARDS, SLOW, commit
from harness import check, processes, verdicts
from harness.judged import Row
from harness.processes import Asked, Side, Times
from harness.verdicts import Change, Verdict
from test_verdicts import times as drawn

OLD, NEW = Side(name="old"), Side(name="new")
MINE = Path("guards.py")


def told(monkeypatch, *rounds, noise=0.01):
    """What processes say in each round of pairs: ratios new / old by cell, or statuses."""
    left = list(rounds)

    def pairs(old, new, cells, count, asked, *, on_process):
        ratios = left.pop(0)
        before, after = Times(), Times()
        for i, name in enumerate(cells):
            ratio = ratios.get(name, 1.0)
            if isinstance(ratio, str):
                after.faults[name] = (ratio, "as it is")
                continue
            for times, factor, own in ((before, 1.0, 0), (after, ratio, 100)):
                seed = i + 10 * len(left) + own
                found = drawn(factor, count=count, seed=seed, noise=noise)
                times.cells[name] = [{"cell_ms": ms} for ms in found]
        on_process(2 * count, 2 * count)
        return before, after

    monkeypatch.setattr(processes, "pairs", pairs)
    return left


# Verdicts of two sides


def test_a_change_must_show_twice(monkeypatch):
    left = told(monkeypatch, {"slow": 1.3, "lucky": 1.3, "fast": 0.7}, {"slow": 1.3, "fast": 0.7})
    seen = []
    rows = check.compare(
        OLD, NEW, ["slow", "lucky", "fast", "same"], Asked(), on_process=lambda *at: seen.append(at)
    )
    assert {row.name: row.verdict for row in rows} == {
        "slow": Verdict.REGRESSION,
        "lucky": Verdict.SAME,
        "fast": Verdict.IMPROVEMENT,
        "same": Verdict.SAME,
    }
    assert rows[1].why.startswith("not confirmed: REGRESSION 1.")
    assert [what for what, *_ in seen] == ["comparing", "confirming"]
    assert left == []


def test_nothing_is_measured_twice_where_nothing_changed(monkeypatch):
    told(monkeypatch, {})
    (row,) = check.compare(OLD, NEW, ["same"], Asked())
    assert (row.verdict, row.change.processes) == (Verdict.SAME, 12)


@pytest.mark.parametrize("rounds", [[{"a": "wrong"}], [{"a": 1.3}, {"a": "wrong"}]])
def test_a_cell_that_fails_is_red_whatever_its_speed(monkeypatch, rounds):
    told(monkeypatch, *rounds)
    (row,) = check.compare(OLD, NEW, ["a"], Asked())
    assert (row.verdict, row.why) == (Verdict.FAILED, "wrong: as it is")


def said(*ms, fault=None):
    """What a side said of cell "a"."""
    faults = {"a": ("error", fault)} if fault else {}
    return Times(cells={"a": [{"cell_ms": x} for x in ms]}, faults=faults)


def test_a_cell_is_new_only_where_the_old_code_never_ran_it():
    row = check.judged("a", said(fault="no such name"), said(1.0), "cpu")
    assert (row.verdict, row.why) == (
        Verdict.NEW, "the old code cannot run it: error: no such name",
    )  # fmt: skip
    row = check.judged("a", said(1.0, 1.0, fault="out of memory"), said(1.5, 1.5), "cpu")
    assert row.verdict == Verdict.FAILED
    first = Row(name="a", verdict=Verdict.REGRESSION)
    new = Row(name="a", verdict=Verdict.NEW, why="it cannot")
    assert check.confirmed(first, new, new).verdict == Verdict.FAILED


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, 10**400])
def test_a_number_that_is_no_time_is_red(value):
    good, bad = said(*drawn()), said(value, *drawn()[1:])
    for old, new in ((good, bad), (bad, good)):
        assert check.judged("a", old, new, "cpu").verdict == Verdict.FAILED


def test_noise_of_the_old_processes_raises_what_counts(monkeypatch):
    row = check.judged("a", said(*drawn(noise=0.06)), said(*drawn(1.3, seed=1)), "cpu")
    assert row.limit == 1 + 3 * row.noise > 1.05
    told(monkeypatch, {"a": 1.2}, {"a": 1.2}, noise=0.2)
    (row,) = check.compare(OLD, NEW, ["a"], Asked())
    assert (row.verdict, row.why) == (
        Verdict.TRACK_ONLY, f"noise {row.noise:.1%} against itself",
    )  # fmt: skip


def test_a_slow_down_that_noise_cannot_explain_is_found_in_a_noisy_cell_too(monkeypatch):
    told(monkeypatch, {"a": 2.0}, {"a": 2.0}, noise=0.2)
    (row,) = check.compare(OLD, NEW, ["a"], Asked())
    assert (row.verdict, row.why) == (
        Verdict.REGRESSION, f"noise {row.noise:.1%} against itself",
    )  # fmt: skip
    told(monkeypatch, {"a": 2.0}, {}, noise=0.2)
    (row,) = check.compare(OLD, NEW, ["a"], Asked())
    assert row.verdict == Verdict.INCONCLUSIVE


def row_of(verdict, ratio):
    found = Change(ratio=ratio, low=ratio - 0.1, high=ratio + 0.1, processes=12)
    return Row(name="a", verdict=verdict, change=found, limit=1.05)


@pytest.mark.parametrize(
    ("first", "fresh"),
    [
        (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
        (Verdict.TRACK_ONLY, Verdict.TRACK_ONLY),
        (Verdict.TRACK_ONLY, Verdict.REGRESSION),
        (Verdict.REGRESSION, Verdict.TRACK_ONLY),
    ],
)
@pytest.mark.parametrize(
    ("again", "both", "verdict"),
    [
        (1.1, 1.1, Verdict.REGRESSION),
        (1.04, 1.1, Verdict.INCONCLUSIVE),  # the fresh pairs do not show it
        (0.9, 1.1, Verdict.INCONCLUSIVE),
    ],
)
def test_what_one_round_cannot_tell_is_judged_by_all_pairs(first, fresh, again, both, verdict):
    first = row_of(first, 1.08)
    again, both = row_of(fresh, again), row_of(Verdict.REGRESSION, both)
    assert check.confirmed(first, again, both).verdict == verdict
    same = replace(both, verdict=Verdict.SAME)
    assert check.confirmed(first, again, same).verdict == Verdict.SAME


def test_a_cell_that_is_beyond_what_counts_but_not_surely_is_measured_again(monkeypatch):
    old, new = said(*drawn(noise=0.001)), said(*[9.7, 12.0, 12.0] * 4)
    assert check.judged("a", old, new, "cpu").verdict == Verdict.INCONCLUSIVE
    seen = []
    monkeypatch.setattr(processes, "pairs", lambda *a, **_: (seen.append(a), (old, new))[1])
    (row,) = check.compare(OLD, NEW, ["a"], Asked())
    assert len(seen) == 2
    assert (row.verdict, row.change.processes) == (Verdict.REGRESSION, 24)


def test_so_is_a_cell_that_is_beyond_what_counts_and_too_noisy(monkeypatch):
    told(monkeypatch, {"a": 1.2}, {"a": 1.2}, noise=0.18)
    (row,) = check.compare(OLD, NEW, ["a"], Asked())
    assert (row.verdict, row.change.processes) == (Verdict.REGRESSION, 24)


def test_fewer_than_seven_pairs_are_refused():
    with pytest.raises(ValueError, match="a verdict needs 7 pairs of processes, got 6"):
        check.compare(OLD, NEW, ["a"], Asked(), pairs=6)


# Two trees


def test_cells_of_the_commit_that_are_gone_are_missing(repository, monkeypatch):
    MINE.write_text(GUARDS.replace('"scan twice"', '"scan of scan"'))
    told(monkeypatch, {})
    found = check.ab("HEAD", MINE, Asked())
    assert {row.name: row.verdict for row in found.rows} == {
        "scan twice": Verdict.MISSING,
        "scan": Verdict.SAME,
        "scan of scan": Verdict.SAME,
    }
    assert found.exit_code == 1
    assert found.about["reference"] == "HEAD"
    assert found.about["commit"] == found.about["reference_commit"]
    assert found.about["uncommitted"] == ["guards.py"]
    assert found.about["threads"]


def test_only_chosen_cells_are_measured(repository, monkeypatch):
    told(monkeypatch, {})
    found = check.ab("HEAD", MINE, Asked(), cells=["scan t*"])
    assert [row.name for row in found.rows] == ["scan twice"]


def test_a_name_that_no_cell_has_is_no_empty_choice(repository, monkeypatch):
    told(monkeypatch, {})
    with pytest.raises(ValueError, match=r"unknown cell 'scna', expected .* did you mean 'scan'"):
        check.ab("HEAD", MINE, Asked(), cells=["scan", "scna"])


def test_it_is_said_where_the_commit_has_no_file_of_guards(repository, monkeypatch):
    told(monkeypatch, {}, {})
    assert check.ab("HEAD", MINE, Asked()).title == "now beside HEAD"
    other = repository / "other.py"
    other.write_text(GUARDS)
    said = "now beside HEAD, which has no other.py: both run this one"
    assert check.ab("HEAD", other, Asked()).title == said


def test_a_commit_whose_guards_cannot_be_listed_is_no_empty_one(repository):
    MINE.write_text("import nothing_of_that_name")
    commit(repository)
    MINE.write_text(GUARDS)
    with pytest.raises(ValueError, match="HEAD: ModuleNotFoundError"):
        check.ab("HEAD", MINE, Asked())


def test_a_slow_down_is_found_and_confirmed_and_the_tree_left_clean(repository):
    (repository / "src" / "mine.py").write_text(SLOW)
    found = check.ab("HEAD", MINE, Asked(), cells=["scan"], pairs=verdicts.FEWEST)
    (row,) = found.rows
    assert row.verdict == Verdict.REGRESSION
    assert 1.2 < row.change.low < row.change.ratio < row.change.high < 1.7
    assert found.exit_code == 1
    status = subprocess.run(["git", "status", "-s"], capture_output=True, text=True, check=True)
    assert status.stdout == " M src/mine.py\n"
