"""The kernels of the long convolution beyond a tile's tokens; see `test_long_conv_kernel`."""

import math
from functools import cache

import pytest
import torch

from archs.ops import BackendUnavailableError
from archs.ops import long_conv as op
from archs.ops.long_conv import LongConvPlan, long_conv
from archs.ops.long_conv_tables import MOST_TOKENS
from harness import traffic
from kernel_checks import (
    DEVICE,
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
    ROUNDING,
    ROWS,
    SIGNALS,
    assert_exact,
    direct,
    exact_results,
    far_apart,
    inputs,
    kernel_results,
    plain_results,
    strided,
    terms_of,
)

pytest.importorskip("triton")
from archs.ops import long_conv_split_kernel as split

SHORTEST = 4097
# Both sides of the lengths that transforms have.
LENGTHS = (SHORTEST, 8191, 8192, 8193, 30_000, 65_536)
SLOT_BYTES = 2 * 4 * 8192  # of a complex signal of that length
# Relative RMS errors of "fast": of rows, and of the few sums over all rows' tokens.
FAST_LEAST, FAST_MOST, FAST_SUMS = 1.5e-4, 1.2e-3, 2.5e-3


def by_fft(**args):
    """The definition, by FFT."""
    return long_conv(**args, backend="torch")


@cache
def case(form, B, D, T):
    """Inputs, and their results in plain PyTorch and in float64."""
    args = inputs(form, B, D, T)
    return args, plain_results(args), exact_results(args, by_fft)


def check(args, plan=ACCURATE):
    assert_exact(kernel_results(args, plan), plain_results(args), exact_results(args, by_fft))


