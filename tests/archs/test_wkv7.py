import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv7_hf.ops_rwkv7 import rwkv7_recurrent
from torch import Tensor

from archs.ops import wkv7 as module
from archs.ops.wkv7 import (
    DECAY_BOUND,
    LOG_DECAY_FLOOR,
    log_decay_of,
    wkv7,
    wkv7_reference,
    wkv7_step,
    wkv7_torch,
)

NAMES = ("r", "log_decay", "k", "v", "a", "b", "state")
LENGTHS = (1, 2, 3, 17, 31, 32, 33, 63, 64, 65, 127, 1000)


def inputs(
    B=2,
    T=65,
    H=2,
    K=8,
    V=None,
    *,
    dtype=torch.float64,
    correlation=0.5,
    rate=None,
    decay=None,
    seed=0,
) -> list[Tensor]:
    """r, log_decay, k, v, a, b and a state as RWKV-7 makes them: a = -kappa, b = kappa * rate.

    `correlation` is that of the keys of different tokens, `rate` the in-context rate and `decay`
    the log decay as a part of its bound; None draws the last two at random.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def part(fixed: float | None) -> Tensor:
        drawn = torch.rand(B, T, H, K, generator=generator, dtype=torch.float64)
        return drawn if fixed is None else torch.full_like(drawn, fixed)

    V = K if V is None else V
    k = correlation**0.5 * normal(B, 1, H, K) + (1 - correlation) ** 0.5 * normal(B, T, H, K)
    kappa = torch.nn.functional.normalize(k, dim=-1)
    r, v, state = normal(B, T, H, K), normal(B, T, H, V), normal(B, H, K, V)
    tensors = [r, -DECAY_BOUND * part(decay), k / K**0.5, v, -kappa, kappa * part(rate), state]
    return [x.to(dtype) for x in tensors]


def with_gradients(function, tensors: list[Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Both outputs, and the gradients of every input for random gradients of both."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*tensors)
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs
    ]
    gradients = torch.autograd.grad(outputs, tensors, weights)
    return {
        "y": outputs[0].detach(),
        "end": outputs[1].detach(),
        **{f"d{name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)},
    }


def largest(got: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value (or 1e-3, where the right answer is nothing)."""
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


def rms(got: Tensor, expected: Tensor) -> float:
    return (
        (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    ).item()


# The definition.


def test_reference_equals_rwkv7_hf():
    r, log_decay, k, v, a, b, state = inputs(T=20, K=6, V=5)
    y, end = wkv7(r, log_decay, k, v, a, b, state, backend="reference")
    expected, expected_end = rwkv7_recurrent(r, log_decay.exp(), k, v, a, b, state)
    assert largest(y, expected) <= 1e-12
    assert largest(end, expected_end) <= 1e-12


def test_reference_gradients_against_finite_differences():
    tensors = [x.requires_grad_() for x in inputs(B=1, T=4, H=2, K=3, V=2)]
    assert torch.autograd.gradcheck(wkv7_reference, tensors)
    logits = torch.linspace(-4, 4, tensors[0].numel(), dtype=torch.float64)
    logits = logits.view_as(tensors[0]).requires_grad_()

    def from_logits(logits, *others):
        r, k, v, a, b, state = others
        return wkv7(r, None, k, v, a, b, state, decay_logits=logits, backend="reference")

    others = [tensors[0], *tensors[2:]]
    assert torch.autograd.gradcheck(from_logits, (logits, *others))


def test_step_by_hand():
    # K = 2, V = 1: decay to a half, move what lies along the first key to the second, write, read.
    r, k, v = torch.tensor([[[1.0, 10.0]]]), torch.tensor([[[0.0, 3.0]]]), torch.tensor([[[2.0]]])
    a, b = torch.tensor([[[-1.0, 0.0]]]), torch.tensor([[[0.5, -1.0]]])
    log_decay = torch.full((1, 1, 2), 0.5).log()
    y, state = wkv7_step(r, log_decay, k, v, a, b, torch.tensor([[[[4.0], [6.0]]]]))
    # removed = -4; state = (2, 3) + (0.5, -1) * -4 + (0, 3) * 2
    assert state.flatten().tolist() == [0.0, 13.0]
    assert y.item() == 130.0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_decay_logits_are_the_log_decay_behind_a_sigmoid(backend):
    r, _, k, v, a, b, state = inputs(T=40)
    logits = 3 * r
    got = wkv7(r, None, k, v, a, b, state, decay_logits=logits, backend=backend)
    log_decay = -torch.exp(torch.tensor(-0.5, dtype=torch.float64)) * torch.sigmoid(logits)
    expected = wkv7(r, log_decay, k, v, a, b, state, backend=backend)
    assert torch.equal(log_decay_of(logits), log_decay)
    assert largest(got[0], expected[0]) <= 1e-14
    assert largest(got[1], expected[1]) <= 1e-14


# The chunked form equals the definition.


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 2, 8, 8), (3, 1, 5, 11)])
def test_torch_equals_reference_in_float64(length, B, H, K, V):
    tensors = inputs(B, length, H, K, V)
    expected = with_gradients(wkv7_reference, tensors)
    got = with_gradients(wkv7_torch, tensors)
    for name, value in expected.items():
        assert got[name].dtype == torch.float64
        assert largest(got[name], value) <= 1e-10, name


