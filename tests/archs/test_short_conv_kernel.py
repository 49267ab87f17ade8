"""The Triton kernels against the fold in float64, in the interpreter where there is no GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archs.block import tensor_bytes
from archs.ops import BackendUnavailableError
from archs.ops.short_conv import short_conv, short_conv_step
from harness import traffic
from kernel_checks import (
    DEVICE,
    LENGTHS,
    assert_as_exact,
    assert_same,
    guarded_allocations,
    in_margins,
    interpreted,
    on_a_gpu,
    randn,
    relative_rms,
)

pytest.importorskip("triton")
from archs.ops import short_conv_kernel as kernels

# bias, state, activation
VARIANTS = (
    (True, True, "silu"),
    (False, False, None),
    (True, False, None),
    (False, True, "silu"),
)
RUN = kernels.FORWARD["STEPS"]  # tokens that a lane of a forward program takes


def inputs(B, T, D, W, dtype=torch.float32, bias=True, state=True):
    return {
        "x": randn(B, T, D, dtype=dtype),
        "weight": randn(D, W, dtype=dtype),
        "bias": randn(D, dtype=dtype) if bias else None,
        "state": randn(B, D, W - 1, dtype=dtype) if state else None,
    }


def results(args, backend, activation="silu", seed_type=None, gradients=True):
    """y, the state after and, from random gradients of these, every gradient, by name."""
    leaves = {k: None if x is None else x.detach().requires_grad_() for k, x in args.items()}
    y, end = short_conv(**leaves, activation=activation, backend=backend)
    outputs = {k: out for k, out in (("y", y), ("end", end)) if out is not None}
    named = {k: out.detach() for k, out in outputs.items()}
    if gradients:
        seed_type = seed_type or y.dtype
        seeds = [randn(*o.shape, dtype=seed_type, seed=1).to(y.dtype) for o in outputs.values()]
        given = {f"d{k}": x for k, x in leaves.items() if x is not None}
        found = torch.autograd.grad(list(outputs.values()), list(given.values()), seeds)
        named |= dict(zip(given, found, strict=True))
    return named


def exact_results(args, activation="silu", gradients=True):
    wide = {k: None if x is None else x.double() for k, x in args.items()}
    return results(wide, "reference", activation, args["x"].dtype, gradients)


def check(args, activation="silu", gradients=True):
    got = results(args, "triton", activation, gradients=gradients)
    plain = results(args, "torch", activation, gradients=gradients)
    exact = exact_results(args, activation, gradients=gradients)
    assert got.keys() == exact.keys()
    for name in exact:
        factor = 2 if name in ("y", "end") else 3
        assert_as_exact(got[name], plain[name], exact[name], factor, name)


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("T", LENGTHS)
def test_every_length(T, W):
    bias, state, activation = VARIANTS[(LENGTHS.index(T) + W) % len(VARIANTS)]
    check(inputs(1, T, 5 + W, W, bias=bias, state=state), activation)


@pytest.mark.parametrize("T", [1, 17])
@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize(("bias", "state", "activation"), VARIANTS)
def test_every_option(T, W, bias, state, activation):
    check(inputs(2, T, 6, W, bias=bias, state=state), activation)


@pytest.mark.parametrize("T", [3, 65])
@pytest.mark.parametrize("W", [2, 4])
def test_float16(T, W):
    check(inputs(2, T, 7, W, torch.float16))
    check(inputs(1, T, 4, W, torch.float16, bias=False, state=False), None)


@pytest.mark.parametrize("D", [1, 257, 300])
def test_every_width(D):
    check(inputs(2, 3, D, 4))


@given(
    B=st.integers(1, 2),
    T=st.integers(1, 4),
    D=st.integers(1, 9),
    W=st.integers(2, 4),
    bias=st.booleans(),
    state=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    gradients=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_shape(B, T, D, W, bias, state, activation, gradients):
    check(inputs(B, T, D, W, bias=bias, state=state), activation, gradients)


@pytest.mark.parametrize("state", [True, False])
def test_parameters_of_another_type(state):
    args = inputs(2, 5, 6, 3, torch.float16, state=state)
    args |= {"weight": args["weight"].float(), "bias": args["bias"].float()}
    check(args)


def strided(args):
    """The same values as a slice of wider rows, transposed, every other one and permuted."""
    x, weight, bias, state = args.values()
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2] + 3)
    wide[:, :, 3 : 3 + x.shape[2]] = x
    return {
        "x": wide[:, :, 3 : 3 + x.shape[2]],
        "weight": weight.t().contiguous().t(),
        "bias": bias.repeat_interleave(2)[::2],
        "state": state.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }


def test_non_contiguous_inputs():
    args = inputs(2, 37, 6, 4)
    others = strided(args)
    assert not any(x.is_contiguous() for x in others.values())
    expected = results(args, "triton")
    assert_same(results(others, "triton"), expected)
    # Channels apart, which the kernels do not read as they lie.
    others["x"] = args["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(results(others, "triton"), expected)


def test_non_contiguous_gradients():
    args = inputs(2, 9, 6, 4)
    x = args.pop("x").requires_grad_()
    y, end = short_conv(x, **args, backend="triton")
    rows = randn(2, 6, 9).transpose(1, 2)
    states = randn(2, 3, 6).transpose(1, 2)
    (expected,) = torch.autograd.grad(
        (y, end), x, (rows.contiguous(), states.contiguous()), retain_graph=True
    )
    (got,) = torch.autograd.grad((y, end), x, (rows, states), retain_graph=True)
    assert torch.equal(got, expected)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (got,) = torch.autograd.grad(y.sum(), x)  # an expanded scalar
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "D", "W"), [(1, 5, 4), (2, 257, 3), (70, 3, 4)])
def test_memory_beside_tensors_is_neither_read_nor_written(T, D, W, dtype):
    args = inputs(2, T, D, W, dtype)
    found = []
    for some in (args, strided(args)):
        with guarded_allocations():
            found.append(results({k: in_margins(x) for k, x in some.items()}, "triton"))
    expected = results(args, "triton")
    for got in found:
        assert_same(got, expected)


def test_steps_do_not_touch_memory_beside_tensors():
    args = inputs(3, 1, 257, 4)
    x, weight, bias, state = ({k: in_margins(v) for k, v in args.items()}).values()
    with guarded_allocations():
        y, end = kernels.short_conv_step_triton(x[:, 0], weight, bias, state, "silu")
    assert y.isfinite().all()
    assert end.isfinite().all()


@interpreted
@pytest.mark.parametrize(("T", "D", "W"), [(1, 5, 4), (2, 257, 3), (70, 3, 2)])
def test_every_access_is_inside_the_arguments(T, D, W):
    """Reads too, also those whose values go nowhere: counting any other raises."""
    args = inputs(2, T, D, W)
    _, counts = traffic.count(lambda: results(args, "triton"))
    names = {f"short_conv_{name}_kernel" for name in ("forward", "backward", "total")}
    assert set(counts.kernels) == names
    x, weight, bias, state = args.values()
    _, counts = traffic.count(
        lambda: kernels.short_conv_step_triton(x[:, 0], weight, bias, state, "silu")
    )
    assert set(counts.kernels) == {"short_conv_step_kernel"}


@interpreted
def test_bytes_are_moved_once():
    args = {k: x.requires_grad_() for k, x in inputs(1, 300, 256, 4, torch.float16).items()}
    (y, end), forward = traffic.count(
        lambda: short_conv(**args, activation="silu", backend="triton")
    )
    seeds = [torch.ones_like(out) for out in (y, end)]
    leaves = list(args.values())
    _, backward = traffic.count(lambda: torch.autograd.grad((y, end), leaves, seeds))
    read, written = tensor_bytes(leaves), tensor_bytes([y, end])
    assert (forward.launches, forward.operation_calls) == (1, 0)
    assert forward.unique_bytes == read + written
    assert (backward.launches, backward.operation_calls) == (2, 0)
    assert backward.unique_bytes <= 1.15 * (2 * read + written)
    accesses = forward.kernels["short_conv_forward_kernel"].arguments
    accesses |= backward.kernels["short_conv_backward_kernel"].arguments
    for name in ("x", "y", "dy", "dx"):
        assert accesses[name].sector_bytes <= 1.1 * accesses[name].requested_bytes


@pytest.mark.parametrize(
    "what", ["equal tokens", "large inputs", "saturated", "large taps", "zeros"]
)
def test_adversarial_inputs(what):
    args = inputs(2, 40, 5, 4)
    activation = "silu"
    if what == "equal tokens":
        args["x"][:] = args["x"][:1, :1, :1]
        args["state"][:] = args["x"][0, 0, 0]
    elif what == "large inputs":  # their sums may cancel, and an activation would show it
        args["x"] = 1e4 * args["x"].sign()
        args["state"] = -1e4 * args["state"].sign()
        activation = None
    elif what == "saturated":  # at both ends of the activation
        args["weight"] = args["weight"].abs()
        args["x"] = 1e4 * args["x"][:, :1].sign().expand_as(args["x"])
        args["state"] = args["x"][:, :3].transpose(1, 2)
    elif what == "large taps":
        args["weight"] *= 1e4
    else:
        args = {k: torch.zeros_like(x) for k, x in args.items()}
    check(args, activation)


def test_every_split_hands_the_state_over():
    T = RUN + 3
    args = inputs(1, T, 3, 4)
    x, state = args.pop("x"), args.pop("state")
    options = {**args, "activation": "silu", "backend": "triton"}
    y, end = short_conv(x, state=state, **options)
    for split in range(1, T):
        head, middle = short_conv(x[:, :split], state=state, **options)
        tail, last = short_conv(x[:, split:], state=middle, **options)
        assert torch.equal(torch.cat([head, tail], 1), y)
        assert torch.equal(last, end)


@pytest.mark.parametrize("split", [1, 2, 6])
def test_gradients_pass_through_a_state_handed_over(split):
    args = inputs(2, 7, 5, 4)
    exact = exact_results(args)
    leaves = {k: x.clone().requires_grad_() for k, x in args.items()}
    x, state, (weight, bias) = leaves["x"], leaves["state"], (leaves["weight"], leaves["bias"])
    options = {"activation": "silu", "backend": "triton"}
    head, middle = short_conv(x[:, :split], weight, bias, state, **options)
    tail, end = short_conv(x[:, split:], weight, bias, middle, **options)
    outputs = torch.cat([head, tail], 1), end
    seeds = [randn(*out.shape, seed=1) for out in outputs]
    got = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    for name, gradient in zip(leaves, got, strict=True):
        assert relative_rms(gradient, exact[f"d{name}"]) < 1e-6, name


def test_a_gradient_of_the_state_alone():
    args = {k: x.requires_grad_() for k, x in inputs(2, 2, 5, 4).items()}
    _, end = short_conv(**args, activation="silu", backend="triton")
    seed = randn(*end.shape, seed=1)
    dx, dweight, dbias, dstate = torch.autograd.grad(end, list(args.values()), seed)
    assert torch.equal(dx, seed[:, :, 1:].transpose(1, 2))
    assert not dweight.any()
    assert not dbias.any()
    assert torch.equal(dstate[:, :, 2], seed[:, :, 0])  # the oldest token that is left
    assert not dstate[:, :, :2].any()


def test_batch_rows_do_not_touch():
    args = inputs(3, 70, 5, 4)
    order = [2, 0, 1]
    shuffled = {**args, "x": args["x"][order], "state": args["state"][order]}
    expected, got = results(args, "triton"), results(args | shuffled, "triton")
    assert torch.equal(got["y"], expected["y"][order])
    assert torch.equal(got["end"], expected["end"][order])
    alone = {**args, "x": args["x"][1:2], "state": args["state"][1:2]}
    assert torch.equal(results(alone, "triton")["y"], expected["y"][1:2])


@pytest.mark.parametrize("changed", [1, RUN, RUN + 5])
def test_the_future_changes_nothing(changed):
    args = inputs(2, 2 * RUN, 5, 4)
    y, _ = short_conv(**args, activation="silu", backend="triton")
    args["x"][:, changed:] = torch.nan
    z, end = short_conv(**args, activation="silu", backend="triton")
    assert torch.equal(z[:, :changed], y[:, :changed])
    assert z[:, changed:].isnan().all()
    assert end.isnan().all()


def test_repeats_give_the_same_bits():
    args = inputs(2, 9, 7, 4)
    expected = results(args, "triton")
    for _ in range(10):
        assert_same(results(args, "triton"), expected)


def test_what_is_passed_in_stays():
    args = inputs(2, 5, 6, 4)
    before = {k: x.clone() for k, x in args.items()}
    results(args, "triton")
    kernels.short_conv_step_triton(
        args["x"][:, 0], args["weight"], args["bias"], args["state"], "silu"
    )
    assert_same(args, before)


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize(("bias", "activation"), [(True, "silu"), (False, None)])
@pytest.mark.parametrize("D", [5, 260])
def test_a_step_is_the_definition(W, bias, activation, D):
    args = inputs(3, 2, D, W, bias=bias)
    args["x"] = args["x"][:, 1]  # (B, D), rows apart
    given = {k: x for k, x in args.items() if x is not None}

    def stepped(step, dtype):
        leaves = {k: x.detach().to(dtype).requires_grad_() for k, x in given.items()}
        outputs = step(*[leaves.get(k) for k in args], activation)
        seeds = [randn(*out.shape, seed=1).to(dtype) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), seeds)]

    got = stepped(kernels.short_conv_step_triton, torch.float32)
    plain = stepped(short_conv_step, torch.float32)
    exact = stepped(short_conv_step, torch.float64)
    for index, values in enumerate(zip(got, plain, exact, strict=True)):
        assert_as_exact(*values, 2 if index < 2 else 3, str(index))


def test_steps_equal_the_sequence():
    args = inputs(2, 6, 5, 4)
    y, end = short_conv(**args, activation="silu", backend="triton")
    x, weight, bias, state = args.values()
    for t in range(6):
        y_t, state = kernels.short_conv_step_triton(x[:, t], weight, bias, state, "silu")
        assert torch.equal(y_t, y[:, t])
    assert torch.equal(state, end)


@interpreted
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        short_conv(**inputs(1, 2, 3, 4, torch.bfloat16), backend="triton")


def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match="has no kernels in float64"):
        short_conv(**inputs(1, 2, 3, 4, torch.float64), backend="triton")


@pytest.mark.parametrize("every", [True, False])
def test_operations_keep_pytorchs_rules(every):
    args = inputs(2, 5, 6, 4, bias=every, state=every)
    x, weight, bias, state = (None if a is None else a.requires_grad_() for a in args.values())
    ops = torch.ops.seqscale
    torch.library.opcheck(ops.short_conv.default, (x, weight, bias, state, True))
    plain = [None if a is None else a.detach() for a in (x, weight, bias, state)]
    dend = randn(2, 6, 3) if every else None
    gradients = (*plain, randn(2, 5, 6, seed=1), dend, True)
    torch.library.opcheck(ops.short_conv_backward.default, gradients)
    if every:
        torch.library.opcheck(ops.short_conv_step.default, (x[:, 0], weight, bias, state, True))


def test_torch_compile_needs_no_graph_break():
    def function(x, weight, bias, state):
        y, end = short_conv(2 * x, weight, bias, state, activation="silu", backend="triton")
        return 3 * y, end

    args = inputs(2, 5, 6, 4)

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in args.values()]
        outputs = function(*leaves)
        seeds = [randn(*out.shape, seed=1) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled), gradients(function), strict=True):
        assert torch.equal(got, expected)


def test_flops_are_counted():
    x, weight, bias, state = inputs(2, 5, 6, 4).values()
    with FlopCounterMode(display=False) as counter:
        y, _ = short_conv(x.requires_grad_(), weight, bias, state, backend="triton")
        assert counter.get_total_flops() == 2 * 4 * y.numel()
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * y.numel()


COMPILE = """
import json, torch
from archs.ops.short_conv import short_conv
from archs.ops.short_conv_kernel import short_conv_step_triton
from harness import compiled, pretend

