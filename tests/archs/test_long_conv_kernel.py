"""The long convolution's Triton kernels against direct sums in float64; see `test_wkv7_kernel`."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archs.hyena import long_conv_flops
from archs.ops import BackendUnavailableError
from archs.ops import long_conv as op
from archs.ops.long_conv import (
    LongConvPlan,
    long_conv,
    long_conv_reference,
    long_conv_step,
    long_conv_step_triton,
)
from harness import traffic
from kernel_checks import (
    DEVICE,
    assert_as_exact,
    assert_same,
    guarded_allocations,
    in_margins,
    interpreted,
    on_a_gpu,
    randn,
    relative_max,
    relative_rms,
)
from long_conv_checks import (
    ACCURATE,
    FAST,
    FORMS,
    GATES,
    ONE_SIGN,
    ROUNDING,
    ROWS,
    SIGNALS,
    assert_exact,
    exact_results,
    far_apart,
    inputs,
    kernel_results,
    plain_results,
    results,
    strided,
    terms_of,
    turned,
)

pytest.importorskip("triton")
from archs.ops import long_conv_kernel as kernels

# Each side of lengths that transforms have, and such lengths, where no load needs a mask.
LENGTHS = (1, 2, 3, 17, 127, 128, 129, 256, 257, 1000, 1024, 1025, 2048, 3000, 4096)
# Relative RMS errors of "fast": of rows, and of the few sums over all rows' tokens.
FAST_LEAST, FAST_MOST, FAST_SUMS = 1.5e-4, 8e-4, 1.2e-3


@cache
def case(form, B, D, T):
    """Inputs, and their results in plain PyTorch and by the direct sums."""
    args = inputs(form, B, D, T)
    return args, plain_results(args), exact_results(args)


def check(args, plan=ACCURATE):
    assert_exact(kernel_results(args, plan), plain_results(args), exact_results(args))


def assert_rows_exact(args, plan=ACCURATE, tolerance=ROUNDING):
    """Every row of the results, relative to its own largest value."""
    got, exact = kernel_results(args, plan), exact_results(args)
    for name in exact:
        rows = (x.reshape(-1, x.shape[-1]) for x in (got[name], exact[name]))
        for i, (row, expected) in enumerate(zip(*rows, strict=True)):
            assert relative_max(row, expected) <= tolerance, (name, i)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2, 19])
def test_the_direct_sums_are_the_definition(form, T):
    args = inputs(form, 2, 3, T, spare=2)
    expected = exact_results(args, long_conv_reference)
    for name, got in exact_results(args).items():
        assert relative_max(got, expected[name]) < 1e-13, name


@pytest.mark.parametrize("T", LENGTHS)
def test_every_length(T):
    args, plain, exact = case("all", 2 + T % 2, 1, T)
    assert_exact(kernel_results(args), plain, exact)


@pytest.mark.parametrize("T", [100, 256])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, T):
    check(inputs(form, 2, 2, T))


@pytest.mark.parametrize("T", [17, 256, 1025, 4096])
def test_fast_is_as_exact_as_documented_and_no_more(T):
    args, _, exact = case("all", 2 + T % 2, 1, T)
    got = kernel_results(args, FAST)
    for name in (*ROWS, "dfilter"):
        error = relative_rms(got[name], exact[name])
        assert FAST_LEAST < error < FAST_MOST, (name, error)
    for name in ("dshort_filters", "dshort_bias"):
        error = relative_rms(got[name], exact[name], terms_of(name, exact))
        assert error < FAST_SUMS, (name, error)
    assert torch.equal(got["dskip"], got["dfilter"][:, 0])


@pytest.mark.parametrize("plan", [ACCURATE, FAST])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=on_a_gpu)])
@pytest.mark.parametrize("T", [17, 256])
def test_short_types_are_computed_in_float32(T, dtype, plan):
    args = inputs("all", 2, 2, T, dtype)
    got = kernel_results(args, plan)
    wide = kernel_results({k: x.float() for k, x in args.items()}, plan)
    assert_same(got, {k: x.to(dtype) for k, x in wide.items()})


def test_float16():
    check(inputs("all", 2, 2, 1025, torch.float16))


def test_parameters_of_another_type():
    args = inputs("all", 2, 2, 40, torch.float16)
    expected = kernel_results(args)
    signals = (*SIGNALS, "dy")
    got = kernel_results({k: x if k in signals else x.float() for k, x in args.items()})
    assert {k for k, x in got.items() if x.dtype == torch.float16} == set(ROWS)
    assert_same({k: x.half() for k, x in got.items()}, expected)


@given(
    form=st.sampled_from(sorted(FORMS)),
    rows=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 3)]),
    T=st.integers(1, 300),
    spare=st.integers(0, 2),
    splits=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_shape(form, rows, T, spare, splits, seed):
    check(inputs(form, *rows, T, spare=spare, seed=seed), LongConvPlan(splits))


@interpreted
@pytest.mark.parametrize(("splits", "programs"), [(2, 2), (3, 3), (4, 3), (9, 5)])
def test_splits_do_not_show(splits, programs):
    """Of 5 rows: 4 splits are two programs with 2 rows and one with the last, not a fourth."""
    args, _, _ = case("all", 5, 2, 20)
    expected = kernel_results(args)
    got, counts = traffic.count(lambda: kernel_results(args, LongConvPlan(splits)))
    assert [k.programs for k in counts.kernels.values()] == [2 * programs] * 2
    for name in got:
        if name in ROWS:
            assert torch.equal(got[name], expected[name]), name
        else:
            error = relative_max(got[name], expected[name].double(), terms_of(name, expected))
            assert error < ROUNDING, name


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *((name, factor) for name in ("u", "dy", "filter") for factor in (1e3, math.inf, math.nan)),
        *((name, math.nan) for name in GATES),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_rows_and_channels_do_not_touch(name, factor):
    """To the last bit, however large the values of one are."""
    B, D = 3, 2
    args, _, _ = case("all", B, D, 20)
    expected = kernel_results(args)
    changed = torch.zeros(B, D, 1, dtype=torch.bool, device=DEVICE)
    changed[1 if name != "filter" else slice(None), 1] = True
    place = changed if name != "filter" else changed[0]
    got = kernel_results(args | {name: torch.where(place, args[name] * factor, args[name])})
    rest = ~changed.squeeze(2)
    for k in got:
        if k in ROWS:
            assert torch.equal(got[k][rest], expected[k][rest]), k
        else:
            channel = (0,) if k in ("dfilter", "dskip") else (slice(None), 0)
            assert torch.equal(got[k][channel], expected[k][channel]), k
    assert any(not torch.equal(got[k], expected[k]) for k in ("y", "du"))


@pytest.mark.parametrize(
    "factors",
    [
        {"u": 1e-30},
        {"u": 1e30},
        {"filter": 1e-30, "skip": 1e-30},
        {"filter": 1e30, "skip": 1e30},
        {"u": 1e30, "filter": 1e-30, "skip": 1e-30},
        {"u": 0.0},
        {"filter": 0.0, "skip": 0.0},
        {"dy": 0.0},
        {"dy": 1e-30},
        {"dy": 1e30},
        {"u": 1e-18, "pre_gate": 1e-18, "dy": 1e18},
    ],
)
@pytest.mark.parametrize("form", ["gates, skip", "short, skip"])
def test_magnitudes(form, factors):
    args = inputs(form, 2, 1, 100)
    assert_rows_exact({k: x * factors.get(k, 1.0) for k, x in args.items()})


@pytest.mark.parametrize(
    ("u", "taps", "dy"), [(3e38, 1e-6, 1e-3), (1e-6, 1e36, 1e-6), (1.2e-38, 1.0, 1.0)]
)
def test_the_largest_and_smallest_numbers(u, taps, dy):
    """Of float32; larger taps would have no room for the transform's length."""
    args = inputs("bare", 2, 1, 100)
    for name, factor in (("u", u), ("filter", taps), ("dy", dy)):
        args[name] *= factor / args[name].abs().amax()
    assert_rows_exact(args)


