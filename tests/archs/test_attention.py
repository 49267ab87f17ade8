"""The attention operation: both backends against a dense oracle written here, in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from archs.ops import attention as module
from archs.ops.attention import attention, attention_reference, attention_step, attention_torch

LENGTHS = [1, 2, 3, 17, 63, 64, 65, 127, 1000]


def dense(q, k, v, window=None, lengths=None):
    """Attention with one full mask and repeated heads: slow, and nothing like the code tested."""
    B, T, H, K = q.shape
    S = k.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    total = torch.full((B,), S) if lengths is None else lengths
    visible = torch.zeros(B, T, S, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            position = int(total[b]) - T + t
            first = 0 if window is None else max(0, position - window + 1)
            visible[b, t, first : max(0, position + 1)] = True
    scores = torch.einsum("bthk,bshk->bhts", q, k) / K**0.5
    weights = torch.where(visible[:, None], scores, -torch.inf).exp()
    # Exponentials without a shift: the oracle is for logits that float64 can take.
    total_weight = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total_weight == 0, 1.0, total_weight)
    return torch.einsum("bhts,bshk->bthk", weights, v)


def inputs(B, T, S, H, H_kv, K, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, K), (B, S, H_kv, K), (B, S, H_kv, K)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def run(function, tensors, **options):
    """Output and gradients under a fixed, uneven output gradient."""
    y = function(*tensors, **options)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, tensors, weight.roll(7, -1))]


def deviation(got, want):
    """max|got - want| / max|want|; absolute where the exact result is zero."""
    scale = float(want.detach().double().abs().max())
    error = float((got.detach().double() - want.detach().double()).abs().max())
    return error / (scale if scale > 1e-14 else 1.0)


def rms(got, want):
    """Root of the mean squared error over that of the exact result."""
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def assert_close(got, want, limit=1e-10):
    for name, a, b in zip(["y", "dq", "dk", "dv"], got, want, strict=True):
        assert deviation(a, b) <= limit, name


# T, S, H, H_kv, window
CASES = [
    (1, 1, 2, 2, None),
    (1, 9, 4, 2, None),
    (1, 9, 4, 1, 4),
    (6, 6, 4, 2, None),
    (6, 6, 2, 2, 1),
    (6, 6, 2, 1, 3),
    (6, 6, 2, 1, 5),
    (6, 6, 2, 1, 100),
    (5, 11, 4, 2, None),
    (5, 11, 4, 2, 2),
    (5, 11, 4, 2, 7),
    (5, 11, 4, 2, 10),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("T", "S", "H", "H_kv", "window"), CASES)
def test_both_backends_equal_dense_attention(T, S, H, H_kv, window, backend):
    tensors = inputs(2, T, S, H, H_kv, 6)
    got = run(attention, tensors, window=window, backend=backend)
    assert_close(got, run(dense, tensors, window=window))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("T", [1, 4])
def test_ragged_rows_equal_dense_attention(T, window, backend):
    tensors = inputs(4, T, 11, 4, 2, 6)
    lengths = torch.tensor([11, 4, 2, 0])  # with T = 4 two rows have queries without keys
    got = run(attention, tensors, window=window, lengths=lengths, backend=backend)
    assert_close(got, run(dense, tensors, window=window, lengths=lengths))


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("history", [0, 37])
@pytest.mark.parametrize("T", LENGTHS)
def test_torch_equals_reference_at_any_length(T, history, window):
    tensors = inputs(1, T, T + history, 2, 1, 4)
    want = run(attention_reference, tensors, window=window)
    assert_close(run(attention_torch, tensors, window=window), want)


@pytest.mark.parametrize("window", [None, 290])
def test_torch_equals_reference_for_ragged_rows_over_several_blocks(window):
    tensors = inputs(3, 600, 700, 2, 1, 4)
    lengths = torch.tensor([20, 700, 640])
    got = run(attention_torch, tensors, window=window, lengths=lengths)
    assert_close(got, run(dense, tensors, window=window, lengths=lengths))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_torch_equals_dense_attention_for_odd_shapes(data):
    T = data.draw(st.integers(1, 23), "T")
    S = T + data.draw(st.integers(0, 19), "history")
    H_kv = data.draw(st.integers(1, 3), "H_kv")
    H = H_kv * data.draw(st.integers(1, 3), "group")
    B, K = data.draw(st.integers(1, 3), "B"), data.draw(st.integers(1, 9), "K")
    window = data.draw(st.none() | st.integers(1, S + 3), "window")
    ragged = data.draw(st.none() | st.lists(st.integers(0, S), min_size=B, max_size=B), "lengths")
    lengths = None if ragged is None else torch.tensor(ragged)
    tensors = inputs(B, T, S, H, H_kv, K, seed=T)
    want = run(dense, tensors, window=window, lengths=lengths)
    with mock.patch.object(module, "QUERY_BLOCK", data.draw(st.integers(1, 9), "block")):
        got = run(attention_torch, tensors, window=window, lengths=lengths)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("history", [0, 100])
@pytest.mark.parametrize("T", [65, 600])
def test_float32_error_is_that_of_the_float32_reference(T, history, window):
    tensors = inputs(1, T, T + history, 4, 2, 16, torch.float32)
    exact = run(dense, [x.detach().double().requires_grad_() for x in tensors], window=window)
    fold = run(attention_reference, tensors, window=window)
    ours = run(attention_torch, tensors, window=window)
    for i, (a, b, want) in enumerate(zip(ours, fold, exact, strict=True)):
        assert rms(a, want) <= (2 if i == 0 else 3) * rms(b, want) + 2e-7


@pytest.mark.parametrize("lengths", [None, [6, 3]])
@pytest.mark.parametrize("window", [None, 2])
def test_gradients_of_the_reference(window, lengths):
    tensors = inputs(2, 4, 6, 2, 1, 3)
    ragged = None if lengths is None else torch.tensor(lengths)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_reference(q, k, v, window=window, lengths=ragged), tensors
    )


@pytest.mark.parametrize("window", [None, 70])
def test_inputs_need_not_be_contiguous(window):
    q, k, v = inputs(2, 300, 300, 4, 2, 8)
    want = run(attention_torch, [q, k, v], window=window)
    heads_first = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    every_other = [x.detach().repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]
    for views in (heads_first, every_other):
        assert not views[0].is_contiguous()
        assert_close(run(attention_torch, [x.requires_grad_() for x in views], window=window), want)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("T", "S", "window"), [(300, 300, None), (300, 340, None), (300, 340, 60)])
def test_later_keys_change_nothing(T, S, window, backend):
    q, k, v = (x.detach() for x in inputs(1, T, S, 2, 1, 8, torch.float32))
    before = attention(q, k, v, window=window, backend=backend)
    cut = T // 2
    k[:, S - T + cut :], v[:, S - T + cut :] = 9.0, -9.0
    after = attention(q, k, v, window=window, backend=backend)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut], after[:, cut])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_keys_before_the_window_change_nothing(backend):
    q, k, v = (x.detach() for x in inputs(1, 300, 300, 2, 1, 8, torch.float32))
    before = attention(q, k, v, window=40, backend=backend)
    k[:, :100], v[:, :100] = 9.0, -9.0
    after = attention(q, k, v, window=40, backend=backend)
    assert torch.equal(before[:, 139:], after[:, 139:])
    assert not torch.equal(before[:, 138], after[:, 138])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("T", [1, 3])
def test_keys_past_a_rows_length_change_nothing(T, backend):
    q, k, v = (x.detach() for x in inputs(2, T, 9, 4, 2, 8, torch.float32))
    lengths = torch.tensor([5, 9])
    before = attention(q, k, v, lengths=lengths, backend=backend)
    alone = attention(q[:1], k[:1, :5], v[:1, :5], backend=backend)
    k[0, 5:], v[0, 5:] = 9.0, -9.0
    assert torch.equal(before, attention(q, k, v, lengths=lengths, backend=backend))
    torch.testing.assert_close(before[:1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("T", [1, 3])
def test_a_query_without_keys_yields_zero_and_no_gradient(T, backend):
    tensors = inputs(2, T, 5, 2, 1, 4, torch.float32)
    y, *gradients = run(attention, tensors, lengths=torch.tensor([0, 5]), backend=backend)
    for tensor in (y, *gradients):
        assert not tensor[0].any()
        assert tensor[1].isfinite().all()
        assert tensor[1].any()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("logit", [80, -80, 200])
def test_large_logits(logit, window, backend):
    # Of this size for every third key, small for the others; exp(200) is no float32.
    q, k, v = (x.detach() for x in inputs(1, 70, 70, 1, 1, 4, torch.float32))
    q[..., 0], k[..., 0] = 16.0, 0.0
    k[:, ::3, :, 0] = logit / 8
    tensors = [x.requires_grad_() for x in (q, k, v)]
    exact = run(dense, [x.detach().double().requires_grad_() for x in tensors], window=window)
    got = run(attention, tensors, window=window, backend=backend)
    assert all(x.isfinite().all() for x in got)
    # A rounding of the logit is a relative error of the weight.
    assert_close(got, exact, abs(logit) * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", [None, 20])
def test_equal_keys_give_the_mean_of_the_visible_values(window, backend):
    q, k, v = (x.detach() for x in inputs(1, 300, 300, 1, 1, 4, torch.float32))
    k[:] = k[:, :1]
    y = attention(q, k, v, window=window, backend=backend)
    for t in (0, 1, 25, 299):
        first = 0 if window is None else max(0, t + 1 - window)
        torch.testing.assert_close(y[:, t], v[:, first : t + 1].mean(1), rtol=0, atol=1e-6)


def test_correlated_keys_do_not_cost_accuracy():
    q, k, v = (x.detach() for x in inputs(1, 200, 200, 2, 2, 16, torch.float32))
    k = 0.98 * k[:, :1] + 0.02 * k
    tensors = [x.requires_grad_() for x in (8 * q, k, v)]
    exact = run(dense, [x.detach().double().requires_grad_() for x in tensors])
    fold, ours = run(attention_reference, tensors), run(attention_torch, tensors)
    for i, (a, b, want) in enumerate(zip(ours, fold, exact, strict=True)):
        assert rms(a, want) <= (2 if i == 0 else 3) * rms(b, want) + 2e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 30])
def test_reduced_types_stay_and_keep_their_accuracy(dtype, window):
    tensors = inputs(1, 100, 120, 4, 2, 16, dtype)
    exact = dense(*(x.double() for x in tensors), window=window)
    # The reference rounds once, at the end; the fused kernel may double that.
    for backend, roundings in (("reference", 0.25), ("torch", 0.5)):
        y = attention(*tensors, window=window, backend=backend)
        assert y.dtype == dtype
        assert rms(y, exact) <= roundings * torch.finfo(dtype).eps
        one = attention(tensors[0][:, -1:], *tensors[1:], window=window, backend=backend)
        assert one.dtype == dtype
        assert rms(one, exact[:, -1:]) <= 2 * roundings * torch.finfo(dtype).eps


def sdpa_calls(*tensors, **options):
    """The (queries, keys, mask, is_causal) of every fused call; keys and values are no copies."""
    calls = []
    given = {x.untyped_storage().data_ptr() for x in tensors}

    def spy(q, k, v, attn_mask=None, is_causal=False, **rest):
        assert {x.untyped_storage().data_ptr() for x in (k, v)} <= given
        calls.append((q.shape[2], k.shape[2], attn_mask, is_causal))
        return scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, **rest
        )

    with mock.patch.object(module, "scaled_dot_product_attention", spy):
        attention_torch(*tensors, **options)
    return calls


def test_plain_causal_attention_is_one_call_without_mask():
    assert sdpa_calls(*inputs(1, 600, 600, 2, 1, 4)) == [(600, 600, None, True)]
    assert sdpa_calls(*inputs(1, 600, 600, 2, 1, 4), window=600) == [(600, 600, None, True)]


@pytest.mark.parametrize("window", [None, 50])
def test_a_decode_step_has_no_mask_and_reads_each_key_head_once(window):
    (call,) = sdpa_calls(*inputs(1, 1, 600, 6, 2, 4), window=window)
    assert call == (3, window or 600, None, False)  # the group's 3 heads as queries


def test_a_window_costs_a_band():
    calls = sdpa_calls(*inputs(1, 2000, 2000, 2, 1, 4), window=100)
    assert sum(queries for queries, *_ in calls) == 2000
    for queries, keys, mask, is_causal in calls:
        assert not is_causal
        assert queries <= 256
        assert keys <= queries + 99
        assert mask.shape == (queries, keys)


def test_a_history_never_makes_a_full_mask():
    for queries, keys, mask, is_causal in sdpa_calls(*inputs(1, 1000, 1500, 2, 1, 4)):
        assert not is_causal  # PyTorch aligns it at the start
        assert queries <= 256
        assert mask.shape == (queries, keys)


@pytest.mark.parametrize(("T", "window"), [(300, None), (300, 64), (1, None), (100, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_queries_run_in_the_fused_kernel(T, window, dtype):
    tensors = inputs(1, T, 300, 4, 2, 16, dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises if it cannot
        found = run(attention_torch, tensors, window=window)
    assert all(x.isfinite().all() for x in found)


def test_window_gradients_take_memory_linear_in_the_length():
    # Plain slices would pad the gradients of every block to the whole length.
    def allocated(T):
        y = attention_torch(*inputs(1, T, T, 1, 1, 4), window=16)
        with torch.profiler.profile(profile_memory=True) as profile:
            y.sum().backward()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    assert allocated(8192) < 5 * allocated(2048)


@pytest.mark.parametrize(("T", "S", "window"), [(40, 40, None), (600, 700, 50), (1, 40, None)])
def test_compiles_without_graph_breaks(T, S, window):
    tensors = inputs(1, T, S, 2, 1, 4)
    compiled = torch.compile(attention_torch, fullgraph=True, backend="aot_eager")
    assert_close(
        run(compiled, tensors, window=window), run(attention_torch, tensors, window=window)
    )


def test_a_step_is_attention_with_one_query():
    q, k, v = inputs(2, 1, 9, 4, 2, 6)
    for window in (None, 4):
        y = attention_step(q[:, 0], k, v, window=window)
        assert deviation(y, dense(q, k, v, window=window)[:, 0]) <= 1e-12


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 3, 2), (1, 3, 2, 4)), {}, "expected q"),
        (((1, 3, 2, 4), (2, 3, 2, 4)), {}, "batch and head size"),
        (((1, 3, 2, 4), (1, 3, 2, 5)), {}, "batch and head size"),
        (((1, 3, 3, 4), (1, 3, 2, 4)), {}, "multiple of H_kv"),
        (((1, 4, 2, 4), (1, 3, 2, 4)), {}, "4 queries and 3 keys"),
        (((1, 0, 2, 4), (1, 3, 2, 4)), {}, "0 queries"),
        (
            ((1, 3, 2, 4), (1, 3, 2, 4)),
            {"lengths": torch.empty(1, dtype=int, device="meta")},
            "on cpu",
        ),
        (((1, 3, 2, 4), (1, 3, 2, 4)), {"window": 0}, "window must be at least 1"),
        (((1, 3, 2, 4), (1, 3, 2, 4)), {"lengths": torch.tensor([1, 2])}, "1 integers"),
        (((1, 3, 2, 4), (1, 3, 2, 4)), {"lengths": torch.tensor([1.0])}, "1 integers"),
        (((1, 3, 2, 4), (1, 3, 2, 4)), {"lengths": torch.tensor([4])}, r"lie in \[0, 3\]"),
        (((1, 3, 2, 4), (1, 3, 2, 4)), {"lengths": torch.tensor([-1])}, r"lie in \[0, 3\]"),
        (((1, 3, 2, 4), (1, 3, 2, 4)), {"backend": "tocrh"}, "did you mean 'torch'"),
    ],
)
def test_wrong_arguments_are_named(shapes, options, message):
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **{"backend": "torch", **options})


def test_one_type_for_all():
    q = torch.zeros(1, 3, 2, 4)
    for wrong in ((q.half(), q, q), (q, q.half(), q), (q, q, q.half())):
        with pytest.raises(ValueError, match="q, k and v must have one type, got"):
            attention(*wrong, backend="reference")


def test_values_must_match_keys():
    q, k = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match="expected q"):
        attention(q, k, k[:, 1:], backend="torch")
