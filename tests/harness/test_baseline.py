import json
import math

import pytest

from harness import baseline, verdicts
from harness.baseline import BaselineError, RefusedError
from harness.environment import FINGERPRINT
from harness.judged import Row
from harness.processes import Times
from harness.verdicts import Change, Verdict
from test_verdicts import times as drawn

HERE = {**dict.fromkeys(FINGERPRINT), "device": "a CPU", "threads": 2, "torch": "2.13.0"}
CELLS = ("ssd forward", "ssd backward", "attention forward")


def measured(ratios=None, count=24, seed=0, faults=None, cells=CELLS):
    """Processes whose cells take 10 ms times a ratio, beside anchors of 2 and 4 ms."""
    found = Times(environment=HERE, faults=dict(faults or {}))
    for i, name in enumerate(cells):
        ms = drawn((ratios or {}).get(name, 1.0), count=count, seed=seed + i)
        noisy = drawn(noise=0.2, count=count, seed=seed + i + 100, ms=4)
        found.cells[name] = [
            {"cell_ms": a, "matmul_ms": 2.0, "copy_ms": b} for a, b in zip(ms, noisy, strict=True)
        ]
    return found


@pytest.fixture
def kept():
    return baseline.taken(measured(seed=50), CELLS, "c0ffee", "2026-01-01", "first")


def verdicts_of(kept, now, names=CELLS):
    return {row.name: row.verdict for row in baseline.judged(kept, now, names, "cpu")}


def written(tmp_path, kept, change=lambda found: None):
    path = tmp_path / "baseline.json"
    baseline.save(kept, path)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    return baseline.load(path)


# Taking


def test_a_baseline_keeps_ratios_to_the_steadier_anchor_and_the_noise(kept):
    cell = kept.cells["ssd forward"]
    assert cell.anchor == "matmul"
    assert len(cell.ratios) == 24
    assert cell.ms == pytest.approx(10, rel=0.02)
    assert cell.ratios[0] == pytest.approx(5, rel=0.1)
    assert 0 < cell.floor < 0.02
    assert (cell.commit, cell.utc, cell.reason, cell.before) == (
        "c0ffee", "2026-01-01", "first", None,
    )  # fmt: skip
    assert kept.fingerprint == {key: HERE[key] for key in FINGERPRINT}


def test_a_cell_that_fails_or_was_seldom_timed_gives_no_baseline():
    broken = measured(faults={"ssd forward": ("wrong", "relative error 1")})
    with pytest.raises(RefusedError, match="ssd forward: wrong: relative error 1: mend it first"):
        baseline.taken(broken, CELLS, "c0ffee", "now", "why")
    with pytest.raises(RefusedError, match="ssd forward: 13 processes; its noise needs 14"):
        baseline.taken(measured(count=13), CELLS, "c0ffee", "now", "why")


def test_it_is_read_as_it_was_written(tmp_path, kept):
    assert written(tmp_path, kept) == kept


def test_the_file_is_called_after_the_device(kept):
    assert baseline.file_name({**HERE, "device": "Intel(R) Xeon(R) CPU @ 2.00GHz"}) == (
        "intel-r-xeon-r-cpu-2.00ghz-2t-torch-2.13.0.json"
    )


# Judging


def test_unchanged_code_is_the_same(kept):
    assert set(verdicts_of(kept, measured(count=12, seed=9)).values()) == {Verdict.SAME}


def test_a_cell_that_became_slower_or_faster_is_found(kept):
    now = measured({"ssd forward": 1.2, "ssd backward": 0.8}, count=12, seed=9)
    found = verdicts_of(kept, now)
    assert found["ssd forward"] == Verdict.REGRESSION
    assert found["ssd backward"] == Verdict.IMPROVEMENT
    assert found["attention forward"] == Verdict.SAME
    assert next(iter(found)) == "ssd forward"  # the worst first


def test_a_slower_machine_is_no_regression(kept):
    now = measured(count=12, seed=9)
    for metrics in (m for of_cell in now.cells.values() for m in of_cell):
        for name in metrics:
            metrics[name] *= 1.5
    assert set(verdicts_of(kept, now).values()) == {Verdict.SAME}


