import importlib
import math
from pathlib import Path

import pytest
import torch

import archs
from archs import hyena, mamba2, rwkv7, transformer
from archs.block import tensor_bytes
from harness import op_inputs, workload
from harness.correctness import ALLOWED_ERROR
from harness.record import Case
from harness.sizes import Shape

ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")
PHASES = {
    "op": ("forward", "backward", "decode"),
    "block": ("forward", "backward", "train_step", "prefill", "decode"),
    "model": ("forward", "backward", "train_step", "prefill", "decode"),
}
CELLS = [(level, phase) for level, phases in PHASES.items() for phase in phases]
DTYPES = ("float32", "float64", "bfloat16")
T, B = 12, 2
ROOT = Path(__file__).parents[2]


def case(arch, level, phase, **changes):
    place = {"seq_len": None, "position": T} if phase == "decode" else {"seq_len": T}
    asked = {"kind": "cost", "batch": B, "size": "d64", **place, **changes}
    return Case(arch=arch, level=level, phase=phase, **asked)


every_arch = pytest.mark.parametrize("arch", ARCHS)
every_cell = pytest.mark.parametrize(("level", "phase"), CELLS)


@every_arch
@every_cell
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cell_runs_and_is_right_before_and_after(arch, level, phase, dtype):
    built = workload.build(case(arch, level, phase, dtype=dtype))
    before = built.check()
    built.function()
    after = built.check()
    assert before <= ALLOWED_ERROR[dtype]
    assert after <= ALLOWED_ERROR[dtype]
    if dtype != "float64":
        assert before > 0  # a check that compares nothing returns 0


@every_arch
@every_cell
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_backend_is_right_too(arch, level, phase, dtype):
    length = None if phase == "decode" else 4
    asked = case(arch, level, phase, dtype=dtype, backend="reference", seq_len=length)
    assert workload.build(asked).check() <= ALLOWED_ERROR[dtype]


@every_arch
@every_cell
def test_every_cell_counts(arch, level, phase):
    counted = workload.build(case(arch, level, phase)).counted
    assert all(isinstance(n, int) and n > 0 for n in counted.values())
    flops = counted["mixer_flops" if level == "op" else "forward_flops"]
    times = {"backward": 2, "train_step": 3}.get(phase, 1)
    # Hyena's op forms the spectra of its filters, which a block counts as shared by its rows.
    assert counted["work_flops"] >= times * flops
    if arch != "hyena" or level != "op":
        assert counted["work_flops"] == times * flops
    assert ("params" in counted) == (level != "op")
    assert ("train_flops" in counted) == (phase == "train_step")
    assert ("decode_bytes" in counted) == (phase == "decode" and level != "op")
    assert counted["state_bytes"] > 0


def test_floors_of_an_op_are_its_tensors():
    shape = (B, T, 1, 64)
    y = 4 * math.prod(shape)
    floor = {
        phase: workload.build(case("transformer", "op", phase)).counted["floor_bytes"]
        for phase in PHASES["op"]
    }
    assert floor["forward"] == 3 * y + y
    assert floor["backward"] == 2 * 3 * y + y
    assert floor["decode"] == 4 * B * 64 * (1 + 2 * (T + 1))


def test_floors_of_a_block_and_a_model():
    def floor(level, phase):
        return workload.build(case("mamba2", level, phase)).counted

    x = 4 * B * T * 64
    counted = floor("block", "forward")
    weights = 4 * counted["params"]
    assert counted["floor_bytes"] == weights + 2 * x
    assert floor("block", "backward")["floor_bytes"] == 2 * weights + 3 * x
    assert floor("block", "train_step")["floor_bytes"] == 6 * weights + 2 * x
    prefill = floor("block", "prefill")
    assert prefill["floor_bytes"] == weights + 2 * x + prefill["state_bytes"]
    decode = floor("block", "decode")
    assert decode["floor_bytes"] == decode["decode_bytes"]
    tokens, logits = 8 * B * T, 4 * B * T * 256
    counted = floor("model", "forward")
    assert counted["floor_bytes"] == 4 * counted["params"] + tokens + logits
    counted = floor("model", "prefill")
    state = counted["state_bytes"]
    assert counted["floor_bytes"] == 4 * counted["params"] + tokens + logits // T + state


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    return [t for part in result for t in flat(part)] if isinstance(result, tuple) else []