def call(dtype, D, W, every, activation):
    x, weight, bias, state = (torch.zeros(shape, dtype=dtype, requires_grad=True)
        for shape in ((1, 9, D), (D, W), (D,), (1, D, W - 1)))
    bias, state = (bias, state) if every else (None, None)
    outputs = short_conv(x, weight, bias, state, activation=activation, backend="triton")
    sum(out.sum() for out in outputs if out is not None).backward()
    if every:
        short_conv_step_triton(x[:, 0], weight, bias, state, activation)

def rows(arch):
    with pretend.gpu(arch):
        return (compiled.compile_launches(lambda: call(torch.bfloat16, 768, 4, True, "silu"), arch)
            + compiled.compile_launches(lambda: call(torch.float32, 5, 2, False, None), arch))

print(json.dumps([[row.kernel, row.spills] for row in rows(90)]))
"""


def test_kernels_compile_without_spills():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 4 + 3
    assert all(spills == 0 for _, spills in rows), rows


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("T", [1, 65, 1025])
def test_on_a_gpu(T, dtype):
    for D in (768, 301):
        args = inputs(3, T, D, 4, dtype)
        check(args)
        expected = results(args, "triton")
        for _ in range(50):
            assert_same(results(args, "triton"), expected)


@on_a_gpu
@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    T, D = 2**20 + 9, 2048
    x = torch.randn(1, T, D, device=DEVICE, dtype=torch.bfloat16)
    weight = randn(D, 4, dtype=torch.bfloat16)
    y, _ = short_conv(x, weight, activation="silu", backend="triton")
    expected, _ = short_conv(x[:, -12:], weight, activation="silu", backend="torch")
    assert relative_rms(y[:, -9:], expected[:, -9:].double()) < 4e-3