def test_gradient_of_decay_logits():
    r, _, k, v, a, b, _ = inputs(T=70)
    results = []
    for backend in ("reference", "torch"):
        logits = (3 * r).detach().requires_grad_()
        y, _ = wkv7(r, None, k, v, a, b, decay_logits=logits, backend=backend)
        results.append(torch.autograd.grad(y.sin().sum(), logits)[0])
    assert results[0].abs().max() > 1e-2
    assert largest(results[1], results[0]) <= 1e-10


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 140),
    H=st.integers(1, 3),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    in_flight=st.sampled_from([1, 7, 128]),
    correlation=st.sampled_from([0.0, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_torch_equals_reference_at_odd_shapes(B, T, H, K, V, in_flight, correlation, seed):
    tensors = inputs(B, T, H, K, V, correlation=correlation, seed=seed)
    expected = with_gradients(wkv7_reference, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "IN_FLIGHT", in_flight)
        got = with_gradients(wkv7_torch, tensors)
    for name, value in expected.items():
        assert largest(got[name], value) <= 1e-10, name


@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("in_flight", [1, 8, 1000])
def test_result_does_not_depend_on_chunks_and_segments(monkeypatch, chunk, in_flight):
    tensors = inputs(T=150)
    expected = with_gradients(wkv7_torch, tensors)
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "IN_FLIGHT", in_flight)
    got = with_gradients(wkv7_torch, tensors)
    for name, value in expected.items():
        assert largest(got[name], value) <= 1e-12, name


def test_every_split_hands_the_state_over():
    tensors = inputs(T=65, K=8, V=5)
    state = tensors.pop()
    expected, expected_end = wkv7(*tensors, state, backend="torch")
    for split in range(1, 65):
        head, middle = wkv7(*(x[:, :split] for x in tensors), state, backend="torch")
        tail, end = wkv7(*(x[:, split:] for x in tensors), middle, backend="torch")
        assert largest(torch.cat((head, tail), dim=1), expected) <= 1e-12
        assert largest(end, expected_end) <= 1e-12


# Numerics.


@pytest.mark.parametrize("decay", [0.0, None, 1.0])
@pytest.mark.parametrize("rate", [0.0, None, 1.0])
@pytest.mark.parametrize("correlation", [0.9, 0.98])
def test_float32_error_is_that_of_the_fold(correlation, rate, decay):
    tensors = inputs(
        1, 192, 2, 64, correlation=correlation, rate=rate, decay=decay, dtype=torch.float32
    )
    tensors[6].zero_()  # an older state would hide the errors of what is written
    exact = with_gradients(wkv7_reference, [x.double() for x in tensors])
    fold = with_gradients(wkv7_reference, tensors)
    got = with_gradients(wkv7_torch, tensors)
    for name, value in exact.items():
        if not value.any():  # b = 0 leaves a without effect
            assert not got[name].any(), name
            continue
        factor = 2 if name in ("y", "end") else 3
        assert rms(got[name], value) <= factor * rms(fold[name], value) + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_types_are_as_near_as_the_fold(dtype):
    tensors = inputs(T=100, K=32, dtype=dtype)
    exact = with_gradients(wkv7_reference, [x.double() for x in tensors])
    state = tensors.pop().float()
    fold = with_gradients(wkv7_reference, [*tensors, state])
    got = with_gradients(wkv7_torch, [*tensors, state])
    for name, value in exact.items():
        assert got[name].dtype == fold[name].dtype, name
        assert rms(got[name], value) <= 2 * rms(fold[name], value) + 1e-6, name


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_out(backend, dtype):
    r, log_decay, k, v, a, b, state = inputs(T=5, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, end = wkv7(r, log_decay, k, v, a, b, state, backend=backend)
    assert (y.dtype, end.dtype) == (dtype, wide)
    # The decay may come in a wider type than the rest.
    y, end = wkv7(r, log_decay.to(wide), k, v, a, b, state.to(wide), backend=backend)
    assert (y.dtype, end.dtype) == (dtype, wide)


def adversarial() -> dict[str, list[Tensor]]:
    """Seven inputs each; float64."""
    cases = {
        "all tokens equal": [x[:, :1].expand_as(x) for x in inputs(T=100)[:6]] + inputs()[6:],
        "keys parallel, rate 1": inputs(T=100, correlation=1.0, rate=1.0, decay=0.0),
        "decay at its bound": inputs(T=100, decay=1.0),
        "no decay": inputs(T=100, decay=0.0),
    }
    large = inputs(T=100)
    cases["large values"] = [x * 1e4 if i in (0, 2, 3) else x for i, x in enumerate(large)]
    for log_decay in (-19.0, -50.0, -torch.inf):
        tensors = inputs(T=100)
        tensors[1][:, ::3, :, ::2] = log_decay
        cases[f"some log decays {log_decay}"] = tensors
    cases["no memory at all"] = inputs(T=100)
    cases["no memory at all"][1][:] = -torch.inf
    return cases


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", adversarial())
def test_adversarial_inputs(name, dtype):
    tensors = [x.to(dtype) for x in adversarial()[name]]
    under_the_floor = tensors[1].min() < LOG_DECAY_FLOOR
    exact = with_gradients(wkv7_reference, [x.double() for x in tensors])
    got = with_gradients(wkv7_torch, tensors)
    if dtype == torch.float32:
        tolerance = 5e-6
    else:
        tolerance = 10 * math.exp(LOG_DECAY_FLOOR) if under_the_floor else 1e-12
    for output, value in exact.items():
        assert largest(got[output].double(), value) <= tolerance, output


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_decay_logits_stay_finite(size):
    r, _, k, v, a, b, _ = inputs(T=80, dtype=torch.float32)
    logits = (size * r.sign()).requires_grad_()
    y, _ = wkv7(r, None, k, v, a, b, decay_logits=logits, backend="torch")
    expected, _ = wkv7(r, None, k, v, a, b, decay_logits=logits, backend="reference")
    assert largest(y, expected) <= 1e-5
    assert torch.autograd.grad(y.sum(), logits)[0].isfinite().all()


# Independence, layout and memory.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_causality_is_bit_exact(dtype):
    tensors = inputs(T=100, dtype=dtype)
    before, _ = wkv7_torch(*tensors)
    for position in (1, 31, 32, 50, 99):
        changed = [x.clone() for x in tensors]
        for x in changed[:6]:
            x[:, position] *= 0.5
        after, _ = wkv7_torch(*changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert (after[:, position] - before[:, position]).abs().max() > 1e-3


def test_heads_and_rows_are_independent():
    tensors = inputs(B=3, T=70, H=4)
    y, end = wkv7_torch(*tensors)
    alone, alone_end = wkv7_torch(*(x[1:2] for x in tensors))
    assert largest(alone, y[1:2]) <= 1e-13
    assert largest(alone_end, end[1:2]) <= 1e-13
    head = [x[:, :, 2:3] for x in tensors[:6]]
    alone, alone_end = wkv7_torch(*head, tensors[6][:, 2:3])
    assert largest(alone, y[:, :, 2:3]) <= 1e-13
    assert largest(alone_end, end[:, 2:3]) <= 1e-13


def test_non_contiguous_inputs_and_gradients():
    tensors = inputs(T=70)
    expected = with_gradients(wkv7_torch, tensors)
    strided = [torch.stack((x, x), dim=-1).transpose(0, 1)[..., 0].transpose(0, 1) for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    got = with_gradients(wkv7_torch, strided)
    for name, value in expected.items():
        assert largest(got[name], value) <= 1e-13, name
    # A gradient of y in another layout, and a scalar spread over it.
    r = tensors[0].requires_grad_()
    y, _ = wkv7_torch(*tensors)
    weight = y.detach().sin()
    (dense,) = torch.autograd.grad(y, r, weight, retain_graph=True)
    (strided_dr,) = torch.autograd.grad(
        y, r, weight.transpose(1, 2).contiguous().transpose(1, 2), retain_graph=True
    )
    assert torch.equal(dense, strided_dr)
    (summed,) = torch.autograd.grad(y.sum(), r, retain_graph=True)
    assert largest(summed, torch.autograd.grad(y, r, torch.ones_like(y))[0]) <= 1e-14


def test_every_output_is_written():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        for value in with_gradients(wkv7_torch, inputs(T=75)).values():
            assert value.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_state_in_state_out_and_inputs_unchanged(backend):
    tensors = inputs(T=40)
    kept = [x.clone() for x in tensors]
    y, end = wkv7(*tensors, backend=backend)
    assert end is not None
    assert all(torch.equal(x, before) for x, before in zip(tensors, kept, strict=True))
    y_zero, end_zero = wkv7(*tensors[:6], torch.zeros_like(tensors[6]), backend=backend)
    y_none, end_none = wkv7(*tensors[:6], backend=backend)
    assert torch.equal(y_none, y_zero)
    assert end_zero is not None
    assert end_none is None
    assert not torch.equal(y, y_zero)


def test_backward_keeps_the_inputs_and_little_else():
    B, T, H, K = 1, 4096, 2, 16
    tensors = [x.requires_grad_() for x in inputs(B, T, H, K, dtype=torch.float32)]
    own = {x.untyped_storage().data_ptr() for x in tensors}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        wkv7(*tensors, backend="torch")
    extra = sum(size for pointer, size in kept.items() if pointer not in own)
    # The log decay above its floor, and a state a segment.
    assert extra <= 1.1 * B * T * H * K * 4


# Errors.


def test_unknown_backends():
    tensors = inputs(T=3)
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        wkv7(*tensors, backend="torhc")


def test_exactly_one_of_log_decay_and_decay_logits():
    r, log_decay, k, v, a, b, state = inputs(T=3)
    for given_decay, logits in ((log_decay, log_decay), (None, None)):
        with pytest.raises(ValueError, match="either log_decay or decay_logits"):
            wkv7(r, given_decay, k, v, a, b, state, decay_logits=logits, backend="torch")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("r", (2, 3, 8), r"r must be \(B, T, H, K\)"),
        ("r", (2, 0, 2, 8), r"r must be \(B, T, H, K\) with T >= 1"),
        ("log_decay", (2, 3, 2, 1), "log_decay must have r's shape"),
        ("k", (2, 3, 2, 4), "k must have r's shape"),
        ("v", (2, 3, 1, 8), r"v must be \(B, T, H, V\)"),
        ("v", (2, 3, 16), r"v must be \(B, T, H, V\)"),
        ("a", (1, 3, 2, 8), "a must have r's shape"),
        ("b", (2, 4, 2, 8), "b must have r's shape"),
        ("state", (2, 2, 8, 4), r"state must be \(B, H, K, V\) = \(2, 2, 8, 8\)"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_shapes_are_checked(backend, name, shape, message):
    tensors = dict(zip(NAMES, inputs(T=3), strict=True))
    tensors[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"^wkv7: {message}") as error:
        wkv7(**tensors, backend=backend)
    assert "\n" not in str(error.value)


def test_decay_logits_are_checked():
    r, _, k, v, a, b, _ = inputs(T=3)
    with pytest.raises(ValueError, match="decay_logits must have r's shape"):
        wkv7(r, None, k, v, a, b, decay_logits=r[:, :1], backend="torch")


def test_signature_is_that_of_the_design():
    parameters = inspect.signature(wkv7).parameters
    assert list(parameters) == [
        "r",
        "log_decay",
        "k",
        "v",
        "a",
        "b",
        "state",
        "decay_logits",
        "plan",
        "backend",
    ]
    assert parameters["state"].default is None
    assert parameters["decay_logits"].default is None
