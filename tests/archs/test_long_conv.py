import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.ops import long_conv as long_conv_module
from archs.ops.long_conv import fft_length, long_conv, long_conv_step

LENGTHS = [1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 1000, 1025]
FORMS = {
    "bare": (),
    "skip": ("skip",),
    "pre": ("pre_gate",),
    "post": ("post_gate", "skip"),
    "gates": ("pre_gate", "post_gate", "skip"),
    "short": ("pre_gate", "post_gate", "skip", "short_filters", "short_bias"),
    "short, no bias": ("pre_gate", "post_gate", "short_filters"),
    "history": ("pre_gate", "post_gate", "skip", "history"),
    "history alone": ("history",),
}


def arguments(form, B, D, T, *, S=11, spare=0, seed=0, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(seed)
    S = S if "history" in FORMS[form] else 0
    shapes = {
        "u": (B, D, T),
        "filter": (D, S + T + spare),
        "pre_gate": (B, D, T),
        "post_gate": (B, D, T),
        "skip": (D,),
        "short_filters": (3, D, 3),
        "short_bias": (3, D),
        "history": (B, D, S),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(grad)
        for name, shape in shapes.items()
        if name in ("u", "filter") or name in FORMS[form]
    }


def direct(args):
    """The definition as sums over tokens, in float64 numpy."""
    a = {name: x.detach().double().numpy() for name, x in args.items()}
    B, D, T = a["u"].shape
    post = a.get("post_gate", np.ones((B, D, T)))
    pre = a.get("pre_gate", np.ones((B, D, T)))
    u = a["u"]
    if "short_filters" in a:
        bias = a.get("short_bias", np.zeros((3, D)))
        signals = []
        for taps, offset, x in zip(a["short_filters"], bias, (post, pre, u), strict=True):
            out = np.zeros_like(x) + offset[:, None]
            for t in range(T):
                for age in range(min(3, t + 1)):
                    out[:, :, t] += taps[:, 2 - age] * x[:, :, t - age]
            signals.append(out)
        post, pre, u = signals
    z = pre * u
    history = a.get("history", np.zeros((B, D, 0)))
    S = history.shape[2]
    seen = np.concatenate([history, z], 2)
    skip = a.get("skip", np.zeros(D))
    y = np.zeros((B, D, T))
    for t in range(T):
        weights = a["filter"][:, : S + t + 1][:, ::-1]
        y[:, :, t] = (seen[:, :, : S + t + 1] * weights).sum(2) + skip * z[:, :, t]
    return torch.from_numpy(post * y)


def relative(actual, expected):
    expected = expected.double()
    scale = expected.abs().max().clamp_min(1e-300)
    return ((actual.double() - expected).abs().max() / scale).item()


def value_and_gradients(args, backend):
    y = long_conv(**args, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return y, torch.autograd.grad((y * weights.to(y.dtype)).sum(), list(args.values()))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2, 3, 17, 65])
def test_equals_the_direct_sum(form, T, backend):
    args = arguments(form, 2, 3, T)
    assert relative(long_conv(**args, backend=backend), direct(args)) < 1e-13


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("form", ["short", "history"])
def test_torch_equals_reference_in_float64(form, T):
    args = arguments(form, 2, 2, T)
    y, gradients = value_and_gradients(args, "torch")
    expected, expected_gradients = value_and_gradients(args, "reference")
    assert relative(y, expected) < 1e-10
    for name, got, want in zip(args, gradients, expected_gradients, strict=True):
        assert relative(got, want) < 1e-10, name


@pytest.mark.parametrize("form", ["bare", "skip", "pre", "post", "short, no bias", "history alone"])
def test_torch_equals_reference_with_parts_left_out(form):
    args = arguments(form, 3, 2, 37, spare=4)
    y, gradients = value_and_gradients(args, "torch")
    expected, expected_gradients = value_and_gradients(args, "reference")
    assert relative(y, expected) < 1e-12
    for name, got, want in zip(args, gradients, expected_gradients, strict=True):
        assert relative(got, want) < 1e-12, name


@pytest.mark.parametrize("T", [3, 64, 127, 1000])
@pytest.mark.parametrize("form", ["short", "history"])
def test_float32_is_as_exact_as_the_fold(form, T):
    exact_args = {
        name: x.detach().float().double().requires_grad_()
        for name, x in arguments(form, 2, 2, T).items()
    }
    args = {name: x.detach().float().requires_grad_() for name, x in exact_args.items()}
    exact, exact_gradients = value_and_gradients(exact_args, "reference")
    y, gradients = value_and_gradients(args, "torch")
    folded, folded_gradients = value_and_gradients(args, "reference")
    assert rms(y, exact) <= 2 * rms(folded, exact) + 1e-6
    for name, got, plain, want in zip(
        args, gradients, folded_gradients, exact_gradients, strict=True
    ):
        assert rms(got, want) <= 3 * rms(plain, want) + 1e-6, name


