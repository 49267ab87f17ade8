"""Attention of few queries to many keys, in Triton (see `attention_kernel`)."""

import triton
import triton.language as tl

from archs.ops.attention_forward_kernel import attend, head, keys_of


@triton.jit(do_not_specialize=["T", "S", "window"])
def attention_decode_kernel(
    Q,  # (B, T, H, K)
    KEYS,  # (B, S, H_kv, K)
    VALUES,  # (B, S, H_kv, K)
    LENGTHS,  # (B,), or None
    Y,  # (B, T, H, K)
    LSE,  # (B, H, T)
    PARTS,  # (B, H_kv, T R, SPLITS, K), float32, the sums of each split; None if there is one
    WEIGHTS,  # (B, H_kv, 2, T R, SPLITS), float32: largest logits, to base 2; sums of weights
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
    K: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,  # at least T R
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,  # at least SPLITS
    PRECISION: tl.constexpr,
):
    """The queries of all heads that share a key head, over one split of the keys that they read.

    Of several programs, the last one to finish puts the splits together, in their order.
    """
    pid = tl.program_id(0)
    i_s = pid % SPLITS
    i_kv, i_b = pid // SPLITS % (H // R), pid // SPLITS // (H // R)
    n = keys_of(LENGTHS, i_b, S)
    rows = T * R
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    t, r = o_m // R, o_m % R
    m_row = (o_m < rows)[:, None] & (o_k < K)[None, :]
    p_q = head(Q, strides_q, i_b, i_kv * R)
    q = tl.load(p_q + (t * strides_q[1] + r * strides_q[2])[:, None] + o_k, m_row, other=0.0)
    p_k, p_v = head(KEYS, strides_k, i_b, i_kv), head(VALUES, strides_v, i_b, i_kv)
    y = tl.zeros((BM, BK), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    most = tl.full((BM,), -1e30, tl.float32)  # finite: -inf less -inf is NaN
    oldest = 0 if window is None else tl.maximum(n - T + 1 - window, 0)
    split = tl.cdiv(tl.cdiv(n - oldest, BN), SPLITS) * BN
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
    if SPLITS == 1:
        total = tl.where(total == 0.0, 1.0, total)  # a query without keys yields 0
        p_rows = p_y + (t * strides_y[1] + r * strides_y[2])[:, None] + o_k
        tl.store(p_rows, (y / total[:, None]).to(Y.dtype.element_ty), m_row)
        tl.store(p_lse + r * T + t, most + tl.log2(total), o_m < rows)
    else:
        p_parts = PARTS + i_group * (rows * SPLITS * K)
        p_most = WEIGHTS + i_group * (2 * rows * SPLITS)
        p_total = p_most + rows * SPLITS
        o_part = o_m * SPLITS + i_s
        tl.store(p_parts + o_part[:, None] * K + o_k, y, m_row)
        tl.store(p_most + o_part, most, o_m < rows)
        tl.store(p_total + o_part, total, o_m < rows)
        tl.debug_barrier()  # all of this program's part is there before it is said to be
        done = tl.atomic_add(DONE + i_group, 1, sem="acq_rel")
        if done == SPLITS - 1:
            o_s = tl.arange(0, BS)
            m_s = o_s < SPLITS
            for i in range(rows):
                o_split = i * SPLITS + o_s
                mosts = tl.load(p_most + o_split, m_s, other=-1e30, cache_modifier=".cg")
                totals = tl.load(p_total + o_split, m_s, other=0.0, cache_modifier=".cg")
                p_sums = p_parts + o_split[:, None] * K + o_k
                m_sums = m_s[:, None] & (o_k < K)[None, :]
                sums = tl.load(p_sums, m_sums, other=0.0, cache_modifier=".cg")  # (BS, BK)
                highest = tl.max(mosts, 0)
                shares = tl.exp2(mosts - highest)
                whole = tl.sum(totals * shares, 0)
                whole = tl.where(whole == 0.0, 1.0, whole)
                y_row = tl.sum(sums * shares[:, None], 0) / whole
                p_row = p_y + (i // R) * strides_y[1] + (i % R) * strides_y[2] + o_k
                tl.store(p_row, y_row.to(Y.dtype.element_ty), o_k < K)
                tl.store(p_lse + (i % R) * T + i // R, highest + tl.log2(whole))
