import importlib
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

import archs
from archs import mamba2
from archs.block import Block, BlockConfig, BlockOutput
from archs.ops import BackendUnavailableError
from harness import correctness, op_inputs, workload
from harness.correctness import ALLOWED_ERROR
from harness.record import Case

OPS = {
    "transformer": ("attention",),
    "mamba2": ("ssd", "ssd_step"),
    "rwkv7": ("wkv7", "wkv7_step"),
    "hyena": ("long_conv", "long_conv_step"),
}
PHASES = {
    "op": ("forward", "backward", "decode"),
    "block": ("forward", "backward", "train_step", "prefill", "decode"),
    "model": ("forward", "backward", "train_step", "prefill", "decode"),
}
CELLS = [(level, phase) for level, phases in PHASES.items() for phase in phases]
ABOVE_OP = [(level, phase) for level, phase in CELLS if level != "op"]
every_arch = pytest.mark.parametrize("arch", OPS)
RIGHT = ALLOWED_ERROR["float32"]


def case(arch, level, phase, tokens=24, **changes):
    place = {"seq_len": None, "position": tokens} if phase == "decode" else {"seq_len": tokens}
    asked = {"kind": "cost", "batch": 1, "size": "d64", **place, **changes}
    return Case(arch=arch, level=level, phase=phase, **asked)


def change_ops(monkeypatch, arch, change, names=None, dtype=torch.float32):
    """Replace an architecture's op, in its block and in the harness: `change(name, y)` in `dtype`.

    The reference, which runs in float64, stays as it is.
    """
    for name in names or OPS[arch]:
        for module in (importlib.import_module(f"archs.{arch}"), op_inputs):
            real = getattr(module, name)

            def call(*args, _real=real, _name=name, **kwargs):
                result = _real(*args, **kwargs)
                y, *rest = result if isinstance(result, tuple) else (result,)
                if y.dtype == dtype:
                    y = change(_name, y)
                return (y, *rest) if isinstance(result, tuple) else y

            monkeypatch.setattr(module, name, call)


def slightly_wrong(name, y):
    """Another channel's share of 0.1 %: a mere scale would vanish in a norm that follows."""
    return y + 1e-3 * y.roll(1, 1 if name.startswith("long_conv") else -1)


@every_arch
@pytest.mark.parametrize(("level", "phase"), CELLS)
def test_an_op_wrong_by_a_thousandth_is_found(arch, level, phase, monkeypatch):
    change_ops(monkeypatch, arch, slightly_wrong)
    assert workload.build(case(arch, level, phase)).check() > RIGHT


@every_arch
@pytest.mark.parametrize("level", ["op", "block", "model"])
def test_nan_never_passes(arch, level, monkeypatch):
    """Also far from what is folded, and in a backward pass."""
    for phase, tokens in (("forward", 400), ("backward", 400), ("train_step", 60), ("decode", 9)):
        if phase not in PHASES[level]:
            continue

        def poisoned(name, y):
            time = {"long_conv": -1, "long_conv_step": 0}.get(name, 0 if "step" in name else 1)
            middle = y.shape[time] // 2 + y.shape[time] // 4
            mask = torch.zeros_like(y)
            mask.narrow(time, middle, 1).fill_(torch.nan)
            return y * (1 + mask)

        with monkeypatch.context() as patch:
            change_ops(patch, arch, poisoned)
            error = workload.build(case(arch, level, phase, tokens)).check()
        assert math.isnan(error)
        assert not error <= RIGHT


@every_arch
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_an_error_that_only_shows_late_is_found(arch, phase, monkeypatch):
    def late(name, y):
        time = 2 if name == "long_conv" else 1
        wrong = torch.zeros_like(y)
        if y.shape[time] > 300:
            wrong.narrow(time, 300, y.shape[time] - 300).fill_(1e-3)
        return y + wrong * y.roll(1, 1 if name == "long_conv" else -1)

    assert workload.build(case(arch, "op", phase, 400)).check() <= RIGHT
    change_ops(monkeypatch, arch, late)
    assert workload.build(case(arch, "op", phase, 400)).check() > RIGHT


@every_arch
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_another_backend_is_compared_at_full_length(arch, phase, monkeypatch):
    """A kernel wrong in the middle alone, where nothing is folded."""
    name = OPS[arch][0]
    real = getattr(op_inputs, name)

    def op(*args, backend, **kwargs):
        result = real(*args, backend="torch" if backend == "triton" else backend, **kwargs)
        y = result[0] if isinstance(result, tuple) else result
        if backend == "triton" and broken:
            time = 2 if name == "long_conv" else 1
            factor = torch.ones_like(y)
            factor.narrow(time, 290, 20).fill_(1.01)
            y = y * factor
        return (y, result[1]) if isinstance(result, tuple) else y

    monkeypatch.setattr(op_inputs, name, op)
    for broken in (False, True):
        error = workload.build(case(arch, "op", phase, 400, backend="triton")).check()
        assert (error > RIGHT) == broken