def test_the_fft_in_float64_is_the_definition():
    args, _, exact = case("all", 1, 1, SHORTEST)
    expected = exact_results(args, direct)
    for name in expected:
        assert relative_max(exact[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("T", LENGTHS)
def test_every_length(T):
    args, plain, exact = case("all", 1, 1, T)
    assert_exact(kernel_results(args), plain, exact)


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    check(inputs(form, 1, 1, SHORTEST))


@pytest.mark.parametrize("plan", [ACCURATE, FAST])
def test_sizes_of_longer_transforms(monkeypatch, plan):
    """An outer transform of 32 in products of 16 rows, as one of 256 is in such of 64."""
    monkeypatch.setattr(split, "INNER", {512: split.INNER[512]})
    monkeypatch.setattr(split, "PRODUCT_ROWS", 16)
    T = 9000
    assert split.shape_of(T)[0] == 32
    args, plain, exact = case("all", 1, 1, T)
    if plan is ACCURATE:
        assert_exact(kernel_results(args), plain, exact)
    else:
        assert_fast(kernel_results(args, plan), exact)


def test_every_length_has_a_size():
    for T in range(SHORTEST, MOST_TOKENS + 1, 1021):
        M, P1, P2, _ = shape = split.shape_of(T)
        assert M * P1 * P2 >= T > M * P1 * P2 // 2
        assert 16 <= M <= 256
        assert shape.row % shape.columns == 0
        assert M % split.EACH == 0


def assert_fast(got, exact):
    for name in exact:
        error = relative_rms(got[name], exact[name], terms_of(name, exact))
        most = FAST_MOST if name in (*ROWS, "dfilter") else FAST_SUMS
        assert error < most, (name, error)
        assert name not in ROWS or error > FAST_LEAST, (name, error)


def test_fast_is_as_exact_as_documented_and_no_more():
    args, _, exact = case("all", 1, 1, SHORTEST)
    assert_fast(kernel_results(args, FAST), exact)


@pytest.mark.parametrize(("B", "D", "slots"), [(3, 1, 2), (1, 3, 2), (2, 2, 3)])
def test_groups_do_not_show(monkeypatch, B, D, slots):
    """As many rows and channels go together as there are slots for."""
    args, plain, exact = case("all", B, D, SHORTEST)
    expected = together(B, D)
    monkeypatch.setattr(split, "SLOT_BYTES", slots * SLOT_BYTES)
    got = kernel_results(args)
    for name in ROWS:
        assert torch.equal(got[name], expected[name]), name
    assert_exact(got, plain, exact)


@cache
def together(B, D):
    """The results, all rows and channels in one group."""
    return kernel_results(case("all", B, D, SHORTEST)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_rows_do_not_touch():
    """To the last bit, however large the values of others are."""
    args, _, _ = case("all", 3, 1, SHORTEST)
    factors = torch.tensor([1e3, 1.0, math.nan], device=DEVICE)[:, None, None]
    got = kernel_results(args | {k: args[k] * factors for k in ("u", "dy")})
    for name in ROWS:
        assert torch.equal(got[name][1], together(3, 1)[name][1]), name
        assert not torch.equal(got[name][0], together(3, 1)[name][0]), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_channels_do_not_touch():
    """To the last bit, however large the values of others are."""
    args, _, _ = case("all", 1, 3, SHORTEST)
    factors = torch.tensor([1e3, 1.0, math.nan], device=DEVICE)[:, None]
    got = kernel_results(args | {k: args[k] * factors for k in ("u", "dy", "filter")})
    for name, x in together(1, 3).items():
        axis = 0 if name in ("dfilter", "dskip") else 1
        assert torch.equal(got[name].select(axis, 1), x.select(axis, 1)), name
        assert not torch.equal(got[name].select(axis, 0), x.select(axis, 0)), name


@pytest.mark.parametrize(
    "factors",
    [
        {"u": 1e-30},
        {"filter": 1e30, "skip": 1e30},
        {"u": 1e30, "filter": 1e-30, "skip": 1e-30},
        {"u": 0.0, "dy": 1e-30},
    ],
)
def test_magnitudes(factors):
    args = inputs("gates, skip", 1, 1, SHORTEST)
    check({k: x * factors.get(k, 1.0) for k, x in args.items()})


def test_a_signal_that_lives_in_one_block_of_columns():
    """Other blocks have zeros alone, and a power of two of their own."""
    args = inputs("gates, skip", 1, 1, SHORTEST)
    alone = torch.arange(SHORTEST, device=DEVICE) % 512 < 256
    args["u"] = torch.where(alone, args["u"], 1e-12 * args["u"])
    got, exact = kernel_results(args), exact_results(args, by_fft)
    for name in exact:
        error = relative_max(got[name], exact[name], terms_of(name, exact))
        assert error < ROUNDING, name


@pytest.mark.parametrize("split_at", [1, 4000])
def test_causal_to_rounding(split_at):
    args, _, _ = case("all", 1, 1, SHORTEST)
    changed = args | {"u": args["u"].clone()}
    changed["u"][..., split_at:] *= -1.0
    before, after = (kernel_results(x, gradients=False)["y"] for x in (args, changed))
    difference = (after - before)[..., :split_at].abs().max()
    assert difference <= ROUNDING * before.abs().max()
    assert (after - before)[..., split_at].abs().max() > 1e-3


@pytest.mark.parametrize("plan", [ACCURATE, FAST])
@pytest.mark.parametrize("form", ["bare", "all"])
def test_memory_beside_tensors_is_neither_read_nor_written(form, plan):
    """Nor is memory read before it is written; whatever the strides."""
    args, _, _ = case(form, 2, 1, SHORTEST)
    expected = kernel_results(args, plan)
    with guarded_allocations():
        got = kernel_results({k: in_margins(x) for k, x in strided(args).items()}, plan)
    assert_same(got, expected)


@interpreted
def test_no_access_outside_arguments():
    """Counting raises for any, also where its value goes nowhere."""
    args, _, _ = case("all", 1, 1, SHORTEST)
    got, counts = traffic.count(lambda: kernel_results(args))
    assert_same(got, together(1, 1))
    assert len(counts.kernels) == 7


@pytest.mark.parametrize(("B", "D"), [(1, 1), (8, 64), (500, 2)])
def test_memory_does_not_grow_with_the_batch(B, D):
    u = torch.empty(B, D, 2**17, device="meta")
    launch = split.Launches(u, None, None, None, accurate=True)
    assert launch.rows * launch.channels <= split.SLOT_BYTES // (2 * 4 * 2**17)
    for groups, whole in ((launch.row_groups(), B), (launch.channel_groups(), D)):
        assert [i for first, n in groups for i in range(first, first + n)] == [*range(whole)]


@interpreted
@pytest.mark.parametrize(("axis", "B", "D"), [(0, 3, 1), (1, 1, 3)])
def test_offsets_beyond_32_bits(axis, B, D):
    args, _, _ = case("all", B, D, SHORTEST)
    names = (*SIGNALS, "dy") if axis == 0 else (*SIGNALS, "dy", "filter")
    far = {k: far_apart(args[k], axis) for k in names}
    assert_same(kernel_results(args | far), together(B, D))


def test_taps_past_the_sequence_do_not_count():
    args = inputs("all", 1, 1, SHORTEST, spare=7)
    got = kernel_results(args)
    assert (got["dfilter"][:, SHORTEST:] == 0).all()
    args["filter"] = args["filter"].index_fill(1, torch.arange(SHORTEST, SHORTEST + 7), math.nan)
    assert torch.equal(kernel_results(args)["y"], got["y"])


def test_history():
    args = inputs("gates, skip", 1, 1, 40, spare=SHORTEST)
    history = randn(1, 1, SHORTEST, seed=9)
    got = kernel_results(args | {"history": history})
    expected = exact_results(args | {"history": history}, by_fft)
    for name in expected:
        assert relative_max(got[name], expected[name], terms_of(name, expected)) < 3e-6, name


def test_too_many_tokens_are_refused():
    u = torch.zeros(1, 1, 1, device=DEVICE).expand(1, 1, MOST_TOKENS + 1)
    with pytest.raises(BackendUnavailableError, match=r"1,048,576 tokens, got 1,048,577: use"):
        long_conv(u, u[0], backend="triton")


def test_the_plan_has_no_splits():
    assert op.plan((8, 4, 4096), torch.float32, DEVICE).splits == 8
    assert op.plan((8, 4, SHORTEST), torch.float32, DEVICE).splits == 1


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "dtype", "precision"),
    [
        (8192, torch.bfloat16, "fast"),
        (16_384, torch.float32, "accurate"),
        (65_536, torch.float32, "fast"),
        (100_000, torch.bfloat16, "accurate"),
        (131_072, torch.bfloat16, "fast"),
        (524_288, torch.bfloat16, "fast"),
        (MOST_TOKENS, torch.bfloat16, "fast"),
        (MOST_TOKENS, torch.float32, "accurate"),
    ],
)
def test_on_a_gpu(T, dtype, precision):
    args, plan = inputs("all", 2, 3, T, dtype), LongConvPlan(1, precision)
    got, exact = kernel_results(args, plan), exact_results(args, by_fft)
    if precision == "accurate":
        assert_exact(got, plain_results(args), exact)
    else:
        rounded = torch.finfo(dtype).eps
        for name in got:
            error = relative_rms(got[name], exact[name], terms_of(name, exact))
            assert error < FAST_SUMS + rounded, (name, error)
    for _ in range(20):
        assert_same(kernel_results(args, plan), got)