def test_a_noisy_cell_is_watched_only():
    noisy = measured(count=24)
    for i, metrics in enumerate(noisy.cells["ssd forward"]):
        metrics["cell_ms"] *= 1.5 ** (i % 3)
    kept = baseline.taken(noisy, CELLS, "c0ffee", "now", "why")
    now = measured({"ssd forward": 3.0}, count=12)
    assert verdicts_of(kept, now)["ssd forward"] == Verdict.TRACK_ONLY
    for metrics in now.cells["ssd forward"]:
        metrics["cell_ms"] *= 10
    assert verdicts_of(kept, now)["ssd forward"] == Verdict.REGRESSION
    assert set(baseline.gating(kept, "cpu")) == {"ssd backward", "attention forward"}


def test_cells_that_are_gone_new_or_failed(kept):
    now = measured(
        count=12,
        seed=9,
        faults={"ssd backward": ("crashed", "killed by SIGSEGV")},
        cells=("ssd forward", "hyena forward"),
    )
    names = ("ssd forward", "ssd backward", "hyena forward")
    rows = {row.name: row for row in baseline.judged(kept, now, names, "cpu")}
    assert rows["attention forward"].verdict == Verdict.MISSING
    assert rows["ssd backward"].verdict == Verdict.FAILED
    assert rows["ssd backward"].why == "crashed: killed by SIGSEGV"
    assert rows["hyena forward"].verdict == Verdict.NEW
    assert rows["ssd forward"].verdict == Verdict.SAME
    assert verdicts.exit_code(row.verdict for row in rows.values()) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1.0])
@pytest.mark.parametrize("of", ["cell_ms", "matmul_ms"])
def test_a_number_that_is_no_time_fails(kept, value, of):
    now = measured(count=12, seed=9)
    now.cells["ssd forward"][3][of] = value
    assert verdicts_of(kept, now)["ssd forward"] == Verdict.FAILED


def test_too_few_processes_fail(kept):
    now = measured(count=12, seed=9)
    del now.cells["ssd forward"][6:]
    assert verdicts_of(kept, now)["ssd forward"] == Verdict.FAILED


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: cell["ratios"].__setitem__(0, math.nan),
        lambda cell: cell["ratios"].__setitem__(0, 0),
        lambda cell: cell["ratios"].__setitem__(0, -1.0),
        lambda cell: cell["ratios"].__setitem__(0, None),
        lambda cell: cell["ratios"].__setitem__(0, "5"),
        lambda cell: cell["ratios"].__setitem__(0, 1e-308),
        lambda cell: cell["ratios"].__setitem__(0, 10**400),
        lambda cell: cell.update(ratios=[]),
        lambda cell: cell.update(ratios=5.0),
        lambda cell: cell.pop("ratios"),
        lambda cell: cell.update(ms=math.nan),
        lambda cell: cell.update(ms=0),
        lambda cell: cell.update(ms=5e-324),
        lambda cell: cell.pop("ms"),
        lambda cell: cell.update(floor=math.nan),
        lambda cell: cell.update(floor=-1),
        lambda cell: cell.update(floor=1e9),  # nothing would count
        lambda cell: cell.update(anchor="sun"),
        lambda cell: cell.update(reason=math.nan),
        lambda cell: cell.update(commit=5),
    ],
)
def test_a_cell_whose_baseline_is_damaged_fails_and_the_others_are_judged(tmp_path, kept, change):
    damaged = written(tmp_path, kept, lambda found: change(found["cells"]["ssd forward"]))
    found = verdicts_of(damaged, measured(count=12, seed=9))
    assert found.pop("ssd forward") == Verdict.FAILED
    assert set(found.values()) == {Verdict.SAME}


@pytest.mark.parametrize("entry", [None, 5, "x", []])
def test_a_cell_without_an_entry_fails(tmp_path, kept, entry):
    damaged = written(tmp_path, kept, lambda found: found["cells"].update({"ssd forward": entry}))
    assert verdicts_of(damaged, measured(count=12))["ssd forward"] == Verdict.FAILED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"schema": 2}',
        '{"schema": 1, "cells": []}',
        "\x00\xff",
        "[" * 100_000,
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path, text):
    path = tmp_path / "baseline.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(BaselineError, match="baseline"):
        baseline.load(path)


