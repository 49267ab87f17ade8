import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archs.ops import BackendUnavailableError
from archs.ops.short_conv import short_conv, short_conv_step

BACKENDS = ("reference", "torch")
LENGTHS = (1, 2, 3, 4, 17, 63, 64, 65, 127, 1000)


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(B, T, D, W, dtype=torch.float64, bias=True, state=True):
    return {
        "x": randn(B, T, D, dtype=dtype),
        "weight": randn(D, W, dtype=dtype),
        "bias": randn(D, dtype=dtype) if bias else None,
        "state": randn(B, D, W - 1, dtype=dtype) if state else None,
    }


def outputs_and_gradients(args, backend, activation=None):
    leaves = {k: None if t is None else t.clone().requires_grad_() for k, t in args.items()}
    y, end = short_conv(**leaves, activation=activation, backend=backend)
    loss = (y * randn(*y.shape, seed=1).to(y.dtype)).sum()
    if end is not None:
        loss = loss + (end * randn(*end.shape, seed=2).to(y.dtype)).sum()
    used = [t for t in leaves.values() if t is not None]
    return [t for t in (y, end) if t is not None] + list(torch.autograd.grad(loss, used))


def relative_max(got, expected):
    scale = expected.abs().max().clamp_min(1e-30)
    return ((got.double() - expected).abs().max() / scale).item()


def rms_error(got, exact):
    return ((got.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_worked_by_hand(backend):
    x = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    weight = torch.tensor([[2.0, 3.0, 5.0]])  # two tokens ago, one ago, now
    state = torch.tensor([[[7.0, 8.0]]])  # oldest first
    y, end = short_conv(x, weight, torch.tensor([0.5]), state, backend=backend)
    assert y.flatten().tolist() == [14 + 24 + 5 + 0.5, 16 + 3 + 50 + 0.5, 2 + 30 + 500 + 0.5]
    assert end.flatten().tolist() == [10.0, 100.0]
    y, end = short_conv(x, weight, backend=backend)
    assert y.flatten().tolist() == [5.0, 3.0 + 50, 2 + 30 + 500.0]
    assert end is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 3, 33])