@pytest.mark.parametrize("plan", [ACCURATE, FAST])
@pytest.mark.parametrize("what", ["impulses", "equal tokens", "outlier", "equal taps"])
def test_adversarial_inputs(what, plan):
    """Transforms as flat and as peaked as can be: the smallest and the largest operands."""
    args = inputs("bare", 2, 1, 4096)
    first = torch.arange(4096, device=DEVICE) == 0
    if what == "impulses":
        args = {k: torch.where(first, 0.51, 0.0).expand_as(x) for k, x in args.items()}
    elif what == "equal tokens":
        args = {k: torch.ones_like(x) for k, x in args.items()}
    elif what == "outlier":
        args["u"][:, :, 1234] *= 1000
        args["dy"][:, :, 3210] *= 1000
    else:
        args["filter"][:] = 1.0
    assert_rows_exact(args, plan, ONE_SIGN[plan.precision])


@pytest.mark.parametrize("T", [96, 256])
@pytest.mark.parametrize("split", [1, 40, 95])
def test_causal_to_rounding(split, T):
    args, _, _ = case("all", 2, 1, T)
    expected = kernel_results(args)
    late, early = slice(split, T), slice(0, split)
    later = {k: x.clone() for k, x in args.items()}
    for name in SIGNALS:
        later[name][..., late] *= 1.5
    got = kernel_results(later, gradients=False)["y"]
    scale = got.abs().amax(2, keepdim=True)
    assert ((got - expected["y"])[..., early].abs() <= ROUNDING * scale).all()
    assert ((got - expected["y"])[..., late].abs() > ROUNDING * scale).any()
    later = args | {"dy": args["dy"].clone()}
    later["dy"][..., early] *= 1.5
    found = kernel_results(later)
    for name in ("du", "dpre_gate", "dpost_gate"):
        change = (found[name] - expected[name]).abs()
        scale = found[name].abs().amax(2, keepdim=True)
        assert (change[..., late] <= ROUNDING * scale).all(), name
        assert (change[..., early] > ROUNDING * scale).any(), name