@every_arch
@every_cell
def test_the_same_case_is_the_same_work(arch, level, phase):
    """Seeded, and called again: nothing accumulates, nothing is left in the gradients."""
    asked = case(arch, level, phase)
    one, two = workload.build(asked), workload.build(asked)
    first = [t.clone() for t in flat(one.function())]
    for other in (two.function(), one.function()):
        if phase != "train_step":
            assert len(first) == len(flat(other)) > 0
            for a, b in zip(first, flat(other), strict=True):
                torch.testing.assert_close(a, b)


@every_arch
@pytest.mark.parametrize("level", ["block", "model"])
def test_a_training_step_moves_parameters_and_keeps_no_gradient(arch, level, monkeypatch):
    made = []
    real = workload._train_step
    monkeypatch.setattr(
        workload, "_train_step", lambda subject: made.append(subject) or real(subject)
    )
    built = workload.build(case(arch, level, "train_step"))
    (subject,) = made
    before = [p.detach().clone() for p in subject.parameters()]
    built.function()
    moved = [not torch.equal(a, b) for a, b in zip(before, subject.parameters(), strict=True)]
    assert all(moved)
    held = [p.detach().clone() for p in subject.parameters()]
    built.check()
    assert all(torch.equal(a, b) for a, b in zip(held, subject.parameters(), strict=True))
    assert all(p.grad is None for p in subject.parameters())
    assert subject.inputs.grad is None


@every_arch
def test_training_in_float16_stays_finite(arch):
    built = workload.build(case(arch, "block", "train_step", dtype="float16"))
    for _ in range(20):
        built.function()
    assert built.check() <= ALLOWED_ERROR["float16"]


@every_arch
def test_backward_runs_only_the_backward_pass(arch, monkeypatch):
    """The forward pass lies outside the timed call, whose graph stays."""
    built = workload.build(case(arch, "block", "backward"))
    calls = []
    for cls in archs.ARCHITECTURES.values():
        forward = cls.forward
        monkeypatch.setattr(
            cls, "forward", lambda *a, _f=forward, **k: calls.append(1) or _f(*a, **k)
        )
    built.function()
    built.function()
    assert calls == []


def test_forward_records_no_graph():
    for level in PHASES:
        y = workload.build(case("mamba2", level, "forward")).function()
        assert not y.requires_grad


@every_arch
def test_a_filled_state_decodes_as_one_that_was_read(arch):
    """Decode at a position is timed from a made-up state: it must be what prefill returns."""
    asked = case(arch, "model", "decode", batch=1, position=9)
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


@every_arch
def test_an_op_is_fed_what_its_block_feeds_it(arch, monkeypatch):
    """Shapes, types and optional arguments of forward and step are those of the block's own call.

    In bfloat16, where decays and filters have a type of their own.
    """
    home = importlib.import_module(f"archs.{arch}")
    names = {
        "transformer": ("attention", "attention"),
        "mamba2": ("ssd", "ssd_step"),
        "rwkv7": ("wkv7", "wkv7_step"),
        "hyena": ("long_conv", "long_conv_step"),
    }[arch]
    for phase, name in zip(("forward", "decode"), names, strict=True):
        fed = []
        for level, module in (("block", home), ("op", op_inputs)):
            with monkeypatch.context() as patch:
                calls = []
                patch.setattr(module, name, recording(getattr(module, name), calls))
                workload.build(case(arch, level, phase, dtype="bfloat16")).function()
            fed.append(calls)
        block, op = fed
        assert op == block