@every_arch
def test_the_last_row_and_the_last_head_are_looked_at(arch, monkeypatch):
    def last(name, y):
        axis = 1 if name.endswith("_step") or name == "long_conv" else 2
        factor = torch.ones_like(y)
        factor[-1].narrow(axis - 1, y.shape[axis] - 1, 1).fill_(1.01)
        return y * factor

    change_ops(monkeypatch, arch, last)
    for phase in PHASES["op"]:
        assert workload.build(case(arch, "op", phase, batch=3, size="d192")).check() > RIGHT


def test_inputs_that_the_op_damages_are_found_by_the_second_check(monkeypatch):
    real = op_inputs.ssd

    def damaging(x, *args, **kwargs):
        result = real(x, *args, **kwargs)
        if x.dtype == torch.float32:
            x *= 1.01
        return result

    monkeypatch.setattr(op_inputs, "ssd", damaging)
    built = workload.build(case("mamba2", "op", "forward"))
    assert built.check() <= RIGHT
    assert built.check() > RIGHT


@pytest.mark.parametrize("level", ["op", "block", "model"])
@pytest.mark.parametrize("arch", ["mamba2", "rwkv7"])
def test_a_wrong_next_state_is_found(arch, level, monkeypatch):
    name = OPS[arch][1]
    for module in (importlib.import_module(f"archs.{arch}"), op_inputs):
        real = getattr(module, name)

        def step(*args, _real=real, **kwargs):
            y, state = _real(*args, **kwargs)
            return y, state if state.dtype == torch.float64 else 1.001 * state

        monkeypatch.setattr(module, name, step)
    assert workload.build(case(arch, level, "decode")).check() > RIGHT


@pytest.mark.parametrize("arch", ["transformer", "hyena"])
@pytest.mark.parametrize("level", ["block", "model"])
def test_a_wrong_slot_of_a_long_cache_is_found(arch, level, monkeypatch):
    from archs import hyena, transformer

    real_write, real_step = transformer.write_ring, hyena.long_conv_step
    kind = torch.float32

    def write_ring(cache, new, position, *, in_place):
        wrong = new * 1.001 if new.dtype == kind else new
        return real_write(cache, wrong, position, in_place=in_place)

    def long_conv_step(u, *args, **kwargs):
        y, z = real_step(u, *args, **kwargs)
        return y, z * 1.001 if u.dtype == kind else z

    monkeypatch.setattr(transformer, "write_ring", write_ring)
    monkeypatch.setattr(hyena, "long_conv_step", long_conv_step)
    built = workload.build(case(arch, level, "decode", 2000))
    assert built.check() > RIGHT
    assert built.check() > RIGHT


@every_arch
@pytest.mark.parametrize("level", ["block", "model"])
@pytest.mark.parametrize("tokens", [24, 100])
def test_a_prefill_whose_state_is_wrong_is_found(arch, level, tokens, monkeypatch):
    """The outputs are right: only the token after them shows it. Short and long prompts."""
    cls = archs.ARCHITECTURES[arch]
    real = cls.forward

    def forward(self, x, state=None, carry=None):
        output = real(self, x, state, carry)
        if state is None or x.dtype == torch.float64 or x.shape[1] == 1:
            return output
        parts = (1.01 * p if isinstance(p, torch.Tensor) else p for p in output.state)
        return output._replace(state=type(output.state)(*parts))

    assert workload.build(case(arch, level, "prefill", tokens)).check() <= RIGHT
    monkeypatch.setattr(cls, "forward", forward)
    assert workload.build(case(arch, level, "prefill", tokens)).check() > RIGHT


@every_arch
@pytest.mark.parametrize("level", ["block", "model"])
def test_a_prefill_wrong_at_length_only_is_found(arch, level, monkeypatch):
    change_ops(
        monkeypatch,
        arch,
        lambda name, y: slightly_wrong(name, y) if max(y.shape[1:3]) >= 100 else y,
        names=OPS[arch][:1],
    )
    monkeypatch.setattr(correctness, "PREFIX", 16)
    built = workload.build(case(arch, level, "prefill", 130, size="d64"))
    assert built.check() > RIGHT


@pytest.mark.parametrize("level", ["block", "model"])
def test_a_prefill_by_a_kernel_is_checked_without_a_step_of_its_own(level, monkeypatch):
    def no_step(*args):
        raise BackendUnavailableError("no step")

    monkeypatch.setattr(mamba2, "ssd_step_triton", no_step)
    for name in ("ssd", "short_conv"):
        real = getattr(mamba2, name)

        def op(*args, backend, _real=real, **kwargs):
            return _real(*args, backend="torch" if backend == "triton" else backend, **kwargs)

        monkeypatch.setattr(mamba2, name, op)
    built = workload.build(case("mamba2", level, "prefill", 60, backend="triton"))
    for _ in range(2):
        assert 0 < built.check() <= RIGHT


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled"
)


