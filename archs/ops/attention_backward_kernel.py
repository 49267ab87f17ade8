"""Attention backward, in Triton (see `attention_kernel`)."""

import triton
import triton.language as tl

from archs.ops.attention_forward_kernel import head, hide, key_spans, keys_of, store, tile


@triton.jit
def descend(
    q,  # (BM, BK)
    dy,  # (BM, BK)
    dq,  # (BM, BK), the sums so far
    lse,  # (BM,)
    delta,  # (BM,)
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
    """The gradient of queries, by BN more keys."""
    k = tile(p_k, stride_k, j + o_n, o_k, n, K)  # (BN, BK)
    v = tile(p_v, stride_v, j + o_n, o_k, n, K)  # (BN, BK)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
    if (j < inner) | (j >= outer):
        logits = hide(logits, position[:, None], (j + o_n)[None, :], window)
    weights = tl.exp2(logits * scale - lse[:, None])
    dweights = tl.dot(dy, tl.trans(v), input_precision=PRECISION)  # (BM, BN)
    dlogits = (weights * (dweights - delta[:, None])).to(k.dtype)
    return tl.dot(dlogits, k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "S", "window"])
def attention_dq_kernel(
    Q,  # (B, T, H, K)
    KEYS,  # (B, S, H_kv, K)
    VALUES,  # (B, S, H_kv, K)
    LENGTHS,  # (B,), or None
    Y,  # (B, T, H, K)
    DY,  # (B, T, H, K)
    LSE,  # (B, H, T)
    DELTA,  # (B, H, T), the products of each row of y and dy
    DQ,  # (B, T, H, K)
    strides_q,
    strides_k,
    strides_v,
    strides_y,
    strides_dy,
    strides_dq,
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
    """The gradient of BM queries of a head, and what the gradients of keys need of them."""
    tiles = tl.cdiv(T, BM)
    pid = tl.program_id(0)
    i_m = tiles - 1 - pid % tiles
    i_h, i_b = pid // tiles % H, pid // tiles // H
    n = keys_of(LENGTHS, i_b, S)
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    t = i_m * BM
    m_t = t + o_m < T
    i_row = (i_b.to(tl.int64) * H + i_h) * T + t
    dy = tile(head(DY, strides_dy, i_b, i_h), strides_dy[1], t + o_m, o_k, T, K)
    y = tile(head(Y, strides_y, i_b, i_h), strides_y[1], t + o_m, o_k, T, K)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(DELTA + i_row + o_m, delta, m_t)
    q = tile(head(Q, strides_q, i_b, i_h), strides_q[1], t + o_m, o_k, T, K)
    lse = tl.load(LSE + i_row + o_m, m_t, other=0.0)
    p_k, p_v = head(KEYS, strides_k, i_b, i_h // R), head(VALUES, strides_v, i_b, i_h // R)
    dq = tl.zeros((BM, BK), tl.float32)
    first = n - T + t
    last = n - T + tl.minimum(T, t + BM) - 1
    start, inner, outer, stop = key_spans(first, last, window, BN)
    for j in range(start, stop, BN):
        dq = descend(
            q, dy, dq, lse, delta, p_k, p_v, strides_k[1], strides_v[1], j, inner, outer, n,
            first + o_m, o_n, o_k, window, scale, K, PRECISION,
        )  # fmt: skip
    dq *= scale * 0.6931471805599453
    store(head(DQ, strides_dq, i_b, i_h), strides_dq[1], t + o_m, o_k, T, K, dq)


@triton.jit
def gather(
    k,  # (BN, BK)
    v,  # (BN, BK)
    dk,  # (BN, BK), the sums so far
    dv,  # (BN, BK)
    p_q,  # where the head begins
    p_dy,
    p_lse,
    p_delta,
    stride_q,
    stride_dy,
    t,  # the first of BM queries
    inner,  # queries from here to `outer` need no mask
    outer,
    T,
    before,  # positions before the first query
    key,  # (BN,)
    o_m,
    o_k,
    window,
    scale,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of keys and values, by BM more queries."""
    q = tile(p_q, stride_q, t + o_m, o_k, T, K)  # (BM, BK)
    dy = tile(p_dy, stride_dy, t + o_m, o_k, T, K)  # (BM, BK)
    lse = tl.load(p_lse + t + o_m, t + o_m < T, other=0.0)
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BN, BM)
    if (t < inner) | (t >= outer):
        logits = hide(logits, (before + t + o_m)[None, :], key[:, None], window)
    weights = tl.exp2(logits * scale - lse[None, :])
    dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
    dweights = tl.dot(v, tl.trans(dy), input_precision=PRECISION)  # (BN, BM)
    # Loaded beside lse it would be kept in registers meanwhile: 22 spills at K = 128.
    delta = tl.load(p_delta + t + o_m, t + o_m < T, other=0.0)
    dlogits = (weights * (dweights - delta[None, :])).to(q.dtype)
    dk = tl.dot(dlogits, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "window"])
def attention_dkv_kernel(
    Q,  # (B, T, H, K)
    KEYS,  # (B, S, H_kv, K)
    VALUES,  # (B, S, H_kv, K)
    LENGTHS,  # (B,), or None
    DY,  # (B, T, H, K)
    LSE,  # (B, H, T)
    DELTA,  # (B, H, T)
    DK,  # (B, S, H_kv, K)
    DV,  # (B, S, H_kv, K)
    strides_q,
    strides_k,
    strides_v,
    strides_dy,
    strides_dk,
    strides_dv,
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
    """The gradients of BN keys and values of a key head; the keys that most queries read first."""
    tiles = tl.cdiv(S, BN)
    pid = tl.program_id(0)
    i_n = pid % tiles
    i_kv, i_b = pid // tiles % (H // R), pid // tiles // (H // R)
    n = keys_of(LENGTHS, i_b, S)
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    j = i_n * BN
    k = tile(head(KEYS, strides_k, i_b, i_kv), strides_k[1], j + o_n, o_k, S, K)
    v = tile(head(VALUES, strides_v, i_b, i_kv), strides_v[1], j + o_n, o_k, S, K)
    dk = tl.zeros((BN, BK), tl.float32)
    dv = tl.zeros((BN, BK), tl.float32)
    key = j + o_n
    before = n - T
    # As `key_spans`, of queries: those from inner to outer read all of these keys.
    start = tl.maximum(j - before, 0) // BM * BM
    inner = tl.cdiv(tl.maximum(j + BN - 1 - before, 0), BM) * BM
    outer = T
    stop = T
    if window is not None:
        outer = tl.maximum(j - before + window, 0) // BM * BM
        stop = tl.minimum(T, tl.maximum(j + BN - 1 - before + window, 0))
    if j >= n:
        stop = 0
    reading = tl.cdiv(tl.maximum(stop - start, 0), BM)  # tiles of queries
    for i in range(R * reading):  # one loop: heads around tiles would take more registers
        i_h, t = i_kv * R + i // reading, start + i % reading * BM
        i_row = (i_b.to(tl.int64) * H + i_h) * T
        dk, dv = gather(
            k, v, dk, dv, head(Q, strides_q, i_b, i_h), head(DY, strides_dy, i_b, i_h),
            LSE + i_row, DELTA + i_row, strides_q[1], strides_dy[1], t, inner, outer, T, before,
            key, o_m, o_k, window, scale, K, PRECISION,
        )  # fmt: skip
    dk *= scale * 0.6931471805599453
    store(head(DK, strides_dk, i_b, i_kv), strides_dk[1], j + o_n, o_k, S, K, dk)
    store(head(DV, strides_dv, i_b, i_kv), strides_dv[1], j + o_n, o_k, S, K, dv)
