import io
import math

import pandas as pd
import pytest
import torch

from harness import cost, record, report, sweep, workload
from harness.record import Case
from harness.sweep import Grid

ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")
LOSS = Grid(
    kind="loss",
    level="model",
    phase="train_step",
    lengths=(32,),
    batch=2,
    size="300K",
    options={"steps": 12, "learning_rate": 3e-3, "corpus": "python-source"},
)


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


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    grids = [
        Grid(level="op", phase="forward", lengths=(64, 128), size="d64"),
        Grid(level="block", phase="train_step", lengths=(64,), size="d64"),
        Grid(level="model", phase="decode", positions=(10, 50), size="d64"),
        LOSS,
    ]
    return out, sweep.cells(grids), cost.run(sweep.cells(grids), out)


def test_every_cell_is_measured_and_recorded(swept):
    out, cells, table = swept
    assert table["status"].tolist() == ["ok"] * len(cells) == ["ok"] * 24
    assert set(table["key"]) == {c.key for c in cells}
    assert len(list((out / "records").glob("*.json"))) == len(cells)
    timed = table[table["kind"] == "cost"]
    assert (timed["time_ms_p20"] <= timed["time_ms_p50"]).all()
    assert (timed["time_ms_p50"] > 0).all()
    assert (timed[timed["level"] == "op"]["relative_error"] < 1e-5).all()


def test_the_csv_holds_the_same_table(swept):
    out, _, table = swept
    again = pd.read_csv(out / "cells.csv")
    assert again["key"].tolist() == table["key"].tolist()
    assert again["time_ms_p50"].tolist() == pytest.approx(table["time_ms_p50"], nan_ok=True)


def test_losses_on_real_bytes_fall(swept):
    _, _, table = swept
    runs = table[table["kind"] == "loss"]
    assert sorted(runs["arch"]) == sorted(ARCHS)
    assert (runs["train_loss_bits_per_byte_first"] > 7).all()
    assert (runs["train_loss_bits_per_byte_last"] < 6.5).all()
    assert (runs["val_loss_bits_per_byte"] < 6.8).all()


def test_running_again_measures_nothing_and_changes_no_file(swept):
    out, cells, _ = swept
    before = {p: p.read_bytes() for p in (out / "records").iterdir()}
    started = []
    cost.run(cells, out, on_start=started.append)
    assert started == []
    assert {p: p.read_bytes() for p in (out / "records").iterdir()} == before


def test_a_missing_record_is_measured_again_alone(swept):
    out, cells, _ = swept
    victim = next(c for c in cells if c.level == "op")
    for path in (out / "records").glob(f"{victim.key}-*"):
        path.unlink()
    started = []
    cost.run(cells, out, on_start=started.append)
    assert started == [victim]


def test_other_code_or_device_measures_again(swept, monkeypatch, tmp_path):
    cells = [case()]
    cost.run(cells, tmp_path)
    here = record.environment()
    monkeypatch.setattr(record, "environment", lambda: {**here, "kernel_hash": "changed"})
    started = []
    table = cost.run(cells, tmp_path, on_start=started.append)
    assert started == cells
    assert len(table) == 1


def test_what_goes_wrong_becomes_a_status(tmp_path, monkeypatch):
    def failing(error):
        def build(case):
            raise error

        monkeypatch.setattr(workload, "build", build)
        return cost.run([case()], tmp_path).iloc[-1]

    memory = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    for error, status in (
        (RuntimeError(memory), "oom"),
        (MemoryError(), "oom"),
        (ZeroDivisionError("a\nbug"), "error"),
        (NotImplementedError("none"), "unsupported"),
    ):
        row = failing(error)
        assert row["status"] == status
        assert "\n" not in row["reason"]


def test_a_wrong_op_is_never_a_time(tmp_path, monkeypatch):
    right = workload.ssd

    def slightly_wrong(x, *args, backend, **kwargs):
        y, state = right(x, *args, backend=backend, **kwargs)
        return (y * 1.001 if backend == "torch" else y), state

    monkeypatch.setattr(workload, "ssd", slightly_wrong)
    row = cost.run([case()], tmp_path).iloc[0]
    assert row["status"] == "wrong"
    assert math.isnan(row["time_ms_p50"])


def test_unbuilt_backend_is_one_failed_cell(tmp_path):
    row = cost.run([case(backend="triton")], tmp_path).iloc[0]
    assert row["status"] == "unsupported"
    assert "not built yet" in row["reason"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("phase", ["forward", "train_step", "prefill", "decode"])
def test_every_model_phase_builds_and_counts(arch, phase):
    place = {"seq_len": None, "position": 40} if phase == "decode" else {"seq_len": 32}
    built = workload.build(case(arch=arch, level="model", phase=phase, **place))
    built.function()
    assert built.counted["forward_flops"] > 0
    assert built.counted["state_bytes"] > 0
    if phase == "train_step":
        assert built.counted["train_flops"] == 3 * built.counted["forward_flops"]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_filled_state_decodes_as_one_that_was_read(arch):
    """Decode at a position is timed from a made-up state: it must be what prefill returns."""
    asked = case(arch=arch, level="model", phase="decode", seq_len=None, position=9)
    model = workload.build_model(asked, max_len=10)
    with torch.no_grad():
        _, real = model.prefill(torch.zeros(1, 9, dtype=torch.long), 10)
    made = workload.filled(model.init_state(1, 10), 9, torch.Generator())

    def form(state):
        if isinstance(state, torch.Tensor):
            return state.shape, state.dtype
        if isinstance(state, tuple):
            return type(state), [form(part) for part in state]
        return state

    assert form(made) == form(real)


def test_hybrids_have_no_op_but_decode(tmp_path):
    cells = [
        case(arch="mamba2*2+transformer"),
        case(arch="mamba2*2+transformer", level="model", phase="prefill"),
    ]
    table = cost.run(cells, tmp_path)
    assert dict(zip(table["level"], table["status"], strict=True)) == {
        "op": "unsupported",
        "model": "ok",
    }


def test_tables_show_every_architecture_and_exponent(swept):
    from rich.console import Console

    _, _, cells = swept
    console = Console(width=140, record=True, file=io.StringIO())
    for table in report.tables(cells):
        console.print(table)
    text = console.export_text()
    for arch in ARCHS:
        assert text.count(arch) == 4
    first = cells[(cells["level"] == "op") & (cells["arch"] == "mamba2")]["time_ms_p50"].tolist()
    assert f"{math.log2(first[1] / first[0]):.2f}" in text
    assert "bits a byte" in text


def test_tables_show_where_a_curve_ends(swept):
    from rich.console import Console

    _, _, cells = swept
    cells = cells.copy()
    victim = (cells["level"] == "op") & (cells["arch"] == "hyena") & (cells["seq_len"] == 128)
    assert victim.sum() == 1
    cells.loc[victim, "status"] = "oom"
    cells.loc[victim, ["time_ms_p50", "peak_bytes", "state_bytes"]] = math.nan
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.tables(cells)[0])
    assert "oom" in console.export_text()