@pytest.mark.parametrize(("form", "T"), [("bare", 20), ("pre", 20), ("all", 20), ("all", 256)])
def test_non_contiguous_inputs(form, T):
    args, _, _ = case(form, 3, 2, T)
    others = strided(args)
    assert not any(x.is_contiguous() for x in others.values())
    expected = kernel_results(args)
    assert_same(kernel_results(others), expected)
    assert_same(kernel_results({k: turned(x) for k, x in args.items()}), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_expanded_inputs(axis):
    args, _, _ = case("gates, skip", 2, 3, 20)
    for name in (*SIGNALS, "dy", "filter", "skip"):
        along = axis if args[name].ndim == 3 else 0
        args = args | {name: args[name].narrow(along, 0, 1).expand_as(args[name])}
    expected = kernel_results({k: x.contiguous() for k, x in args.items()})
    assert_same(kernel_results(args), expected)


@pytest.mark.parametrize("shape", [(2, 1, 3), (3, 1, 2), (3, 2, 3), (2, 3, 1)])
def test_overlapping_windows(shape):
    """Where rows of the batch, and not only tokens, lie side by side."""
    B, D, T = shape
    windows = randn(D, B + T - 1).unfold(1, T, 1).transpose(0, 1)
    args = inputs("post", B, D, T) | {"u": windows}
    assert_same(kernel_results(args), kernel_results(args | {"u": windows.contiguous()}))


def test_the_gradient_of_a_sum():
    """Expanded from one number."""
    args, _, _ = case("all", 2, 2, 20)
    leaves = {k: x.clone().requires_grad_() for k, x in args.items() if k != "dy"}
    y = long_conv(**leaves, plan=ACCURATE, backend="triton")
    got = torch.autograd.grad(y.sum(), list(leaves.values()))
    expected = kernel_results(args | {"dy": torch.ones_like(y)})
    assert_same({"y": y} | dict(zip((f"d{k}" for k in leaves), got, strict=True)), expected)


@pytest.mark.parametrize("name", [k for k in inputs("all", 1, 1, 1) if k != "dy"])
def test_the_gradient_of_one_argument(name):
    args, _, _ = case("all", 2, 2, 20)
    leaves = {k: x.detach() for k, x in args.items() if k != "dy"}
    leaves[name].requires_grad_()
    long_conv(**leaves, plan=ACCURATE, backend="triton").backward(args["dy"])
    assert torch.equal(leaves[name].grad, kernel_results(args)[f"d{name}"])
    assert all(x.grad is None for k, x in leaves.items() if k != name)


@pytest.mark.parametrize("plan", [ACCURATE, LongConvPlan(2, "fast")])
@pytest.mark.parametrize("T", [20, 256])
@pytest.mark.parametrize("form", ["bare", "all"])
def test_memory_beside_tensors_is_neither_read_nor_written(form, T, plan):
    """Nor is memory read before it is written."""
    args, _, _ = case(form, 3, 2, T)
    expected = kernel_results(args, plan)
    for some in (args, strided(args)):
        with guarded_allocations():
            got = kernel_results({k: in_margins(x) for k, x in some.items()}, plan)
        assert_same(got, expected)


@interpreted
@pytest.mark.parametrize("T", [1, 2, 17, 256])
@pytest.mark.parametrize("form", ["gates, skip", "all"])
def test_no_two_programs_share_memory(form, T):
    """What a program keeps for itself, where they run side by side: on a GPU.

    Counting raises for any access outside the arguments, also where its value goes nowhere.
    """
    B, D = 3, 2
    args, _, _ = case(form, B, D, T)
    _, counts = traffic.count(lambda: kernel_results(args, LongConvPlan(2)))
    assert set(counts.kernels) == {"long_conv_forward_kernel", "long_conv_backward_kernel"}
    found = counts.kernels["long_conv_backward_kernel"].arguments
    written = {k: x.written_bytes for k, x in found.items() if x.written_bytes}
    expected = dict.fromkeys(("DU", "DPRE", "DPOST"), 4 * B * D * T)
    expected |= {"OWN_SPECTRA": 4 * 2 * D * 6 * 256, "DTAPS": 4 * 2 * D * T}
    if form == "all":
        expected |= {"OWN_SIGNALS": 4 * 2 * D * 3 * 256, "DSHORT": 4 * 2 * D * 3 * 4}
    assert written == expected


@interpreted
@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_32_bits(axis):
    args, _, _ = case("all", 3, 3, 2)
    names = (*SIGNALS, "dy") if axis == 0 else (*SIGNALS, "dy", "filter")
    far = {k: far_apart(args[k], axis) for k in names}
    assert_same(kernel_results(args | far), kernel_results(args))


def test_repeats_give_the_same_bits():
    args, plan = inputs("all", 3, 1, 100), LongConvPlan(2)
    expected = kernel_results(args, plan)
    for _ in range(3):
        assert_same(kernel_results(args, plan), expected)


def test_what_is_passed_in_stays():
    args = inputs("all", 2, 2, 20)
    before = {k: x.clone() for k, x in args.items()}
    kernel_results(args)
    assert_same(args, before)


def test_taps_past_the_sequence_do_not_count():
    args = inputs("all", 2, 2, 20, spare=7)
    got = kernel_results(args)
    expected = kernel_results(args | {"filter": args["filter"][:, :20]})
    expected["dfilter"] = F.pad(expected["dfilter"], (0, 7))
    assert_same(got, expected)


@pytest.mark.parametrize("S", [1, 60])
@pytest.mark.parametrize("form", ["bare", "skip", "pre", "gates, skip"])
def test_history(form, S):
    args = inputs(form, 2, 2, 30, spare=S) | {"history": randn(2, 2, S, seed=20)}
    assert_exact(
        kernel_results(args), plain_results(args), exact_results(args, long_conv_reference)
    )


def test_history_beside_short_filters_is_refused():
    args = inputs("all", 1, 1, 5)
    args = {k: x for k, x in args.items() if k != "dy"} | {"history": randn(1, 1, 0)}
    with pytest.raises(ValueError, match="short_filters cannot be fused with history"):
        long_conv(**args, backend="triton")


def token(B, D, S, dtype=torch.float32, gates=True):
    """The arguments of a step."""
    args = {
        "u": randn(B, D, dtype=dtype),
        "taps": randn(D, S + 1, dtype=dtype, seed=1),
        "history": randn(B, D, S, dtype=dtype, seed=2),
    }
    names = (*GATES, "skip") if gates else ()
    shapes = ((B, D), (B, D), (D,))
    return args | {
        k: randn(*shape, dtype=dtype, seed=3 + i)
        for i, (k, shape) in enumerate(zip(names, shapes, strict=False))
    }


def step_results(args, function):
    """y, z and, from random gradients of them, every gradient, by name."""
    leaves = {k: x.detach().requires_grad_() for k, x in args.items()}
    outputs = function(**leaves)
    seeds = [randn(*x.shape, seed=8 + i).to(x.dtype) for i, x in enumerate(outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    named = dict(zip((f"d{k}" for k in leaves), found, strict=True))
    return dict(zip("yz", outputs, strict=True)) | named


def check_step(args):
    exact = step_results({k: x.double() for k, x in args.items()}, long_conv_step)
    plain = step_results(args, long_conv_step)
    for name, got in step_results(args, long_conv_step_triton).items():
        factor = 2 if name in "yz" else 3
        if exact[name].numel():
            assert_as_exact(got, plain[name], exact[name], factor, name)
        assert got.shape == exact[name].shape


@pytest.mark.parametrize("S", [0, 1, 5, 700, 5000])
@pytest.mark.parametrize("B", [1, 3, 16, 17, 20])
def test_a_step_is_the_definition(B, S):
    check_step(token(B, 3, S))


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_step_in_every_form(gates, dtype):
    check_step(token(3, 2, 9, dtype, gates))


def test_a_step_of_non_contiguous_inputs():
    args = token(3, 5, 40)
    buffer = F.pad(args["history"], (0, 24), value=math.nan)
    others = {
        "u": turned(args["u"]),
        "taps": F.pad(args["taps"], (7, 0), value=math.nan)[:, 7:],
        "history": buffer[:, :, :40],
        "pre_gate": args["pre_gate"].repeat_interleave(2, 1)[:, ::2],
        "post_gate": turned(args["post_gate"]),
        "skip": args["skip"].repeat_interleave(2)[::2],
    }
    assert not any(x.is_contiguous() for x in others.values())
    expected = step_results(args, long_conv_step_triton)
    assert_same(step_results(others, long_conv_step_triton), expected)
    innermost = {k: turned(x) for k, x in args.items()}
    assert_same(step_results(innermost, long_conv_step_triton), expected)


def test_memory_beside_a_steps_tensors_is_neither_read_nor_written():
    args = token(37, 3, 300)
    expected = step_results(args, long_conv_step_triton)
    with guarded_allocations():
        got = step_results({k: in_margins(x) for k, x in args.items()}, long_conv_step_triton)
    assert_same(got, expected)


@interpreted
@pytest.mark.parametrize(("B", "S"), [(1, 0), (3, 5000), (17, 300)])
def test_a_step_reads_the_history_once(B, S):
    _, counts = traffic.count(lambda: long_conv_step_triton(**token(B, 3, S)))
    (kernel,) = counts.kernels.values()
    assert kernel.programs == 3 * -(-B // 16)
    for name, numbers in (("HISTORY", B * 3 * S), ("Y", B * 3), ("Z", B * 3)):
        if numbers:
            assert kernel.arguments[name].requested_bytes == 4 * numbers, name


@interpreted
@pytest.mark.parametrize("axis", [0, 1])
def test_a_steps_offsets_beyond_32_bits(axis):
    args = token(3, 3, 4)
    names = ("history",) if axis == 0 else ("history", "taps")
    far = {k: far_apart(args[k], axis) for k in names}
    expected = step_results(args, long_conv_step_triton)
    assert_same(step_results(args | far, long_conv_step_triton), expected)


def test_steps_equal_the_sequence():
    args, _, _ = case("gates, skip", 2, 3, 20)
    y = kernel_results(args, gradients=False)["y"]
    reversed_filter, history = args["filter"].flip(1), args["u"].new_empty(2, 3, 0)
    for t in range(20):
        now = {k: args[k][:, :, t] for k in SIGNALS}
        taps = reversed_filter[:, 19 - t :]
        y_t, z = long_conv_step_triton(**now, taps=taps, history=history, skip=args["skip"])
        history = torch.cat([history, z.unsqueeze(2)], 2)
        assert relative_max(y_t, y[:, :, t].double()) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "allowed", "precision"),
    [
        (torch.float32, "highest", "accurate"),
        (torch.float32, "high", "fast"),
        (torch.float32, "medium", "fast"),
        (torch.float16, "high", "accurate"),
        (torch.bfloat16, "highest", "fast"),
    ],
)
def test_the_plans_precision(dtype, allowed, precision, matmul_precision):
    matmul_precision(allowed)
    assert op.plan((1, 1, 100), dtype, "cpu") == LongConvPlan(1, precision)


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("B", "D", "splits"), [(8, 2048, 1), (8, 64, 2), (8, 10, 8), (1, 10, 1), (16, 132, 1)]
)
def test_the_plan_fills_the_gpu(B, D, splits):
    assert op.plan((B, D, 4096), torch.float32, "cpu").splits == splits


@interpreted
def test_the_plan_is_followed(monkeypatch, matmul_precision):
    args, _, _ = case("bare", 3, 2, 20)
    seen = []
    plan = LongConvPlan(2, "fast")
    monkeypatch.setattr(op, "plan", lambda *given: seen.append(given) or plan)
    got, counts = traffic.count(lambda: kernel_results(args, None, gradients=False))
    assert counts.kernels["long_conv_forward_kernel"].programs == 2 * 2
    assert seen == [((3, 2, 20), torch.float32, args["u"].device)]
    assert_same(got, kernel_results(args, plan, gradients=False))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "plan",
    [LongConvPlan(0), LongConvPlan(-1), LongConvPlan(1, "exact")],
)
@pytest.mark.parametrize("form", ["bare", "history"])
def test_a_plan_that_is_none_is_refused(plan, form):
    args = {"u": randn(1, 1, 5), "filter": randn(1, 8)}
    if form == "history":
        args["history"] = randn(1, 1, 3)
    with pytest.raises(ValueError, match="one split at least, and precision 'accurate' or 'fast'"):
        long_conv(**args, plan=plan, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_have_no_plans(backend):
    with pytest.raises(ValueError, match="plan is for backend 'triton', got"):
        long_conv(randn(1, 1, 5), randn(1, 5), plan=ACCURATE, backend=backend)


def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match="has no kernels in float64; use 'torch'"):
        long_conv(randn(1, 1, 5).double(), randn(1, 5).double(), backend="triton")
    with pytest.raises(BackendUnavailableError, match="has no kernels in float64; use 'torch'"):
        long_conv_step_triton(**token(1, 1, 5, torch.float64))