def test_equals_conv1d_with_its_gradients(backend, W, T):
    D = 6
    conv = nn.Conv1d(D, D, W, groups=D, padding=W - 1).double()
    x = randn(2, T, D).requires_grad_()
    expected = nn.functional.silu(conv(x.transpose(1, 2))[..., :T]).transpose(1, 2)
    weight, bias = conv.weight, conv.bias
    got, _ = short_conv(x, weight[:, 0], bias, activation="silu", backend=backend)
    assert relative_max(got, expected) < 1e-12
    cotangent = randn(2, T, D, seed=1)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight, bias), cotangent),
        torch.autograd.grad(expected, (x, weight, bias), cotangent),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize(
    ("bias", "state", "activation"),
    [(True, True, "silu"), (False, True, None), (True, False, None), (False, False, "silu")],
)
def test_torch_equals_reference_in_float64(T, W, bias, state, activation):
    args = inputs(2, T, 5, W, bias=bias, state=state)
    expected = outputs_and_gradients(args, "reference", activation)
    got = outputs_and_gradients(args, "torch", activation)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 20),
    D=st.integers(1, 9),
    W=st.integers(2, 4),
    bias=st.booleans(),
    state=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_torch_equals_reference_at_any_shape(B, T, D, W, bias, state):
    args = inputs(B, T, D, W, bias=bias, state=state)
    expected = outputs_and_gradients(args, "reference", "silu")
    for a, b in zip(outputs_and_gradients(args, "torch", "silu"), expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_float32_is_as_exact_as_the_fold(scale):
    args = inputs(2, 500, 16, 4)
    args["x"] *= scale
    args = {k: t.float() for k, t in args.items()}
    exact = outputs_and_gradients({k: t.double() for k, t in args.items()}, "reference", "silu")
    fold = outputs_and_gradients(args, "reference", "silu")
    got = outputs_and_gradients(args, "torch", "silu")
    for index, (a, f, e) in enumerate(zip(got, fold, exact, strict=True)):
        factor = 2 if index < 2 else 3
        assert rms_error(a, e) <= factor * rms_error(f, e) + 2**-23


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 5])
def test_gradcheck(backend, T):
    args = [t.requires_grad_() for t in inputs(2, T, 3, 4).values()]

    def function(*leaves):
        return short_conv(*leaves, activation="silu", backend=backend)

    assert torch.autograd.gradcheck(function, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("W", [2, 3, 4])
def test_every_split_hands_the_state_over(backend, W):
    args = inputs(2, 65, 4, W)
    x = args.pop("x")
    start = args.pop("state")
    y, end = short_conv(x, **args, state=start, activation="silu", backend=backend)
    for split in range(1, 65):
        head, middle = short_conv(
            x[:, :split], **args, state=start, activation="silu", backend=backend
        )
        tail, last = short_conv(
            x[:, split:], **args, state=middle, activation="silu", backend=backend
        )
        assert torch.allclose(torch.cat([head, tail], 1), y, rtol=0, atol=1e-13)
        assert torch.equal(last, end)


def test_a_zero_state_is_no_state():
    args = inputs(2, 9, 4, 3)
    args["state"].zero_()
    y, _ = short_conv(**args, backend="torch")
    args["state"] = None
    assert torch.allclose(y, short_conv(**args, backend="torch")[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend):
    args = inputs(2, 12, 6, 4)
    strided = {
        "x": randn(6, 24, 2)[:, ::2].permute(2, 1, 0),
        "weight": randn(4, 6).t(),
        "bias": randn(12)[::2],
        "state": randn(3, 6, 2).permute(2, 1, 0),
    }
    assert not any(t.is_contiguous() for t in strided.values())
    assert {k: t.shape for k, t in strided.items()} == {k: t.shape for k, t in args.items()}
    got = outputs_and_gradients(strided, backend)
    plain = {k: t.contiguous() for k, t in strided.items()}
    for a, b in zip(got, outputs_and_gradients(plain, backend), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    (gradient,) = torch.autograd.grad(
        short_conv(**{**args, "x": args["x"].requires_grad_()}, backend=backend)[0].sum(), args["x"]
    )  # the cotangent of a sum is an expanded scalar
    expected = torch.stack([args["weight"][:, 3 - min(3, 11 - t) :].sum(1) for t in range(12)])
    assert torch.allclose(gradient[0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("bias", [True, False])
def test_reduced_types_are_summed_in_float32(backend, dtype, tolerance, bias):
    args = inputs(2, 50, 8, 4, dtype, bias=bias)
    y, end = short_conv(**args, activation="silu", backend=backend)
    assert y.dtype == end.dtype == dtype
    exact, _ = short_conv(
        **{k: None if t is None else t.float() for k, t in args.items()},
        activation="silu",
        backend="torch",
    )
    # Only the output's own rounding separates the two.
    assert ((y.float() - exact).abs() <= tolerance * exact.abs() + 1e-6).all()


def test_the_state_does_not_keep_the_sequence_alive():
    for W in (2, 3, 4):
        _, end = short_conv(**inputs(1, 1000, 5, W), backend="torch")
        assert end.is_contiguous()
        assert end.untyped_storage().nbytes() == 5 * (W - 1) * 8


def test_inputs_are_left_alone():
    args = inputs(1, 6, 3, 4)
    before = {k: t.clone() for k, t in args.items()}
    short_conv(**args, activation="silu", backend="torch")
    short_conv(args["x"], args["weight"], backend="torch")
    short_conv_step(args["x"][:, 0], args["weight"], args["bias"], args["state"], "silu")
    assert all(torch.equal(args[k], before[k]) for k in args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 0, 4)}, r"x must be \(B, T, D\) with T >= 1"),
        ({"x": torch.zeros(2, 4)}, r"x must be \(B, T, D\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \(D, W\) with D = 4"),
        ({"weight": torch.zeros(4, 5)}, r"W in 2\.\.4"),
        ({"weight": torch.zeros(4, 1)}, r"W in 2\.\.4"),
        ({"bias": torch.zeros(3)}, r"bias must be \(D,\) = \(4,\)"),
        ({"state": torch.zeros(2, 4, 3)}, r"state must be \(B, D, W-1\) = \(2, 4, 2\)"),
        ({"state": torch.zeros(2, 4, 2).double()}, "state must have x's dtype"),
        ({"activation": "relu"}, "activation must be None or 'silu', got 'relu'"),
        ({"backend": "trition"}, "did you mean 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    args = {"x": torch.zeros(2, 6, 4), "weight": torch.zeros(4, 3), "backend": "torch"}
    with pytest.raises(ValueError, match=message):
        short_conv(**{**args, **changes})


def test_triton_is_refused_not_replaced():
    with pytest.raises(BackendUnavailableError, match="short_conv: backend 'triton' has no"):
        short_conv(torch.zeros(1, 2, 3).double(), torch.zeros(3, 4), backend="triton")
