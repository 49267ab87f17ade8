"""Attention of few queries to many keys, in Triton (see `attention_kernel`)."""

import triton
import triton.language as tl

from archs.ops.attention_forward_kernel import attend, head, keys_of


@triton.jit
def merge(
    p_parts,  # (T R, splits, K)
    p_most,  # (T R, splits)
    p_total,  # (T R, splits)
    p_y,  # where the first of the R heads begins
    p_lse,  # (R, T)
    strides_y,
    T,
    R,
    splits,
    K: tl.constexpr,
    o_k,
    BR: tl.constexpr,
    BS: tl.constexpr,
):
    """Put the splits of T R queries together, BS at a time."""
    BK: tl.constexpr = o_k.shape[0]
    o_r, o_s = tl.arange(0, BR), tl.arange(0, BS)
    m_r = o_r < T * R
    y = tl.zeros((BR, BK), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    most = tl.full((BR,), -1e30, tl.float32)
    for first in range(0, splits, BS):
        o_split = o_r[:, None] * splits + (first + o_s)[None, :]
        m_split = m_r[:, None] & (first + o_s < splits)[None, :]
        # Not from the first level of cache, which other programs do not write to.
        mosts = tl.load(p_most + o_split, m_split, other=-1e30, cache_modifier=".cg")  # (BR, BS)
        totals = tl.load(p_total + o_split, m_split, other=0.0, cache_modifier=".cg")  # (BR, BS)
        p_sums = p_parts + o_split[:, :, None] * K + o_k[None, None, :]
        m_sums = m_split[:, :, None] & (o_k < K)[None, None, :]
        sums = tl.load(p_sums, m_sums, other=0.0, cache_modifier=".cg")  # (BR, BS, BK)
        higher = tl.maximum(most, tl.max(mosts, 1))
        shares = tl.exp2(mosts - higher[:, None])
        shrunk = tl.exp2(most - higher)
        total = total * shrunk + tl.sum(totals * shares, 1)
        y = y * shrunk[:, None] + tl.sum(sums * shares[:, :, None], 1)
        most = higher
    finish(p_y, p_lse, strides_y, y, total, most, T, R, o_r, o_k, K)


@triton.jit
def finish(p_y, p_lse, strides_y, y, total, most, T, R, o_r, o_k, K: tl.constexpr):
    """Write what T R queries come to: y (rows, BK), and the logarithm of their sums of weights."""
    t, r = o_r // R, o_r % R
    m_r = o_r < T * R
    total = tl.where(total == 0.0, 1.0, total)  # a query without keys yields 0
    p_rows = p_y + (t * strides_y[1] + r * strides_y[2])[:, None] + o_k[None, :]
    y = (y / total[:, None]).to(p_y.dtype.element_ty)
    tl.store(p_rows, y, m_r[:, None] & (o_k < K)[None, :])
    tl.store(p_lse + r * T + t, most + tl.log2(total), m_r)


@triton.jit(do_not_specialize=["T", "S", "window", "splits"])
def attention_decode_kernel(
    Q,  # (B, T, H, K)
    KEYS,  # (B, S, H_kv, K)
    VALUES,  # (B, S, H_kv, K)
    LENGTHS,  # (B,), or None
    Y,  # (B, T, H, K)
    LSE,  # (B, H, T)
    PARTS,  # (B, H_kv, T R, splits, K), float32, the sums of each split; None if there is one
    WEIGHTS,  # (B, H_kv, 2, T R, splits), float32: largest logits, to base 2; sums of weights
    DONE,  # (B, H_kv), int32, zeros
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
    splits,
    K: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,  # at least T R
    BN: tl.constexpr,
    BR: tl.constexpr,  # at least T R
    BS: tl.constexpr,  # splits that are put together at a time
    PRECISION: tl.constexpr,
):
    """The queries of all heads that share a key head, over one split of the keys that they read.

    Of several programs, the last one to finish puts the splits together, in their order.
    """
    pid = tl.program_id(0)
    i_s = pid % splits
    i_kv, i_b = pid // splits % (H // R), pid // splits // (H // R)
    n = keys_of(LENGTHS, i_b, S)
    rows = T * R
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    t, r = o_m // R, o_m % R
    m_row = (o_m < rows)[:, None] & (o_k < K)[None, :]
    p_q = head(Q, strides_q, i_b, i_kv * R)
    o_q = t.to(tl.int64) * strides_q[1] + r.to(tl.int64) * strides_q[2]
    q = tl.load(p_q + o_q[:, None] + o_k, m_row, other=0.0)
    p_k, p_v = head(KEYS, strides_k, i_b, i_kv), head(VALUES, strides_v, i_b, i_kv)
    y = tl.zeros((BM, BK), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    most = tl.full((BM,), -1e30, tl.float32)  # finite: -inf less -inf is NaN
    oldest = 0 if window is None else tl.maximum(n - T + 1 - window, 0)
    split = tl.cdiv(tl.cdiv(n - oldest, BN), splits) * BN
    start = oldest + i_s * split
    stop = tl.minimum(start + split, n)
    for j in range(start, stop, BN):
        y, total, most = attend(
            q, y, total, most, p_k, p_v, strides_k[1], strides_v[1], j, 0, 0, n, n - T + t, o_n,
            o_k, window, scale, K, PRECISION,
        )  # fmt: skip
    i_group = i_b.to(tl.int64) * (H // R) + i_kv
    p_y = head(Y, strides_y, i_b, i_kv * R)
    p_lse = LSE + i_group * (R * T)
    if PARTS is None:
        finish(p_y, p_lse, strides_y, y, total, most, T, R, o_m, o_k, K)
    else:
        p_parts = PARTS + i_group * (rows * splits * K)
        p_most = WEIGHTS + i_group * (2 * rows * splits)
        p_total = p_most + rows * splits
        o_part = o_m * splits + i_s
        tl.store(p_parts + o_part[:, None] * K + o_k, y, m_row)
        tl.store(p_most + o_part, most, o_m < rows)
        tl.store(p_total + o_part, total, o_m < rows)
        tl.debug_barrier()  # all of this program's part is there before it is said to be
        if tl.atomic_add(DONE + i_group, 1, sem="acq_rel") == splits - 1:
            merge(p_parts, p_most, p_total, p_y, p_lse, strides_y, T, R, splits, K, o_k, BR, BS)