def test_half_a_file_is_refused(tmp_path, kept):
    path = tmp_path / "baseline.json"
    baseline.save(kept, path)
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    with pytest.raises(BaselineError, match="is no baseline, or only part of one"):
        baseline.load(path)


def test_where_there_is_none_the_command_that_takes_it_is_named(tmp_path):
    with pytest.raises(BaselineError, match="--calibrate --reason TEXT with the same command"):
        baseline.load(tmp_path / "none.json")


def test_what_differs_of_the_device_is_named(kept):
    assert baseline.differing(kept, HERE) == []
    assert baseline.differing(kept, {**HERE, "torch": "2.11.0", "threads": 4}) == [
        "threads 4, not 2",
        "torch 2.11.0, not 2.13.0",
    ]


# Updating


def update(kept, ratios, cells=CELLS, accepted=()):
    now = measured(ratios, seed=9, cells=cells)
    rows = baseline.judged(kept, now, cells, "cpu")
    fresh = baseline.taken(now, cells, "beef", "2026-02-02", "faster scan")
    return rows, baseline.updated(kept, fresh, rows, accepted)


def test_only_what_moved_is_rewritten_and_what_was_there_is_kept(kept):
    _, (made, changed) = update(kept, {"ssd forward": 0.8, "ssd backward": 0.995})
    assert changed == ["ssd forward"]
    new, old = made.cells["ssd forward"], kept.cells["ssd forward"]
    assert new.ms == pytest.approx(8, rel=0.02)
    assert (new.commit, new.reason) == ("beef", "faster scan")
    assert new.before["ratio"] == pytest.approx(5, rel=0.02)
    assert (new.before["commit"], new.before["reason"]) == ("c0ffee", "first")
    for name in CELLS[1:]:
        assert made.cells[name] == kept.cells[name]
    assert old.before is None


@pytest.mark.parametrize(("ratio", "moved"), [(0.94, True), (0.98, False)])
def test_a_third_of_what_counts_is_rewritten(kept, ratio, moved):  # 10 % count
    _, (_, changed) = update(kept, {"ssd forward": ratio})
    assert changed == ["ssd forward"] * moved


def test_a_baseline_does_not_creep(kept):
    slower = {"ssd forward": 1.06, "ssd backward": 1.3}
    assert update(kept, slower)[1][1] == []
    assert update(kept, slower, accepted=["ssd forward"])[1][1] == ["ssd forward"]
    assert update(kept, {"ssd forward": 1.02}, accepted=["ssd forward"])[1][1] == []


def test_what_may_have_moved_or_not_is_left(kept):
    row = Row(
        name="ssd forward",
        verdict=Verdict.INCONCLUSIVE,
        change=Change(ratio=0.8, low=0.6, high=1.01, processes=12),
        limit=1.1,
    )
    fresh = baseline.taken(measured(), CELLS, "beef", "now", "why")
    assert baseline.updated(kept, fresh, [row])[1] == []


def test_new_cells_are_added_and_gone_ones_dropped(kept):
    _, (made, changed) = update(kept, {}, cells=("ssd forward", "hyena forward"))
    assert set(made.cells) == {"ssd forward", "hyena forward"}
    assert set(changed) == {"ssd backward", "attention forward", "hyena forward"}


def test_a_red_check_updates_nothing_but_what_is_accepted(kept):
    rows, _ = update(kept, {"ssd forward": 1.3})
    with pytest.raises(RefusedError, match="ssd forward is REGRESSION: a red check updates"):
        baseline.refuse_red(rows)
    baseline.refuse_red(rows, ["ssd forward"])
    rows, _ = update(kept, {}, cells=CELLS[:2])
    with pytest.raises(RefusedError, match="attention forward is MISSING"):
        baseline.refuse_red(rows, ["ssd forward"])
