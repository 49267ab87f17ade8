"""Attention forward, in Triton; what its backward pass shares (see `attention_kernel`)."""

import triton
import triton.language as tl


@triton.jit
def keys_of(LENGTHS, i_b, S):
    """How many keys a batch row has: at most S, whatever its length says."""
    n = S
    if LENGTHS is not None:
        n = tl.minimum(tl.maximum(tl.load(LENGTHS + i_b).to(tl.int32), 0), S)
    return n


@triton.jit
def head(X, strides, i_b, i_h):
    """Where a head of a batch row begins in X (B, T, H, K)."""
    return X + i_b.to(tl.int64) * strides[0] + i_h.to(tl.int64) * strides[2]


@triton.jit
def places(X, stride, row, o_k):
    """Where rows of a head that begins at X lie: (rows, BK)."""
    return X + row.to(tl.int64)[:, None] * stride + o_k[None, :]


@triton.jit
def tile(X, stride, row, o_k, N, K: tl.constexpr):
    """Rows of a head that begins at X and has N: (rows, BK), 0 where there is none."""
    m_x = (row < N)[:, None]
    BK: tl.constexpr = o_k.shape[0]
    if BK != K:
        m_x = m_x & (o_k < K)[None, :]
    return tl.load(places(X, stride, row, o_k), m_x, other=0.0)


@triton.jit
def store(X, stride, row, o_k, N, K: tl.constexpr, x):
    """Write x (rows, BK) to rows of a head that begins at X and has N."""
    m_x = (row < N)[:, None] & (o_k < K)[None, :]
    tl.store(places(X, stride, row, o_k), x.to(X.dtype.element_ty), m_x)


@triton.jit
def hide(logits, position, key, window):
    """Logits, -inf where the query at a position does not read a key: exactly no weight."""
    seen = key <= position
    if window is not None:
        seen = seen & (key > position - window)
    return tl.where(seen, logits, -float("inf"))


@triton.jit
def key_spans(first, last, window, BN: tl.constexpr):
    """Which tiles of BN keys the queries at positions `first` to `last` read.

    Returns:
        start, inner, outer and stop: some of these queries read keys from start to stop, and all of
        them all keys from inner to outer. All but stop are multiples of BN.
    """
    start = 0
    inner = 0
    outer = tl.maximum(first + 1, 0) // BN * BN
    if window is not None:
        start = tl.maximum(first - window + 1, 0) // BN * BN
        inner = tl.cdiv(tl.maximum(last - window + 1, 0), BN) * BN
    return start, inner, outer, last + 1


@triton.jit
def attend(
    q,  # (BM, BK)
    y,  # (BM, BK), the sums so far
    total,  # (BM,), of their weights, over 2^most
    most,  # (BM,), the largest logit so far, to base 2
    p_k,  # where the head begins
    p_v,
    stride_k,
    stride_v,
    j,  # the first of BN keys
    inner,  # keys from here to `outer` need no mask
    outer,
    n,
    position,
    o_n,
    o_k,
    window,
    scale,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums with BN more keys."""
    k = tile(p_k, stride_k, j + o_n, o_k, n, K)  # (BN, BK)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
    if (j < inner) | (j >= outer):
        logits = hide(logits, position[:, None], (j + o_n)[None, :], window)
    higher = tl.maximum(most, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - higher[:, None])
    shrunk = tl.exp2(most - higher)
    total = total * shrunk + tl.sum(weights, 1)
    v = tile(p_v, stride_v, j + o_n, o_k, n, K)  # (BN, BK)
    y = tl.dot(weights.to(v.dtype), v, y * shrunk[:, None], input_precision=PRECISION)
    return y, total, higher


@triton.jit(do_not_specialize=["T", "S", "window"])
def attention_forward_kernel(
    Q,  # (B, T, H, K)
    KEYS,  # (B, S, H_kv, K)
    VALUES,  # (B, S, H_kv, K)
    LENGTHS,  # (B,), or None
    Y,  # (B, T, H, K)
    LSE,  # (B, H, T), log2 of the sum of 2^logits, or what `attention_kernel` says of no keys
    strides_q,
    strides_k,
    strides_v,
    strides_y,
    T,
    S,
    H,
    R,  # query heads a key head
    window,  # or None
    scale,  # of the logits, to base 2
    K: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of BM queries of a head; the queries that read most come first."""
    tiles = tl.cdiv(T, BM)
    pid = tl.program_id(0)
    i_m = tiles - 1 - pid % tiles
    i_h, i_b = pid // tiles % H, pid // tiles // H
    n = keys_of(LENGTHS, i_b, S)
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    t = i_m * BM
    p_k, p_v = head(KEYS, strides_k, i_b, i_h // R), head(VALUES, strides_v, i_b, i_h // R)
    q = tile(head(Q, strides_q, i_b, i_h), strides_q[1], t + o_m, o_k, T, K)
    y = tl.zeros((BM, BK), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    most = tl.full((BM,), -1e30, tl.float32)  # finite: -inf less -inf is NaN
    first = n - T + t
    last = n - T + tl.minimum(T, t + BM) - 1
    start, inner, outer, stop = key_spans(first, last, window, BN)
    for j in range(start, stop, BN):
        y, total, most = attend(
            q, y, total, most, p_k, p_v, strides_k[1], strides_v[1], j, inner, outer, n,
            first + o_m, o_n, o_k, window, scale, K, PRECISION,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a query without keys yields 0
    store(head(Y, strides_y, i_b, i_h), strides_y[1], t + o_m, o_k, T, K, y / total[:, None])
    p_lse = LSE + (i_b.to(tl.int64) * H + i_h) * T + t + o_m
    tl.store(p_lse, most + tl.log2(total), t + o_m < T)
