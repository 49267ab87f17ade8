import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from archs.ops import BackendUnavailableError
from archs.ops import ssd as ssd_module
from archs.ops.ssd import ssd
from harness import peer_calls
from harness.peer_calls import ssd_minimal_discrete

BACKENDS = ("reference", "torch")
LENGTHS = (1, 2, 3, 17, 63, 64, 65, 127, 1000)
OPTIONAL = ("state", "dt", "skip")


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(B=2, T=65, H=4, P=3, G=2, N=5, leave_out=()):
    args = {
        "x": randn(B, T, H, P),
        "log_decay": -F.softplus(randn(B, T, H, seed=1) - 1),
        "b": randn(B, T, G, N, seed=2),
        "c": randn(B, T, G, N, seed=3),
        "state": randn(B, H, P, N, seed=4),
        "dt": F.softplus(randn(B, T, H, seed=5)),
        "skip": randn(H, seed=6),
    }
    return {k: t for k, t in args.items() if k not in leave_out}


def cast(args, dtype):
    return {k: t.to(dtype) for k, t in args.items()}


def outputs_and_gradients(args, function, only=None):
    """y, the final state, then the gradient of every argument, by name."""
    leaves = {k: t.clone().requires_grad_() for k, t in args.items()}
    y, end = function(**leaves)
    loss = torch.zeros((), dtype=torch.float64)
    if only != "state":
        loss = loss + (y * randn(*y.shape, seed=7).to(y.dtype)).sum()
    if end is not None and only != "y":
        loss = loss + (end * randn(*end.shape, seed=8).to(end.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}
    return {"y": y.detach()} | ({} if end is None else {"end": end.detach()}) | named


def on(backend):
    return lambda **args: ssd(**args, backend=backend)


def assert_close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, e in expected.items():
        scale = e.abs().max().clamp_min(1e-30).item()
        error = (got[name].double() - e.double()).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error:.2e}"


def rms_error(got, exact):
    return ((got.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.fixture
def small_segments(monkeypatch):
    """Several segments within the short sequences of these tests."""
    monkeypatch.setattr(ssd_module, "SEGMENT_SIZE", 1)


def test_reference_equals_the_quadratic_form():
    # Equation (3) of arXiv 2405.21060: y = M x, M_ts = c_t^T A_t ... A_{s+1} b_s.
    args = inputs(B=1, T=6)
    y, end = ssd(**args, backend="reference")
    x, log_decay, b, c, state, dt, skip = (t.tolist() for t in args.values())
    for h in range(4):
        g = h // 2
        for p in range(3):
            for t in range(6):
                total = skip[h] * x[0][t][h][p]
                decayed = sum(log_decay[0][k][h] for k in range(t + 1))
                for n in range(5):
                    s_tn = state[0][h][p][n] * torch.tensor(decayed).double().exp().item()
                    for s in range(t + 1):
                        passed = sum(log_decay[0][k][h] for k in range(s + 1, t + 1))
                        written = dt[0][s][h] * x[0][s][h][p] * b[0][s][g][n]
                        s_tn += torch.tensor(passed).double().exp().item() * written
                    total += s_tn * c[0][t][g][n]
                    if t == 5:
                        assert abs(s_tn - end[0, h, p, n].item()) < 1e-6
                assert abs(total - y[0, t, h, p].item()) < 1e-6


@pytest.mark.parametrize(
    ("T", "leave_out"),
    [(T, leave_out) for T in LENGTHS for leave_out in ((), OPTIONAL)]
    + [(130, (name,)) for name in OPTIONAL],
)
def test_torch_equals_reference_in_float64(T, leave_out):
    args = inputs(T=T, leave_out=leave_out)
    expected = outputs_and_gradients(args, on("reference"))
    assert ("end" in expected) == ("state" in args)
    assert_close(outputs_and_gradients(args, on("torch")), expected, 1e-10)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 400])