def recording(function, calls):
    def call(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        calls.append(sorted((tuple(x.shape), str(x.dtype)) for x in tensors))
        return function(*args, **kwargs)

    return call


def test_a_cell_that_does_not_exist_says_so():
    hybrid = "mamba2*2+transformer"
    for asked, words in (
        (case(hybrid, "op", "forward"), "no op of its own"),
        (case(hybrid, "block", "forward"), "hybrid"),
        (case("mamba2", "op", "prefill"), "no phase 'prefill'"),
        (case("mamba2", "op", "forward", implementation="mamba_ssm"), "mamba_ssm"),
    ):
        with pytest.raises(NotImplementedError, match=words) as error:
            workload.build(asked)
        assert "\n" not in str(error.value)
    assert workload.build(case(hybrid, "model", "prefill")).check() <= ALLOWED_ERROR["float32"]


@every_cell
def test_lazy_decoding_is_timed_elsewhere(level, phase, monkeypatch):
    monkeypatch.setattr(workload, "shape_of", lambda arch, size: Shape(64, 2, {"decode": "lazy"}))
    asked = case("hyena", level, phase)
    if phase != "decode":
        assert workload.build(asked).check() <= ALLOWED_ERROR["float32"]
        return
    with pytest.raises(NotImplementedError, match=r"tests/benchmarks/decode_modes\.py") as error:
        workload.build(asked)
    assert "\n" not in str(error.value)
    assert (ROOT / "tests/benchmarks/decode_modes.py").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled")
@pytest.mark.parametrize(
    ("arch", "block_module", "step"),
    [
        ("transformer", transformer, "attention"),
        ("mamba2", mamba2, "ssd_step_triton"),
        ("rwkv7", rwkv7, "wkv7_step_triton"),
        ("hyena", hyena, "long_conv_step_triton"),
    ],
)
def test_the_step_of_a_kernel_is_fed_what_its_block_feeds_it(arch, block_module, step, monkeypatch):
    fed = []
    for level, module in (("block", block_module), ("op", op_inputs)):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(module, step, recording(getattr(module, step), calls))
            asked = case(arch, level, "decode", dtype="float16", backend="triton")
            workload.build(asked).function()
        fed.append(calls)
    block, op = fed
    assert op == block
    assert len(op) == 1


@pytest.mark.parametrize("fields", [{"window": 7, "kv_heads": 1}, {"kv_heads": 2}])
@pytest.mark.parametrize("phase", PHASES["op"])
def test_windows_and_grouped_queries(phase, fields, monkeypatch):
    shape = Shape(64, 2, {"head_dim": 16, **fields})
    monkeypatch.setattr(workload, "shape_of", lambda arch, size: shape)
    length = None if phase == "decode" else 300
    built = workload.build(case("transformer", "op", phase, seq_len=length))
    assert 0 < built.check() <= ALLOWED_ERROR["float32"]


@pytest.mark.parametrize("phase", PHASES["op"])
def test_groups_of_b_and_c(phase, monkeypatch):
    shape = Shape(64, 2, {"groups": 2, "head_dim": 16, "d_state": 16})
    monkeypatch.setattr(workload, "shape_of", lambda arch, size: shape)
    length = None if phase == "decode" else 300
    built = workload.build(case("mamba2", "op", phase, seq_len=length))
    assert 0 < built.check() <= ALLOWED_ERROR["float32"]


def test_everything_lies_on_the_device_asked_for():
    """On the meta device nothing has values: what lies elsewhere or is read back raises."""
    for arch in ARCHS:
        for level, phase in CELLS:
            if phase in ("forward", "prefill"):
                built = build_on_meta(case(arch, level, phase))
                for t in flat(built.function()):
                    assert t.device.type == "meta"


def build_on_meta(asked):
    real = torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", lambda device="cpu": real())
        return workload.build(asked, "meta")


def test_state_bytes_are_those_of_the_state():
    built = workload.build(case("transformer", "block", "prefill"))
    assert tensor_bytes(built.function()[1]) == built.counted["state_bytes"] * (T + 1) // T