@interpreted
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        long_conv(randn(1, 1, 5).bfloat16(), randn(1, 5), backend="triton")
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        long_conv_step_triton(**token(1, 1, 5, torch.bfloat16))


OPERANDS = tuple(inputs("all", 1, 1, 1))[:-1]


@pytest.mark.parametrize(
    "args",
    [
        {k: turned(x) for k, x in inputs("bare", 2, 2, 5).items()},
        strided(inputs("all", 2, 2, 5, torch.float16)),
    ],
    ids=["bare", "all"],
)
def test_operations_keep_pytorchs_rules(args):
    tensors = [args.get(k) for k in OPERANDS]
    torch.library.opcheck(kernels.long_conv_backward_op, (args["dy"], *tensors, 2, True))
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    torch.library.opcheck(kernels.long_conv_op, (*leaves, 2, False))


@pytest.mark.parametrize("gates", [True, False])
def test_the_step_keeps_pytorchs_rules(gates):
    args = token(2, 3, 5, gates=gates)
    names = ("u", "taps", "history", *GATES, "skip")
    leaves = [args[k].requires_grad_() if k in args else None for k in names]
    torch.library.opcheck(kernels.long_conv_step_op, tuple(leaves))


def test_torch_compile_needs_no_graph_break(matmul_precision):
    """And compiles anew where the plan's precision changes."""
    args, _, _ = case("all", 3, 2, 20)

    def function(u, **others):
        return 3 * long_conv(2 * u, **others, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for precision in ("highest", "high"):
        matmul_precision(precision)
        found.append(results(args, compiled))
        assert_same(found[-1], results(args, function))
    assert not torch.equal(found[0]["y"], found[1]["y"])


def test_a_step_compiles_without_a_graph_break():
    args = token(2, 3, 5)
    compiled = torch.compile(long_conv_step_triton, fullgraph=True, backend="aot_eager")
    assert_same(step_results(args, compiled), step_results(args, long_conv_step_triton))


def test_flops_are_those_of_hyena():
    B, D, T = 2, 3, 1000
    args = inputs("gates, skip", B, D, T)
    row, spectrum = long_conv_flops(T, 0)
    args = {k: x.requires_grad_() for k, x in args.items() if k != "dy"}
    with FlopCounterMode(display=False) as counter:
        y = long_conv(**args, backend="triton")
        assert counter.get_total_flops() == D * (B * row + spectrum)
        y.sum().backward()
        assert counter.get_total_flops() == 3 * D * (B * row + spectrum)
    with FlopCounterMode(display=False) as counter:
        long_conv_step_triton(**token(B, D, 50))
    assert counter.get_total_flops() == B * D * long_conv_flops(1, 50)[0]


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "dtype", "precision"),
    [
        (256, torch.float32, "accurate"),
        (1025, torch.float16, "fast"),
        (2048, torch.bfloat16, "fast"),
        (2048, torch.float32, "accurate"),
        (4096, torch.bfloat16, "fast"),
        (4096, torch.bfloat16, "accurate"),
        (4096, torch.float32, "accurate"),
    ],
)
def test_on_a_gpu(T, dtype, precision):
    D = 2**17 // max(T, 2048)  # the direct sums take 8 D T^2 bytes, several times
    args, plan = inputs("all", 8, D, T, dtype), LongConvPlan(3, precision)
    got = kernel_results(args, plan)
    if precision == "accurate":
        assert_exact(got, plain_results(args), exact_results(args))
    else:
        exact = exact_results(args)
        for name in got:
            error = relative_rms(got[name], exact[name], terms_of(name, exact))
            assert error < FAST_SUMS + torch.finfo(dtype).eps, (name, error)
    for _ in range(50):
        assert_same(kernel_results(args, plan), got)


@on_a_gpu
@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    """Of signals, of results, and of what programs keep for themselves."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    B, D, T = 3, 180_000, 4096
    args = {
        "u": torch.randn(B, D, T, device=DEVICE, dtype=torch.bfloat16),
        "filter": torch.randn(D, T, device=DEVICE, dtype=torch.bfloat16),
    }
    args["dy"] = args["u"]
    got = kernel_results(args, FAST)
    last = {k: x[..., -2:, :].contiguous() for k, x in args.items()}
    expected = kernel_results(last, FAST)
    assert_same({k: x[..., -2:, :].contiguous() for k, x in got.items()}, expected)