def rms(actual, expected):
    error = (actual.double() - expected).square().mean().sqrt()
    return (error / expected.square().mean().sqrt().clamp_min(1e-300)).item()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, backend):
    args = arguments(form, 2, 2, 5, S=3, spare=1)

    def function(*tensors):
        return long_conv(**dict(zip(args, tensors, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(function, tuple(args.values()))


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(list(FORMS)),
    B=st.integers(1, 4),
    D=st.integers(1, 7),
    T=st.integers(1, 70),
    S=st.integers(0, 90),
    spare=st.integers(0, 3),
    segment_bytes=st.sampled_from([1, 3000, 2**24]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_any_segment(form, B, D, T, S, spare, segment_bytes, seed):
    args = arguments(form, B, D, T, S=S, spare=spare, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_conv_module, "SEGMENT_BYTES", segment_bytes)
        y, gradients = value_and_gradients(args, "torch")
    expected, expected_gradients = value_and_gradients(args, "reference")
    assert relative(y, expected) < 1e-11
    for name, got, want in zip(args, gradients, expected_gradients, strict=True):
        assert got.shape == want.shape
        # An empty sum (taps that nothing reached, no history) is zero in both.
        assert want.numel() == 0 or (got - want).abs().max() <= 1e-11 * (1 + want.abs().max()), name


@pytest.mark.parametrize("form", ["short", "history"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_segments_do_not_show(channels, form, monkeypatch):
    B, D, T = 2, 7, 30
    args = arguments(form, B, D, T)
    expected, expected_gradients = value_and_gradients(args, "torch")
    S = args["filter"].shape[1] - T
    # Segments of 3 channels are 3, 3 and 1 of the backward pass's 2 B + 1 rows.
    rows_bytes = (2 * B + 1) * fft_length(T, S) * 8
    monkeypatch.setattr(long_conv_module, "SEGMENT_BYTES", channels * rows_bytes)
    y, gradients = value_and_gradients(args, "torch")
    assert relative(y, expected) < 1e-14
    for name, got, want in zip(args, gradients, expected_gradients, strict=True):
        assert relative(got, want) < 1e-14, name


def test_history_is_what_came_before_at_every_split():
    T = 65
    args = arguments("gates", 2, 3, T, grad=False)
    whole = long_conv(**args, backend="torch")
    z = args["pre_gate"] * args["u"]
    for split in range(1, T):
        late = {name: x[:, :, split:] if x.ndim == 3 else x for name, x in args.items()}
        y = long_conv(**late, history=z[:, :, :split], backend="torch")
        assert relative(y, whole[:, :, split:]) < 1e-13


def test_step_appends_to_the_history_what_the_convolution_reads():
    args = arguments("history", 2, 3, 1, S=9, grad=False)
    y, z = long_conv_step(
        args["u"][:, :, 0],
        args["filter"].flip(1),
        args["history"],
        pre_gate=args["pre_gate"][:, :, 0],
        post_gate=args["post_gate"][:, :, 0],
        skip=args["skip"],
    )
    assert torch.equal(z, (args["pre_gate"] * args["u"])[:, :, 0])
    assert relative(y, direct(args)[:, :, 0]) < 1e-14


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_non_contiguous_inputs(backend):
    args = arguments("short", 2, 3, 33)
    expected, expected_gradients = value_and_gradients(args, backend)
    strided = {}
    for name, x in args.items():
        store = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
        store[..., ::2] = x.detach()
        strided[name] = store[..., ::2].requires_grad_()
    turned = args["u"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for variant in (strided, {**args, "u": turned}):
        y, gradients = value_and_gradients(variant, backend)
        assert relative(y, expected) < 1e-14
        for got, want in zip(gradients, expected_gradients, strict=True):
            assert relative(got, want) < 1e-13


def test_expanded_output_gradient():
    args = arguments("short", 2, 3, 9)
    expanded = torch.autograd.grad(long_conv(**args, backend="torch").sum(), list(args.values()))
    y = long_conv(**args, backend="torch")
    dense = torch.autograd.grad(y, list(args.values()), torch.ones_like(y))
    for got, want in zip(expanded, dense, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("only", arguments("short", 1, 1, 1))
def test_one_gradient_alone(only):
    args = arguments("short", 2, 3, 9)
    expected = dict(zip(args, value_and_gradients(args, "torch")[1], strict=True))[only]
    alone = {name: x.detach().requires_grad_(name == only) for name, x in args.items()}
    y = long_conv(**alone, backend="torch")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (y * weights).sum().backward()
    assert torch.equal(alone[only].grad, expected)
    assert all(x.grad is None for name, x in alone.items() if name != only)


def test_same_values_without_gradients():
    args = arguments("short", 2, 3, 40)
    recorded = long_conv(**args, backend="torch")
    with torch.no_grad():
        assert torch.equal(long_conv(**args, backend="torch"), recorded)


def test_causal_to_rounding():
    args = arguments("short", 1, 4, 100, dtype=torch.float32, grad=False)
    before = long_conv(**args, backend="torch")
    for name in ("u", "pre_gate", "post_gate"):
        args[name] = args[name].clone()
        args[name][:, :, 60:] += 1.0
    after = long_conv(**args, backend="torch")
    assert relative(after[:, :, :60], before[:, :, :60]) < 1e-5
    assert relative(after[:, :, 60:], before[:, :, 60:]) > 1e-2


def test_taps_past_the_sequence_do_not_count():
    args = arguments("gates", 2, 3, 20, spare=9)
    _, gradients = value_and_gradients(args, "torch")
    filter_gradient = dict(zip(args, gradients, strict=True))["filter"]
    assert filter_gradient.shape == args["filter"].shape
    assert (filter_gradient[:, 20:] == 0).all()
    assert (filter_gradient[:, :20] != 0).all()


def test_rows_and_channels_do_not_touch():
    args = arguments("short", 3, 4, 50, dtype=torch.float32, grad=False)
    clean = long_conv(**args, backend="torch")
    for fill in (math.nan, 1e30):
        args["u"] = args["u"].clone()
        args["u"][1, 2] = fill
        y = long_conv(**args, backend="torch")
        untouched = torch.ones(3, 4, dtype=torch.bool)
        untouched[1, 2] = False
        assert torch.equal(y[untouched], clean[untouched])


@pytest.mark.parametrize("T", [127, 1025])
def test_equal_tokens_and_constant_filter(T):
    # Nothing cancels: y_t = t + 1, the largest sums that inputs of this size give.
    ones = torch.ones(1, 2, T)
    y = long_conv(ones, ones[0], backend="torch")
    assert relative(y, torch.arange(1, T + 1).expand(1, 2, T)) < 1e-6


@pytest.mark.parametrize(("dtype", "cap"), [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", ["short", "history"])
def test_reduced_types(form, backend, dtype, cap):
    args = arguments(form, 2, 3, 65, dtype=dtype)
    exact_args = {name: x.detach().double().requires_grad_() for name, x in args.items()}
    y, gradients = value_and_gradients(args, backend)
    exact, exact_gradients = value_and_gradients(exact_args, "reference")
    assert y.dtype == dtype
    assert rms(y, exact) < cap
    for name, got, want in zip(args, gradients, exact_gradients, strict=True):
        assert got.dtype == dtype
        # dy is rounded to the type as well.
        assert rms(got, want) < 2 * cap, name


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", ["short", "history"])
def test_reduced_types_are_computed_in_float32(form, backend):
    args = arguments(form, 2, 3, 65, dtype=torch.bfloat16)
    wide = {name: x.detach().float().requires_grad_() for name, x in args.items()}
    y, wide_y = long_conv(**args, backend=backend), long_conv(**wide, backend=backend)
    assert torch.equal(y, wide_y.bfloat16())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    gradients = torch.autograd.grad(y, list(args.values()), dy)
    wide_gradients = torch.autograd.grad(wide_y, list(wide.values()), dy.float())
    for name, got, want in zip(args, gradients, wide_gradients, strict=True):
        assert torch.equal(got, want.bfloat16()), name


@given(T=st.integers(1, 3000), S=st.integers(0, 3000))
def test_fft_length_is_the_least_even_smooth_one_that_is_linear(T, S):
    def smooth(n):
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    N = fft_length(T, S)
    assert N % 2 == 0
    assert smooth(N)
    assert N >= S + 2 * T - 1
    assert not any(smooth(n) for n in range(S + 2 * T - 1, N) if n % 2 == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 3)}, r"u must be \(B, D, T\)"),
        ({"u": torch.zeros(2, 3, 0)}, r"T >= 1"),
        ({"pre_gate": torch.zeros(2, 3, 4)}, r"pre_gate must be \(2, 3, 5\), got \(2, 3, 4\)"),
        ({"post_gate": torch.zeros(1, 3, 5)}, r"post_gate must be \(2, 3, 5\)"),
        ({"skip": torch.zeros(4)}, r"skip must be \(3,\)"),
        ({"short_filters": torch.zeros(3, 3, 4)}, r"short_filters must be \(3, 3, 3\)"),
        ({"short_bias": torch.zeros(3)}, r"short_bias must be \(3, 3\)"),
        ({"filter": torch.zeros(3, 4)}, r"L >= 5 tokens"),
        ({"filter": torch.zeros(2, 5)}, r"filter must be \(D, L\) with D = 3"),
        ({"history": torch.zeros(2, 3, 2)}, r"short_filters cannot be fused with history"),
        ({"history": torch.zeros(2, 3, 2), "short_filters": None, "short_bias": None}, "L >= 7"),
        ({"history": torch.zeros(2, 4, 2), "short_filters": None, "short_bias": None}, "history"),
        ({"pre_gate": None}, "short_filters need pre_gate and post_gate"),
        ({"short_filters": None}, "short_bias needs short_filters"),
        ({"pre_gate": torch.zeros(2, 3, 5).half()}, "pre_gate must have u's dtype torch.float32"),
        ({"backend": "tourch"}, "did you mean 'torch'"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change, message):
    args = arguments("short", 2, 3, 5, dtype=torch.float32, grad=False)
    with pytest.raises(ValueError, match=message) as error:
        long_conv(**{**args, "backend": "torch", **change})
    assert "\n" not in str(error.value)
