import io
import math
import time

import pandas as pd
import pytest
from rich.console import Console

from harness import cost, report, sweep, workload
from harness.record import Case
from harness.sweep import Grid
from harness.worker import attempt

ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")
CEILINGS = {"copy_bytes_per_s": 1e15, "matmul_flops_per_s_float32": 1e15, "exp2_per_s": 1e15}


def case(**changes):
    asked = {
        "kind": "cost",
        "arch": "mamba2",
        "level": "op",
        "phase": "forward",
        "batch": 1,
        "seq_len": 64,
        "size": "d64",
    }
    return Case(**{**asked, **changes})


def measured(asked, ceilings=CEILINGS):
    """One cell in this process, as a worker would."""
    return attempt(lambda: cost.measure(asked, "cpu", ceilings))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    grids = [
        Grid(level="op", phase="forward", lengths=(64, 128), size="d64"),
        Grid(level="block", phase="train_step", lengths=(64,), size="d64"),
        Grid(level="model", phase="decode", positions=(10, 50), size="d64"),
    ]
    return out, sweep.cells(grids), cost.run(sweep.cells(grids), out)


def test_every_cell_is_measured_and_recorded(swept):
    out, cells, table = swept
    assert table["status"].tolist() == ["ok"] * len(cells) == ["ok"] * 20
    assert set(table["key"]) == {c.key for c in cells}
    assert len(list((out / "records").glob("*.json"))) == len(cells)
    timed = table
    assert (timed["time_ms_p20"] <= timed["time_ms_p50"]).all()
    assert (timed["time_ms_p50"] > 0).all()
    assert (timed[timed["level"] == "op"]["relative_error"] < 1e-5).all()


def test_the_csv_holds_the_same_table(swept):
    out, _, table = swept
    again = pd.read_csv(out / "cells.csv")
    assert again["key"].tolist() == table["key"].tolist()
    assert again["time_ms_p50"].tolist() == pytest.approx(table["time_ms_p50"], nan_ok=True)


def test_times_and_counts_are_complete(swept):
    _, _, table = swept
    timed = table
    assert (timed[timed["phase"] == "train_step"]["peak_bytes"] > 0).all()
    for name in ("state_bytes", "work_flops", "floor_bytes", "roofline_fraction"):
        assert (timed[name] > 0).all(), name
    assert (timed["roofline_fraction"] < 1).all()
    assert (timed["sample_count"] >= 5).all()
    assert timed["timing_contract"].notna().all()


def test_what_goes_wrong_becomes_a_status(monkeypatch):
    memory = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    for error, status in (
        (RuntimeError(memory), "oom"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "oom"),
        (RuntimeError("std::bad_alloc"), "oom"),
        (MemoryError(), "oom"),
        (ZeroDivisionError("a\nbug"), "error"),
        (NotImplementedError("none"), "unsupported"),
        (FloatingPointError("the loss is nan"), "diverged"),
    ):

        def build(case, device, error=error):
            raise error

        monkeypatch.setattr("harness.workload.build", build)
        found = measured(case())
        assert found["status"] == status
        assert "\n" not in found["reason"]
        assert "metrics" not in found


@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_a_wrong_op_is_never_a_time(monkeypatch, factor):
    from archs.ops import ssd

    right = ssd.ssd_torch
    monkeypatch.setattr(
        ssd, "ssd_torch", lambda *a, **kw: (lambda y, state: (factor * y, state))(*right(*a, **kw))
    )
    found = measured(case())
    assert found["status"] == "wrong", found
    assert "metrics" not in found


def test_an_op_that_goes_wrong_while_it_is_timed_is_found(monkeypatch):
    from archs.ops import ssd
    from harness import timing

    right, observe = ssd.ssd_torch, timing.observe

    def break_it(*arguments, **options):
        found = observe(*arguments, **options)
        monkeypatch.setattr(
            ssd, "ssd_torch", lambda *a, **kw: (lambda y, state: (2 * y, state))(*right(*a, **kw))
        )
        return found

    monkeypatch.setattr(timing, "observe", break_it)
    assert measured(case())["status"] == "wrong"


def test_faster_than_the_roofline_is_an_error(monkeypatch):
    slow = {**CEILINGS, "matmul_flops_per_s_float32": 1e6}
    monkeypatch.setattr("harness.ceilings.measure", lambda device, dtypes: slow)
    found = measured(case(), slow)
    assert found["status"] == "error"
    assert "faster than the roofline" in found["reason"]


def test_ceilings_measured_in_a_bad_moment_are_measured_again():
    found = measured(case(), {**CEILINGS, "matmul_flops_per_s_float32": 1e6})
    assert found["status"] == "ok", found
    assert 0 < found["metrics"]["roofline_fraction"] < 1


def test_a_sweep_runs_from_python_by_name_of_its_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[[grid]]\nlevel = "op"\nphase = "forward"\narchs = "mamba2"\nlengths = 16\n')
    table = cost.run(path, tmp_path / "run", device="cpu")
    assert table["status"].tolist() == ["ok"]


def test_tables_show_every_architecture_and_exponent(swept):
    _, _, cells = swept
    console = Console(width=140, record=True, file=io.StringIO())
    for table in report.tables(cells):
        console.print(table)
    text = console.export_text()
    for arch in ARCHS:
        assert text.count(arch) == 3
    first = cells[(cells["level"] == "op") & (cells["arch"] == "mamba2")]["time_ms_p50"].tolist()
    assert f"{math.log2(first[1] / first[0]):.2f}" in text


def test_tables_show_where_a_curve_ends(swept):
    _, _, cells = swept
    cells = cells.copy()
    victim = (cells["level"] == "op") & (cells["arch"] == "hyena") & (cells["seq_len"] == 128)
    assert victim.sum() == 1
    cells.loc[victim, "status"] = "oom"
    cells.loc[victim, ["time_ms_p50", "peak_bytes", "state_bytes"]] = math.nan
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.tables(cells)[0])
    assert "oom" in console.export_text()


def test_the_first_call_of_a_cell_is_reported_whatever_the_check_warms_up(monkeypatch):
    waits = iter([0.2])

    def function():
        time.sleep(next(waits, 0.001))

    def check():
        function()
        return 0.0

    counted = {"work_flops": 0, "floor_bytes": 0}
    built = workload.Workload(function=function, counted=counted, check=check)
    monkeypatch.setattr(workload, "build", lambda case, device: built)
    metrics, _ = cost.measure(case(), "cpu", CEILINGS)
    assert 200 <= metrics["compile_ms"] < 300
    assert metrics["time_ms_p80"] < 100