@pytest.mark.parametrize("leave_out", [(), OPTIONAL])
def test_several_segments(T, leave_out, small_segments):
    args = inputs(B=1, T=T, leave_out=leave_out)
    spans = ssd_module._spans(args["x"], 5, 64)
    assert len(spans) == -(-T // 64)
    expected = outputs_and_gradients(args, on("reference"))
    assert_close(outputs_and_gradients(args, on("torch")), expected, 1e-10)


@pytest.mark.parametrize("chunk", [8, 16, 32, 128])
def test_the_chunk_does_not_matter(chunk, monkeypatch):
    args = inputs(T=150)
    expected = outputs_and_gradients(args, on("torch"))
    monkeypatch.setattr(ssd_module, "CHUNK", chunk)
    assert_close(outputs_and_gradients(args, on("torch")), expected, 1e-12)


@pytest.mark.parametrize(("H", "G"), [(1, 1), (4, 1), (4, 4), (6, 3)])
def test_groups(H, G):
    args = inputs(T=70, H=H, G=G)
    expected = outputs_and_gradients(args, on("reference"))
    assert_close(outputs_and_gradients(args, on("torch")), expected, 1e-10)
    per_head = args | {k: args[k].repeat_interleave(H // G, dim=2) for k in ("b", "c")}
    y, end = ssd(**per_head, backend="torch")
    assert_close({"y": y, "end": end}, {k: expected[k] for k in ("y", "end")}, 1e-12)


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 140),
    R=st.integers(1, 3),
    P=st.integers(1, 5),
    G=st.integers(1, 3),
    N=st.integers(1, 6),
    leave_out=st.sets(st.sampled_from(OPTIONAL)),
)
@settings(max_examples=25, deadline=None)
def test_torch_equals_reference_at_any_shape(B, T, R, P, G, N, leave_out):
    args = inputs(B, T, R * G, P, G, N, leave_out)
    expected = outputs_and_gradients(args, on("reference"))
    got = outputs_and_gradients(args, on("torch"))
    for name, e in expected.items():
        assert (got[name] - e).abs().max() <= 1e-10 * e.abs().max().clamp_min(1e-2), name


@pytest.mark.parametrize("only", ["y", "state"])
def test_gradients_of_one_result_alone(only, small_segments):
    args = inputs(T=130)
    expected = outputs_and_gradients(args, on("reference"), only)
    assert_close(outputs_and_gradients(args, on("torch"), only), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leave_out", [(), OPTIONAL])
def test_gradcheck(backend, leave_out):
    args = inputs(B=1, T=11, H=2, P=2, G=1, N=3, leave_out=leave_out)
    leaves = [t.requires_grad_() for t in args.values()]

    def function(*values):
        y, end = ssd(**dict(zip(args, values, strict=True)), backend=backend)
        return y if end is None else (y, end)

    assert torch.autograd.gradcheck(function, leaves)


DECAYS = {
    "as Mamba-2 starts": lambda z: -F.softplus(z - 4) * torch.linspace(1, 16, 4),
    "none": lambda z: 0 * z,
    "subnormal within a chunk": lambda z: -1.5 + 0 * z,
    "nearly total": lambda z: -16 + 0 * z,
    "resets": lambda z: torch.where(z > 1.6, -1000.0, -1e-3),
    "total": lambda z: torch.where(z > 1.6, -torch.inf, -1e-3),
    "every scale": lambda z: -torch.exp(3 * z),
    "growth": lambda z: 0.01 + 0 * z,
}
TOKENS = {
    "random": lambda args: args,
    "all equal": lambda args: (
        args | {k: args[k][:, :1].expand_as(args[k]) for k in ("x", "b", "c")}
    ),
    "b and c correlated at 0.98": lambda args: (
        args | {k: 0.98**0.5 * args["b"][:, :1] + 0.02**0.5 * args[k] for k in ("b", "c")}
    ),
    "huge dt": lambda args: args | {"dt": 1e4 * args["dt"]},
    "large b and c": lambda args: args | {"b": 1e3 * args["b"], "c": 1e3 * args["c"]},
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_float32_is_as_exact_as_the_fold(decay, tokens):
    args = TOKENS[tokens](inputs(B=1, T=150, P=8, N=8))
    args["log_decay"] = DECAYS[decay](args["log_decay"].neg().expm1().log())
    args = cast(args, torch.float32)
    exact = outputs_and_gradients(cast(args, torch.float64), on("reference"))
    fold = outputs_and_gradients(args, on("reference"))
    got = outputs_and_gradients(args, on("torch"))
    for name, e in exact.items():
        assert got[name].isfinite().all(), name
        factor = 2 if name in ("y", "end") else 3
        bound = factor * rms_error(fold[name], e) + 2**-23  # and one rounding
        assert rms_error(got[name], e) <= bound, name


@pytest.mark.parametrize("rate", [0.0, 0.01, 1.0, 3.0, 30.0, 1e4])
def test_pairwise_decay(rate):
    log_decay = -rate * randn(3, 64).abs()
    sums = log_decay.cumsum(1)
    expected = (sums[:, :, None] - sums[:, None]).tril().exp().tril()
    got = ssd_module._pairwise_decay(log_decay.float())
    tiny = torch.finfo(torch.float32).tiny
    # Products with ordinary numbers stay clear of the slow subnormal range.
    assert ((got == 0) | (got > 1e6 * tiny)).all()
    assert torch.allclose(got.double(), expected, rtol=1e-5 * max(rate, 1), atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_split_hands_the_state_over(backend):
    args = inputs(B=1)
    over_time = ("x", "log_decay", "b", "c", "dt")
    y, end = ssd(**args, backend=backend)
    for split in range(1, 65):
        head = args | {k: args[k][:, :split] for k in over_time}
        tail = args | {k: args[k][:, split:] for k in over_time}
        y_head, middle = ssd(**head, backend=backend)
        y_tail, last = ssd(**(tail | {"state": middle}), backend=backend)
        assert torch.allclose(torch.cat([y_head, y_tail], 1), y, rtol=0, atol=1e-12)
        assert torch.allclose(last, end, rtol=0, atol=1e-12)


def test_a_token_never_reaches_an_earlier_one():
    args = cast(inputs(T=130), torch.float32)
    y, _ = ssd(**args, backend="torch")
    for k in ("x", "log_decay", "b", "c", "dt"):
        changed = args | {k: args[k].clone()}
        changed[k][:, 100] *= 2
        z, _ = ssd(**changed, backend="torch")
        assert torch.equal(z[:, :100], y[:, :100])
        assert not torch.equal(z[:, 100:], y[:, 100:])


def test_rows_are_independent_and_repeats_identical():
    args = cast(inputs(B=3, T=130), torch.float32)
    first = outputs_and_gradients(args, on("torch"))
    for _ in range(5):
        again = outputs_and_gradients(args, on("torch"))
        assert all(torch.equal(again[k], first[k]) for k in first)
    order = torch.tensor([1, 0, 2])
    permuted = {k: t if k == "skip" else t[order] for k, t in args.items()}
    y, end = ssd(**permuted, backend="torch")
    got = {"y": y, "end": end}
    assert_close(got, {k: first[k][order] for k in got}, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend, small_segments):
    args = inputs(T=70)
    strided = {}
    for name, t in args.items():
        wide = torch.stack([t, -t], dim=-1).transpose(0, -2)
        strided[name] = wide[..., 0].transpose(0, -1) if t.ndim > 1 else wide[..., 0]
        assert not strided[name].is_contiguous()
        assert torch.equal(strided[name], t)

    def function(**leaves):
        restrided = {k: torch.empty_like(strided[k]).copy_(t) for k, t in leaves.items()}
        return ssd(**restrided, backend=backend)

    expected = outputs_and_gradients(args, on(backend))
    assert_close(outputs_and_gradients(strided, function), expected, 1e-12)
    assert_close(outputs_and_gradients(strided, on(backend)), expected, 1e-12)


def test_gradient_of_a_plain_sum():
    # The cotangent of a sum is an expanded scalar.
    args = inputs(T=70)
    gradients = []
    for backend in BACKENDS:
        leaves = {k: t.clone().requires_grad_() for k, t in args.items()}
        ssd(**leaves, backend=backend)[0].sum().backward()
        gradients.append({k: t.grad for k, t in leaves.items()})
    assert_close(gradients[1], gradients[0], 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_reduced_types_are_summed_in_float32(backend, dtype, tolerance):
    args = cast(inputs(T=130), torch.float32)
    args |= {k: args[k].to(dtype) for k in ("x", "b", "c")}
    y, end = ssd(**args, backend=backend)
    assert y.dtype == dtype
    assert end.dtype == torch.float32
    exact, exact_end = ssd(**cast(args, torch.float64), backend="reference")
    # Only the output's own rounding separates the two.
    assert ((y.double() - exact).abs() <= tolerance * exact.abs() + 1e-4).all()
    assert (end.double() - exact_end).abs().max() <= 1e-5 * exact_end.abs().max()
    gradients = outputs_and_gradients(args, on(backend))
    for name, t in args.items():
        assert gradients[f"d{name}"].dtype == t.dtype


def test_inputs_are_left_alone(small_segments):
    args = inputs(T=128, G=1)  # whole chunks of one group: the operation sees these very tensors
    before = {k: t.clone() for k, t in args.items()}
    y, end = ssd(**{k: t.requires_grad_() for k, t in args.items()}, backend="torch")
    cotangents = [torch.ones_like(y), torch.ones_like(end)]
    torch.autograd.backward([y, end], cotangents)
    assert all(torch.equal(args[k], before[k]) for k in args)
    assert all((t == 1).all() for t in cotangents)


def test_memory_kept_for_the_backward_pass_is_that_of_the_inputs():
    args = cast(inputs(B=1, T=1024, H=4, P=16, G=1, N=16, leave_out=OPTIONAL), torch.float32)
    leaves = {k: t.requires_grad_() for k, t in args.items()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ssd(**leaves, backend="torch")
    given_bytes = sum(t.untyped_storage().nbytes() for t in args.values())
    assert sum(kept.values()) <= 1.1 * given_bytes


def test_compiles_without_a_graph_break():
    args = inputs(T=70)
    compiled = torch.compile(on("torch"), fullgraph=True, backend="eager")
    expected = outputs_and_gradients(args, on("torch"))
    assert_close(outputs_and_gradients(args, compiled), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("chunk", "G"), [(32, 1), (64, 1), (128, 1), (64, 2)])
def test_parity_with_mamba_ssm(backend, chunk, G):
    B, T, H, P, N = 2, 256, 4, 16, 32
    args = inputs(B, T, H, P, G, N, leave_out=("skip",))
    args["dt"] = F.softplus(randn(B, T, H, seed=9) - 4)
    args["log_decay"] = -args["dt"] * torch.linspace(1, 16, H)
    args = cast(args, torch.float32)
    minimal = ssd_minimal_discrete()

    def peer(x, log_decay, b, c, state, dt):
        b, c = (t.repeat_interleave(H // G, dim=2) for t in (b, c))
        return minimal(x * dt[..., None], log_decay, b, c, chunk, state[:, None])

    expected = outputs_and_gradients(args, peer)
    assert_close(outputs_and_gradients(args, on(backend)), expected, 1e-5)


def test_loading_the_peer_leaves_no_stand_in_behind(monkeypatch):
    stand_in = "mamba_ssm.ops.triton.ssd_combined"
    monkeypatch.delitem(sys.modules, stand_in, raising=False)
    ssd_minimal_discrete.__wrapped__()
    assert stand_in not in sys.modules
    monkeypatch.setitem(sys.modules, stand_in, sys)  # as if the real one had been imported
    ssd_minimal_discrete.__wrapped__()
    assert sys.modules[stand_in] is sys


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(peer_calls, "find_spec", lambda name: None)
    command = r"MAMBA_SKIP_CUDA_BUILD=TRUE .*==2\.3"
    with pytest.raises(peer_calls.PeerUnavailableError, match=command):
        ssd_minimal_discrete.__wrapped__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 0, 4, 3)}, r"x must be \(B, T, H, P\) with T >= 1"),
        ({"x": torch.zeros(2, 65, 4)}, r"x must be \(B, T, H, P\)"),
        ({"log_decay": torch.zeros(2, 65, 3)}, r"log_decay must be \(B, T, H\) = \(2, 65, 4\)"),
        ({"b": torch.zeros(2, 65, 3, 5)}, "G a divisor of H = 4"),
        ({"b": torch.zeros(2, 64, 2, 5)}, r"b must be \(B, T, G, N\) with B = 2, T = 65"),
        ({"c": torch.zeros(2, 65, 2, 4)}, r"c must be b's \(B, T, G, N\) = \(2, 65, 2, 5\)"),
        ({"state": torch.zeros(2, 4, 5, 3)}, r"state must be \(B, H, P, N\) = \(2, 4, 3, 5\)"),
        ({"dt": torch.zeros(2, 65)}, r"dt must be \(B, T, H\)"),
        ({"skip": torch.zeros(4, 3)}, r"skip must be \(H,\) = \(4,\)"),
        ({"backend": "tensor"}, "unknown backend 'tensor'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ssd(**(inputs() | {"backend": "torch"} | changes))


def test_triton_is_refused_not_replaced():
    with pytest.raises(BackendUnavailableError, match="ssd"):
        ssd(**inputs(T=2), backend="triton")
