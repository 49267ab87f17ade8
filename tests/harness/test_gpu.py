"""What needs an NVIDIA GPU: cells of every kind there, checked, timed and recorded."""

import pytest
import torch

from archs.ops.ssd import plan
from harness import cost, record, sweep, trials
from harness.correctness import ALLOWED_ERROR
from harness.record import Case
from harness.workload import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("level", "phase"), [(level, phase) for level in sweep.PHASES for phase in sweep.PHASES[level]]
)
@pytest.mark.parametrize(
    ("arch", "backend"),
    [
        *((arch, "torch") for arch in ARCHS),
        *((arch, "triton") for arch in ARCHS),
    ],
)
def test_every_cell_is_right_on_the_gpu(arch, backend, level, phase, dtype):
    decode = phase == "decode"
    workload = build(
        Case(
            kind="cost",
            arch=arch,
            level=level,
            phase=phase,
            batch=2,
            seq_len=None if decode else 1000,
            position=1000 if decode else None,
            size="d128",
            dtype=dtype,
            backend=backend,
        ),
        "cuda",
    )
    assert workload.check() <= ALLOWED_ERROR[dtype]
    workload.function()
    assert workload.check() <= ALLOWED_ERROR[dtype]


def test_a_sweep_runs_on_the_gpu_by_default(tmp_path):
    grids = sweep.narrowed(sweep.preset("h100"), lengths=[1024], positions=[1024], size="d256")
    table = cost.run(grids, tmp_path)
    assert set(table["status"]) == {"ok"}, table[["arch", "level", "phase", "status", "reason"]]
    assert set(table["device"]) == {torch.cuda.get_device_name()}
    assert set(table["dtype"]) == {"bfloat16"}
    assert set(table["backend"]) == {"triton"}
    planned = {op for found in record.load(tmp_path)[0] for op in found.environment["plans"]}
    assert planned == set(sweep.OPERATIONS.values())  # our kernels ran in every architecture
    assert set(table["peak_source"]) == {"cuda allocator"}
    assert (table["roofline_fraction"] < 1.05).all()


def test_records_of_our_kernels_hold_their_plans(tmp_path):
    grids = [
        sweep.Grid(level=level, phase=phase, archs="mamba2", lengths=8192, backend="triton")
        for level, phase in (("op", "backward"), ("model", "prefill"))
    ]
    table = cost.run(grids, tmp_path, device="cuda")
    assert set(table["status"]) == {"ok"}, table["reason"]
    chosen = plan((1, 8192, 8, 64), "cuda")
    assert chosen.segments > 1
    for found in record.load(tmp_path)[0]:
        assert found.environment["plans"] == {"ssd": [chosen._asdict()]}


def test_training_runs_on_the_gpu(tmp_path):
    table = trials.run(trials.LOSS_PRESETS["demo"], tmp_path)
    assert set(table["status"]) == {"ok"}, table[["arch", "status", "reason"]]
    assert set(table["dtype"]) == {"bfloat16"}
    assert set(table["backend"]) == {"triton"}
    assert (table["val_loss_bits_per_byte"] < 4.5).all()


def test_memory_that_runs_out_on_the_gpu_is_oom(tmp_path):
    grid = sweep.Grid(level="block", phase="train_step", archs="mamba2", lengths=1 << 20, batch=64)
    (row,) = cost.run([grid], tmp_path).to_dict("records")
    assert row["status"] == "oom"