@interpreted
@pytest.mark.parametrize(("arch", "size"), [("mamba2", "d64"), ("rwkv7", "d64"), ("hyena", "d16")])
@pytest.mark.parametrize(("level", "phase"), CELLS)
def test_kernels_in_the_interpreter_are_right_before_and_after(arch, size, level, phase):
    built = workload.build(case(arch, level, phase, 33, size=size, backend="triton"))
    assert 0 < built.check() <= RIGHT
    built.function()
    assert 0 < built.check() <= RIGHT


@interpreted
@pytest.mark.parametrize(("level", "phase"), CELLS)
def test_a_kernel_wrong_by_a_thousandth_is_found(level, phase, monkeypatch):
    kernels = importlib.import_module("archs.ops.ssd_kernel")
    for name in ("ssd_op", "ssd_step_op"):
        real = getattr(kernels, name)

        def wrong(*args, _real=real):
            y, *rest = _real(*args)
            return slightly_wrong("ssd", y), *rest

        monkeypatch.setattr(kernels, name, wrong)
    built = workload.build(case("mamba2", level, phase, 33, size="d32", backend="triton"))
    assert built.check() > RIGHT


class PlugState(NamedTuple):
    sums: torch.Tensor  # (B, D)
    position: int


class PlugBlock(Block):
    """A third party's: a leaky sum, whose state a step writes in place."""

    Config = BlockConfig
    forward_factor = 1.0
    step_factor = 1.0

    def __init__(self, config, **place):
        super().__init__(config, **place)
        self.config = config
        self.inward = nn.Linear(config.width, config.width)
        self.outward = nn.Linear(config.width, config.width)

    def forward(self, x, state=None, carry=None):
        sums = x.new_zeros(x[:, 0].shape) if state is None else state.sums
        ys = []
        for u in self.inward(x).unbind(1):
            sums = 0.5 * sums + u
            ys.append(sums)
        y = x + self.factor(x, self.forward_factor) * self.outward(torch.stack(ys, 1))
        if state is None:
            return BlockOutput(y, None, carry)
        return BlockOutput(y, PlugState(sums, state.position + x.shape[1]), carry)

    def step(self, x, state, carry=None):
        update = self.inward(x)
        if torch.is_grad_enabled():
            sums = 0.5 * state.sums + update
        else:
            sums = state.sums.mul_(0.5).add_(update)
        y = x + self.factor(x, self.step_factor) * self.outward(sums)
        return BlockOutput(y, PlugState(sums, state.position + 1), carry)

    def factor(self, x, factor):
        return 1.0 if x.dtype == torch.float64 else factor

    def init_state(self, batch, max_len, *, device, dtype):
        return PlugState(torch.zeros(batch, self.config.width, device=device, dtype=dtype), 0)

    def mixer_flops(self, new_tokens, context=0):
        return 2 * new_tokens * self.config.width

    def final_norm(self):
        return nn.LayerNorm(self.config.width)


@pytest.fixture
def plugged_in(monkeypatch):
    monkeypatch.setitem(archs.ARCHITECTURES, "plug", PlugBlock)


@pytest.mark.parametrize(("level", "phase"), ABOVE_OP)
def test_a_plug_in_is_checked_like_ours(level, phase, plugged_in, monkeypatch):
    built = workload.build(case("plug", level, phase))
    for _ in range(2):  # its decode consumes the state that it is given
        assert 0 < built.check() <= RIGHT
        built.function()
    # 0.15 %: its residual stream carries part of the output past the mixer.
    name = "step_factor" if phase == "decode" else "forward_factor"
    monkeypatch.setattr(PlugBlock, name, 1.0015)
    assert workload.build(case("plug", level, phase)).check() > RIGHT


def test_a_plug_in_has_no_op(plugged_in):
    with pytest.raises(NotImplementedError, match="no op of its own"):
        workload.build(case("plug", "op", "forward"))


def test_relative_errors():
    one, nan = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, torch.nan])
    assert correctness.relative_error(1.5 * one, one) == 0.5
    assert correctness.relative_error(0 * one, 0 * one) == 0
    assert correctness.relative_error(one, 0 * one) == math.inf
    assert math.isnan(correctness.relative_error(nan, one))
    assert math.isnan(correctness.relative_error(one, nan))
    assert math.isnan(correctness.relative_error(one * math.inf, one))
    with pytest.raises(ValueError, match="shape"):
        correctness.relative_error(one, one[:1])
    for errors in ([1.0, math.nan], [math.nan, 1.0], [math.nan]):
        assert math.isnan(correctness.worst(errors))
    assert correctness.worst([0.0, 2.0, 1.0]) == 2
