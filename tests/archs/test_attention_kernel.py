"""Attention's Triton kernels against the fold in float64, in the interpreter without a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archs.ops import BackendUnavailableError
from archs.ops import attention as op
from archs.ops.attention import AttentionPlan, attention
from attention_checks import (
    ONE,
    TILES,
    check,
    exact_results,
    inputs,
    ragged,
    results,
    strided,
    visible,
)
from harness import traffic
from kernel_checks import (
    DEVICE,
    LENGTHS,
    assert_same,
    guarded_allocations,
    in_margins,
    interpreted,
    on_a_gpu,
    randn,
    relative_rms,
)

pytest.importorskip("triton")
import triton
import triton.language as tl

from archs.ops import attention_kernel as kernels
from archs.ops.attention_forward_kernel import head, places

KERNELS = {f"attention_{name}_kernel" for name in ("forward", "dq", "dkv")}


@pytest.mark.parametrize("T", LENGTHS)
def test_every_length(T):
    check(inputs(1, T, T, 2, 1, 32))


@pytest.mark.parametrize("K", [2, 8, 16, 48, 64, 80, 96, 128, 200, 256])
def test_every_head_size(K):
    check(inputs(2, 70, 70, 2, 2, K))


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("T", [1, 63, 300])
def test_float16(T, K):
    check(inputs(1, T, T, 2, 1, K, dtype=torch.float16))


def test_products_that_float16_cannot_hold():
    args = inputs(1, 20, 20, 1, 1, 16, dtype=torch.float16)
    args["v"][:] = 300.0
    leaves = [x.requires_grad_() for x in args.values()]
    y = attention(**args, backend="triton")
    for gradient in torch.autograd.grad(y, leaves, torch.full_like(y, 300.0)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("history", [1, 30, 31, 62, 64, 200])
@pytest.mark.parametrize("window", [None, 1, 17, 64, 65, 500])
def test_a_history(history, window):
    check(inputs(1, 70, 70 + history, 2, 1, 16), TILES, window=window)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 95, 100, 127, 128, 299, 300])
def test_windows(window):
    check(inputs(1, 300, 300, 1, 1, 16), window=window)


@pytest.mark.parametrize(("H", "H_kv"), [(4, 4), (4, 2), (6, 2), (5, 1)])
def test_grouped_queries(H, H_kv):
    check(inputs(2, 40, 90, H, H_kv, 16), TILES)
    check(inputs(2, 3, 90, H, H_kv, 16), AttentionPlan("decode", 2))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("plan", [TILES, ONE, AttentionPlan("decode", 3)])
def test_ragged_rows(plan, window):
    args = inputs(4, 5, 130, 2, 1, 32)
    lengths = ragged(130, 70, 3, 0)
    check(args, plan, window=window, lengths=lengths)
    y = attention(**args, lengths=lengths, window=window, plan=plan, backend="triton")
    assert not y[2, :2].any()  # queries before the first key
    assert not y[3].any()
    assert y[2, 2:].all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_type_never_lead_outside(dtype):
    """Where the CPU does not look at them, as on a GPU, the kernels do."""
    q, k, v = inputs(2, 70, 100, 1, 1, 16).values()
    for plan in (TILES, AttentionPlan("decode", 2)):
        few = q if plan == TILES else q[:, -5:]
        expected = kernels.attention_op(few, k, v, ragged(100, 0).to(dtype), None, *plan)
        got = kernels.attention_op(few, k, v, ragged(2**30, -5).to(dtype), None, *plan)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
def test_lengths_in_any_strides(plan):
    args = inputs(2, 4, 90, 2, 1, 16)
    for lengths in (ragged(90, 50, 7).expand(2, 3)[0, ::2], ragged(60).expand(2)):
        assert not lengths.is_contiguous()
        expected = results(args, "triton", plan=plan, lengths=lengths.clone())
        assert_same(results(args, "triton", plan=plan, lengths=lengths), expected)


@pytest.mark.parametrize("T", [1, 70])
def test_no_rows(T):
    found = results(inputs(0, T, 90, 2, 1, 16), "triton")
    assert [x.shape for x in found.values()] == [
        (0, T, 2, 16),
        (0, T, 2, 16),
        *[(0, 90, 1, 16)] * 2,
    ]


@given(data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_shape(data):
    B, H_kv = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    group, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    S = T + data.draw(st.integers(0, 70))
    K = data.draw(st.sampled_from([4, 16, 24, 32]))
    window = data.draw(st.none() | st.integers(1, S + 3))
    lengths = data.draw(st.none() | st.lists(st.integers(0, S), min_size=B, max_size=B))
    plan = TILES
    if T * group <= op.DECODE_ROWS and data.draw(st.booleans()):
        plan = AttentionPlan("decode", data.draw(st.integers(1, 4)))
    check(
        inputs(B, T, S, H_kv * group, H_kv, K),
        plan,
        data.draw(st.sampled_from([True, False, False])),
        window=window,
        lengths=None if lengths is None else ragged(*lengths),
    )


@pytest.mark.parametrize("size", [80, -80])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
def test_large_logits(plan, window, size):
    """Of every third key."""
    check(with_logits(size), plan, window=window)


@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
def test_logits_whose_exponentials_no_float32_holds(plan):
    args = with_logits(200)
    got, exact = results(args, "triton", plan=plan), exact_results(args)
    for name in exact:
        # A rounding of a logit is a relative error of its weight.
        assert relative_rms(got[name], exact[name]) < 200 * torch.finfo(torch.float32).eps, name


def with_logits(size):
    args = inputs(1, 40, 150, 1, 1, 16)
    args["q"][..., 0], args["k"][..., 0] = 16.0, 0.0
    args["k"][:, ::3, :, 0] = size / 4
    return args


@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
@pytest.mark.parametrize("what", ["equal keys", "equal tokens", "correlated keys", "zeros", "huge"])
def test_adversarial_inputs(what, plan):
    args = inputs(1, 60, 150, 1, 1, 32)
    if what == "equal keys":
        args["k"][:] = args["k"][:, :1]
    elif what == "equal tokens":
        args = {k: x[:, :1].expand_as(x).contiguous() for k, x in args.items()}
    elif what == "correlated keys":
        args["k"] = 0.98 * args["k"][:, :1] + 0.02 * args["k"]
        args["q"] *= 8
    elif what == "zeros":
        args = {k: torch.zeros_like(x) for k, x in args.items()}
    else:
        args["v"] *= 1e6
    check(args, plan)


def test_equal_keys_give_the_mean_of_the_values():
    args = inputs(1, 100, 100, 1, 1, 16)
    args["k"][:] = 0.0
    y = attention(**args, backend="triton")
    for t in (0, 1, 63, 64, 99):
        mean = args["v"][:, : t + 1].double().mean(1)
        assert relative_rms(y[:, t], mean) < 1e-6, t


@pytest.mark.parametrize("plan", [TILES, ONE, AttentionPlan("decode", 3)])
def test_the_sums_that_the_backward_pass_needs(plan):
    """log2 of the sum of 2^logits, to base 2."""
    args = inputs(2, 6, 130, 2, 1, 32)
    window, lengths = 70, ragged(130, 4)
    _, got = kernels.attention_op(*args.values(), lengths, window, *plan)
    logits = torch.einsum("bthk,bsk->bhts", args["q"].double(), args["k"][:, :, 0].double())
    hidden = ~visible(6, 130, 2, window, lengths)[:, None]
    exact = (logits * 32**-0.5).masked_fill(hidden, -math.inf).logsumexp(-1) / math.log(2)
    empty = exact.isinf()
    assert empty.sum() == 2 * 2
    assert (got[empty] == -1e30).all()
    assert relative_rms(got[~empty], exact[~empty]) < 1e-6


@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
def test_non_contiguous_inputs(plan):
    args = inputs(2, 9, 50, 4, 2, 16)
    others = strided(args)
    assert not any(x.is_contiguous() for x in others.values())
    assert_same(results(others, "triton", plan=plan), results(args, "triton", plan=plan))
    turned = {k: x.transpose(0, 1).contiguous().transpose(0, 1) for k, x in args.items()}
    assert_same(results(turned, "triton", plan=plan), results(args, "triton", plan=plan))


@pytest.mark.parametrize("plan", [TILES, ONE, AttentionPlan("decode", 2)])
def test_keys_and_values_in_strides_of_their_own(plan):
    args = inputs(2, 9, 50, 4, 2, 16)
    axes = {"q": (1, 2), "k": (1, 2), "v": (0, 1)}
    others = {k: x.transpose(*axes[k]).contiguous().transpose(*axes[k]) for k, x in args.items()}
    assert_same(results(others, "triton", plan=plan), results(args, "triton", plan=plan))


@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_every_other_element(name, plan):
    args = inputs(2, 9, 50, 4, 2, 16)
    others = {**args, name: args[name].repeat_interleave(2, -1)[..., ::2]}
    assert_same(results(others, "triton", plan=plan), results(args, "triton", plan=plan))


@interpreted
@pytest.mark.parametrize("plan", [TILES, ONE])
def test_a_cache_is_not_copied(plan):
    args = inputs(2, 2, 50, 4, 2, 16)
    cache = {k: torch.cat((x, x), 1)[:, : x.shape[1]] for k, x in args.items()}
    _, counts = traffic.count(lambda: attention(**cache, plan=plan, backend="triton"))
    assert counts.operation_calls == 0


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
def test_the_gradient_of_one_argument(name, plan):
    args = inputs(1, 20, 40, 2, 1, 16)
    expected = results(args, "triton", plan=plan)[f"d{name}"]
    args[name].requires_grad_()
    y = attention(**args, plan=plan, backend="triton")
    (got,) = torch.autograd.grad(y, args[name], randn(*y.shape, seed=1))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("axes", [(2, 3), (1, 2), (0, 1)])
def test_gradients_in_other_strides(axes):
    args = {k: x.requires_grad_() for k, x in inputs(2, 40, 40, 2, 2, 16).items()}
    y = attention(**args, backend="triton")
    seed = randn(*y.shape, seed=1)
    turned = seed.transpose(*axes).contiguous().transpose(*axes)
    for leaf in args.values():
        expected, got = (
            torch.autograd.grad(y, leaf, given, retain_graph=True)[0] for given in (seed, turned)
        )
        assert torch.equal(got, expected)
    (expected,) = torch.autograd.grad(y, args["q"], torch.ones_like(y), retain_graph=True)
    (got,) = torch.autograd.grad(y.sum(), args["q"])  # an expanded scalar
    assert torch.equal(got, expected)


def test_no_gradient_of_y_is_no_gradient():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    args = {k: x.requires_grad_() for k, x in inputs(1, 4, 4, 1, 1, 16).items()}
    y = Cut.apply(attention(**args, backend="triton"))
    found = torch.autograd.grad(y.sum(), list(args.values()), allow_unused=True)
    assert found == (None, None, None)


@triton.jit
def places_kernel(FOUND, X, row, i_h, t, strides):
    """How far from X row t of a head lies, in bytes."""
    pid, o_1 = tl.program_id(0), tl.arange(0, 1)
    p_x = places(head(X, strides, pid + row, pid + i_h), strides[1], t + o_1, o_1)
    tl.store(FOUND + o_1[:, None], p_x.to(tl.int64) - X.to(tl.int64))


@pytest.mark.parametrize(
    ("row", "i_h", "t"), [(2**12, 1, 1), (1, 2**24, 1), (1, 1, 2**24), (0, 0, 2**31 - 2)]
)
def test_offsets_beyond_32_bits(row, i_h, t):
    """Of rows, heads and tokens; all kernels read and write from there on."""
    strides = 2**20, 256, 128
    found = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    places_kernel[(1,)](found, torch.zeros(1, device=DEVICE), row, i_h, t, strides)
    offset = row * strides[0] + t * strides[1] + i_h * strides[2]
    assert found.item() == 4 * offset
    assert offset > 2**31


@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_beside_tensors_is_neither_read_nor_written(plan, dtype):
    args = inputs(2, 9, 70, 4, 2, 24, dtype=dtype)
    expected = results(args, "triton", plan=plan)
    for some in (args, strided(args)):
        with guarded_allocations():
            margins = {k: in_margins(x) for k, x in some.items()}
            got = results(margins, "triton", plan=plan)
        assert_same(got, expected)


@interpreted
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("T", [1, 70, 150])
def test_every_access_is_inside_the_arguments(window, T):
    """Reads too, also those whose values go nowhere: counting any other raises."""
    args = inputs(2, T, 150, 2, 1, 24)
    for lengths in (None, ragged(150, 20)):
        options = {"window": window, "lengths": lengths}
        _, counts = traffic.count(lambda o=options: results(args, "triton", plan=TILES, **o))
        assert set(counts.kernels) == KERNELS
    few = {**args, "q": args["q"][:, -2:]}
    _, counts = traffic.count(
        lambda: attention(**few, window=window, plan=AttentionPlan("decode", 3), backend="triton")
    )
    assert set(counts.kernels) == {"attention_decode_kernel"}


@interpreted
@pytest.mark.parametrize("window", [None, 100, 65])
@pytest.mark.parametrize("K", [64, 128])
def test_only_keys_that_are_read_are_loaded(window, K):
    """What is asked for is the least that tiles of this size can ask for."""
    T, H = 600, 2
    args = inputs(1, T, T, H, H, K, dtype=torch.float16)
    _, counts = traffic.count(lambda: results(args, "triton", window=window))

    def rows(kernel, by_keys):
        """Rows that the tiles of one axis load of the other: whole tiles, but for its end."""
        tiles = kernels.TILES[kernel][2][K]
        size, other = (tiles.keys, tiles.queries) if by_keys else (tiles.queries, tiles.keys)
        total = 0
        for first in range(0, T, size):
            last = min(first + size, T) - 1
            low, high = (first, T) if by_keys else (0, last + 1)
            if window is not None:
                low, high = (
                    (first, min(T, first + size + window - 1))
                    if by_keys
                    else (max(0, first - window + 1), last + 1)
                )
            tiles_read = range(low // other, -(-high // other))
            total += sum(min(other, T - i * other) for i in tiles_read)
        return total

    row = 2 * K * H
    asked = {k: v.requested_bytes for k, v in counts.kernels.items()}
    main, scalar = row * T, 4 * H * T
    assert asked["attention_forward_kernel"] == 2 * main + scalar + 2 * row * rows("forward", False)
    assert asked["attention_dq_kernel"] == 4 * main + 2 * scalar + 2 * row * rows("dq", False)
    assert asked["attention_dkv_kernel"] == 4 * main + (2 * row + 8 * H) * rows("dkv", True)
    for kernel in counts.kernels.values():
        assert kernel.sector_bytes <= 1.1 * kernel.requested_bytes


def test_batch_rows_do_not_touch():
    args = inputs(3, 40, 50, 1, 1, 16)
    order = [2, 0, 1]
    expected = results(args, "triton")
    got = results({k: x[order] for k, x in args.items()}, "triton")
    assert torch.equal(got["y"], expected["y"][order])
    spoilt = {k: x.clone() for k, x in args.items()}
    for x in spoilt.values():
        x[1] = math.nan
    assert torch.equal(attention(**spoilt, backend="triton")[::2], expected["y"][::2])


@pytest.mark.parametrize("changed", [1, 40, 64, 140])
@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
def test_the_future_changes_nothing(changed, plan):
    args = inputs(1, 60, 150, 1, 1, 16)
    y = attention(**args, plan=plan, backend="triton")
    args["k"][:, changed:], args["v"][:, changed:] = 9.0, -9.0
    z = attention(**args, plan=plan, backend="triton")
    before = max(0, changed - 90)  # the first query sits at position 90
    assert torch.equal(z[:, :before], y[:, :before])
    assert (z[:, before:] != y[:, before:]).any(-1).all()


@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
def test_keys_before_the_window_change_nothing(plan):
    args = inputs(1, 60, 150, 1, 1, 16)
    y = attention(**args, window=40, plan=plan, backend="triton")
    args["k"][:, :100], args["v"][:, :100] = 9.0, -9.0
    z = attention(**args, window=40, plan=plan, backend="triton")
    assert torch.equal(z[:, 49:], y[:, 49:])  # position 139 reads from 100 on
    assert (z[:, :49] != y[:, :49]).any(-1).all()


@pytest.mark.parametrize("plan", [TILES, AttentionPlan("decode", 2)])
def test_keys_past_a_rows_length_change_nothing(plan):
    args, lengths = inputs(2, 5, 150, 2, 1, 16), ragged(70, 150)
    expected = results(args, "triton", plan=plan, lengths=lengths)
    args["k"][0, 70:], args["v"][0, 70:] = 9.0, -9.0
    assert_same(results(args, "triton", plan=plan, lengths=lengths), expected)
    assert not expected["dk"][0, 70:].any()
    assert not expected["dv"][0, 70:].any()


def test_repeats_give_the_same_bits():
    args = inputs(1, 60, 140, 2, 1, 16)
    for plan in (TILES, AttentionPlan("decode", 3)):
        few = args if plan == TILES else {**args, "q": args["q"][:, -4:]}
        expected = results(few, "triton", plan=plan)
        for _ in range(5):
            assert_same(results(few, "triton", plan=plan), expected)


def test_what_is_passed_in_stays():
    args = inputs(1, 20, 40, 2, 1, 16)
    before = {k: x.clone() for k, x in args.items()}
    for plan in (TILES, AttentionPlan("decode", 2)):
        results(args, "triton", plan=plan)
        assert_same(args, before)


def test_tokens_one_by_one_equal_the_sequence():
    args = inputs(2, 12, 12, 4, 2, 16)
    expected = attention(**args, window=7, backend="triton")
    for t in range(12):
        seen = {k: x[:, : t + 1] for k, x in args.items()}
        y = attention(**{**seen, "q": args["q"][:, t : t + 1]}, window=7, backend="triton")
        assert relative_rms(y[:, 0], expected[:, t].double()) < 1e-6


@interpreted
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        attention(**inputs(1, 2, 2, 1, 1, 16, dtype=torch.bfloat16), backend="triton")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "has no kernels in float64; use 'torch'"),
        ({"K": 257}, "head sizes K up to 256, and got 257; use 'torch'"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused(changes, words):
    args = inputs(**{"B": 1, "T": 2, "S": 2, "H": 1, "H_kv": 1, "K": 16, **changes})
    with pytest.raises(BackendUnavailableError, match=words):
        attention(**args, backend="triton")


@pytest.mark.parametrize("lengths", [None, [30, 50]])
@pytest.mark.parametrize("window", [None, 20])
def test_operations_keep_pytorchs_rules(lengths, window):
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 50, 2, 1, 16).values())
    lengths = None if lengths is None else ragged(*lengths)
    ops = torch.ops.seqscale
    for plan in (TILES, AttentionPlan("decode", 2)):
        torch.library.opcheck(ops.attention.default, (q, k, v, lengths, window, *plan))
    q, k, v = (x.detach() for x in (q, k, v))
    y, lse = kernels.attention_op(q, k, v, lengths, window, *TILES)
    arguments = (randn(2, 4, 2, 16), q, k, v, y, lse, lengths, window)
    torch.library.opcheck(ops.attention_backward.default, arguments)


def test_the_sums_of_float16_are_float32():
    q, k, v = inputs(1, 2, 4, 2, 1, 16, dtype=torch.float16).values()
    arguments = (q, k, v, None, None, *TILES)
    torch.library.opcheck(
        torch.ops.seqscale.attention.default, arguments, test_utils="test_faketensor"
    )


@pytest.mark.parametrize("T", [1, 40])
def test_torch_compile_needs_no_graph_break(T):
    args = inputs(1, T, 40, 2, 1, 16)

    def function(q, k, v):
        return 3 * attention(2 * q, k, v, window=30, backend="triton")

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in args.values()]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, randn(*y.shape, seed=1))]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled), gradients(function), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("T", "S", "window", "pairs"),
    [(40, 40, None, 820), (4, 40, None, 154), (40, 40, 10, 355), (1, 40, 10, 10)],
)
def test_flops_are_those_of_the_visible_pairs(T, S, window, pairs):
    args = {k: x.requires_grad_() for k, x in inputs(2, T, S, 4, 2, 16).items()}
    forward = 4 * 2 * 4 * 16 * pairs
    with FlopCounterMode(display=False) as counter:
        y = attention(**args, window=window, backend="triton")
        assert counter.get_total_flops() == forward
        y.sum().backward()
        assert counter.get_total_flops() == 3 * forward


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("T", [1, 65, 1025])
@pytest.mark.parametrize("window", [None, 100])
def test_on_a_gpu(T, dtype, window):
    for K in (16, 48, 64, 128, 256):
        check(inputs(2, T, T + 30, 4, 2, K, dtype=dtype), TILES, window=window)
    args = inputs(2, T, T + 30, 4, 2, 128, dtype=dtype)
    expected = results(args, "triton", plan=TILES, window=window)
    for _ in range(50):
        assert_same(results(args, "triton", plan=TILES, window=window), expected)


@on_a_gpu
@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    S, H, K = 2**19 + 130, 64, 64
    k, v = (torch.randn(1, S, H, K, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, 200, H, K, device=DEVICE, dtype=torch.bfloat16)
    near = {"q": q, "k": k[:, -1000:], "v": v[:, -1000:]}
    expected = attention(**near, window=500, backend="torch").double()
    y = attention(q, k, v, window=500, plan=TILES, backend="triton")
    assert relative_rms(y, expected) < 8e-3
    y = attention(q[:, -1:], k, v, window=500, plan=AttentionPlan("decode", 4), backend="triton")
    assert relative_rms(y, expected[:, -1:]) < 8e-3
