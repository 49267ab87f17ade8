"""SSD backward, in Triton (see `ssd_kernel`)."""

import triton
import triton.language as tl

from archs.ops.ssd_forward_kernel import decay_sums, move, place, start, tile, vector


@triton.jit(do_not_specialize=["T", "segment"])
def ssd_backward_kernel(
    X,  # (B, T, H, P)
    DY,  # (B, T, H, P)
    LOG_DECAY,  # (B, T, H)
    DT,  # (B, T, H), or None
    K,  # b (B, T, G, N)
    Q,  # c (B, T, G, N)
    SKIP,  # (H,), or None
    START,  # (B, H, P, N), the gradient of the state after the last token, or None
    PARTIAL,  # as `ssd_fold_kernel` leaves them, or None
    DECAYED,
    DX,  # (B, T, H, P)
    DDT,  # (P / BP, B, T, H), float32, or None; the sum over parts is the gradient
    DSKIP,  # (P / BP, B, S, H), float32, or None; the sum over all but heads is the gradient
    BEYOND,  # (P / BP, B, T, H), float32: the log-decays' gradient by paths into later chunks
    AFTER,  # (B, ceil(T / (SPACED C)), H, N, P), gradients of the states after them
    END,  # (B, H, P, N), the gradient of the state before the first token, or None
    strides_x,
    strides_dy,
    strides_l,
    strides_d,
    strides_k,
    strides_q,
    T,
    H,
    R,  # heads a group
    S,
    segment,  # tokens, a multiple of SPACED C
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    SPACED: tl.constexpr,  # chunks between kept states
    PRECISION: tl.constexpr,
):
    """The gradients that need only those of later tokens, of a segment and head."""
    i_p, i_h, i_s, i_b = place(P // BP, H, S)
    o_p = i_p * BP + tl.arange(0, BP)
    o_n = tl.arange(0, N)
    o_c = tl.arange(0, C)
    dstate = start(START, PARTIAL, DECAYED, i_b, i_s, i_h, o_n, o_p, S, H, N, P, True, N, BP)
    if SKIP is not None:
        skip = tl.load(SKIP + i_h).to(tl.float32)
    dskip = 0.0
    rows = tl.num_programs(0) // (S * H * (P // BP))  # B
    i_part = i_p.to(tl.int64) * rows + i_b
    first = i_s * segment
    chunks = tl.cdiv(tl.minimum(segment, T - first), C)
    for i in range(chunks):
        t = first + (chunks - 1 - i) * C
        i_kept = (i_b.to(tl.int64) * tl.cdiv(T, SPACED * C) + t // (SPACED * C)) * H + i_h
        p_kept = AFTER + i_kept * (N * P) + o_n[:, None] * P + o_p[None, :]
        ends = (t % (SPACED * C) == (SPACED - 1) * C) or (t + C >= T)
        tl.store(p_kept, dstate.to(AFTER.dtype.element_ty), ends)
        dt = vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
        coarse, fine, coarse_sum, fine_sum = decay_sums(
            vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
        )
        x = tile(X, strides_x, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
        dy = tile(DY, strides_dy, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
        k = tile(K, strides_k, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        q = tile(Q, strides_q, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        du = tl.zeros((C, BP), tl.float32)
        if t < T:  # see "Layouts" in `ssd_kernel`
            du = tl.dot(k, dstate.to(x.dtype), input_precision=PRECISION)
        du *= tl.exp2((coarse_sum - coarse) + (fine_sum - fine))[:, None]
        written = tl.sum(du * x, 1) * dt  # by paths from each token's x to after the chunk
        read = (dy * tl.exp2(coarse + fine)[:, None]).to(x.dtype)
        dstate *= tl.exp2(coarse_sum + fine_sum)
        dstate = tl.dot(tl.trans(q), read, dstate, input_precision=PRECISION)
        mixing = tl.zeros((C, C), x.dtype)  # of the token written at and the token read at
        if t < T:
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores *= tl.exp2((coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None]))
            mixing = tl.where(o_c[:, None] <= o_c[None, :], scores, 0.0).to(x.dtype)
        du += tl.dot(mixing, dy, input_precision=PRECISION)
        ddt = tl.sum(du * x, 1)
        du *= dt[:, None]
        if SKIP is not None:
            du += skip * dy
            dskip += tl.sum(tl.sum(dy.to(tl.float32) * x, 0), 0)
        m_t = t + o_c < T
        i_token = (i_b.to(tl.int64) * T + t) * H + i_h
        p_dx = DX + i_token * P + o_c[:, None] * (H * P) + o_p[None, :]
        tl.store(p_dx, du.to(x.dtype), m_t[:, None])
        i_token = (i_part * T + t) * H + i_h
        tl.store(BEYOND + i_token + o_c * H, tl.cumsum(written, 0) - written, m_t)
        if DDT is not None:
            tl.store(DDT + i_token + o_c * H, ddt, m_t)
    if SKIP is not None:
        tl.store(DSKIP + (i_part * S + i_s) * H + i_h, dskip)
    if END is not None and i_s == 0:
        o_state = o_p[None, :] * N + o_n[:, None]
        tl.store(END + (i_b.to(tl.int64) * H + i_h) * (P * N) + o_state, dstate)


@triton.jit(do_not_specialize=["T"])
def ssd_gradients_kernel(
    X,  # (B, T, H, P)
    DY,  # (B, T, H, P)
    LOG_DECAY,  # (B, T, H)
    DT,  # (B, T, H), or None
    K,  # b (B, T, G, N)
    Q,  # c (B, T, G, N)
    BEFORE,  # (B, ceil(T / (SPACED C)), H, N, P), the states before every SPACED chunks
    AFTER,  # likewise, the gradients of the states after them
    WITHIN,  # (B, T, H), float32: the log-decays' gradient by paths within a chunk
    OVER,  # (B, T, H), float32: that by paths from before the chunk
    DK,  # (B, T, G, N)
    DQ,  # (B, T, G, N)
    strides_x,
    strides_dy,
    strides_l,
    strides_d,
    strides_k,
    strides_q,
    T,
    H,
    R,  # heads a group
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    SPACED: tl.constexpr,  # chunks between kept states
    BH: tl.constexpr,  # heads whose x and dy are read twice, the second time from the cache
    OVERLAP: tl.constexpr,  # whether the next head's tiles are loaded meanwhile
    PRECISION: tl.constexpr,
):
    """The gradients that sum over a group's heads, of a chunk and group.

    States are kept at the start, their gradients at the end of three chunks. What a chunk needs is
    moved over the chunks between: the state over those before it, with what they write; the
    gradient over those after it, with what they read.

    The products within the chunk and those with the states have loops of their own, over a few
    heads each: together, or with addresses kept from one loop to the next, they would need more
    registers than there are.
    """
    chunks = tl.cdiv(T, C)
    pid = tl.program_id(0)
    i_c = pid % chunks
    i_g = pid // chunks % (H // R)
    i_b = pid // chunks // (H // R)
    for PLACE in tl.static_range(SPACED):
        if i_c % SPACED == PLACE:
            o_n = tl.arange(0, N)
            o_c = tl.arange(0, C)
            t = i_c * C
            m_t = t + o_c < T
            k = tile(K, strides_k, i_b, i_g, t, o_c, o_n, T)  # (C, N)
            q = tile(Q, strides_q, i_b, i_g, t, o_c, o_n, T)  # (C, N)
            tl.static_assert(SPACED == 3)
            if PLACE == 0:
                k_1 = tile(Q, strides_q, i_b, i_g, t + 2 * C, o_c, o_n, T)  # (C, N)
                k_2 = tile(Q, strides_q, i_b, i_g, t + C, o_c, o_n, T)  # (C, N)
            elif PLACE == 1:
                k_1 = tile(K, strides_k, i_b, i_g, t - C, o_c, o_n, T)  # (C, N)
                k_2 = tile(Q, strides_q, i_b, i_g, t + C, o_c, o_n, T)  # (C, N)
            else:
                k_1 = tile(K, strides_k, i_b, i_g, t - 2 * C, o_c, o_n, T)  # (C, N)
                k_2 = tile(K, strides_k, i_b, i_g, t - C, o_c, o_n, T)  # (C, N)
            i_kept = (i_b.to(tl.int64) * tl.cdiv(T, SPACED * C) + i_c // SPACED) * H
            o_token = (i_b.to(tl.int64) * T + t) * H + o_c * H

            dk = tl.zeros((C, N), tl.float32)
            dq = tl.zeros((C, N), tl.float32)
            for first in tl.range(0, R, BH, disable_licm=True):
                last = tl.minimum(first + BH, R)

                # Matrices over a chunk: tokens written at in rows, tokens read at in columns.
                scores = tl.zeros((C, C), tl.float32)
                if t < T:  # see "Layouts" in `ssd_kernel`
                    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                dscores = tl.zeros((C, C), tl.float32)
                for i in tl.range(first, last, num_stages=2 if OVERLAP else 1, disable_licm=True):
                    i_h = i_g * R + i
                    dt = vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
                    coarse, fine, _, _ = decay_sums(
                        vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
                    )
                    dmixing = tl.zeros((C, C), tl.float32)
                    for i_p in tl.static_range(P // BP):
                        o_p = i_p * BP + tl.arange(0, BP)
                        x = tile(X, strides_x, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
                        dy = tile(DY, strides_dy, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
                        dmixing = tl.dot(x, tl.trans(dy), dmixing, input_precision=PRECISION)
                    dmixing *= tl.exp2(
                        (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
                    )
                    dmixing *= dt[:, None]
                    dmixing = tl.where(o_c[:, None] <= o_c[None, :], dmixing, 0.0)
                    dscores += dmixing
                    # A decay multiplies the paths from before its token, into it or later.
                    paths = tl.where(o_c[:, None] < o_c[None, :], dmixing * scores, 0.0)
                    within = tl.cumsum(tl.sum(paths, 0) - tl.sum(paths, 1), 0, reverse=True)
                    tl.store(WITHIN + o_token + i_h, within, m_t)
                if t < T:
                    dscores_low = dscores.to(k.dtype)
                    dk = tl.dot(dscores_low, q, dk, input_precision=PRECISION)
                    dq = tl.dot(tl.trans(dscores_low), k, dq, input_precision=PRECISION)

                for i in tl.range(first, last, num_stages=2 if OVERLAP else 1, disable_licm=True):
                    i_h = i_g * R + i
                    dt = vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
                    coarse, fine, coarse_sum, fine_sum = decay_sums(
                        vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
                    )
                    from_start = tl.exp2(coarse + fine)
                    to_end = tl.exp2((coarse_sum - coarse) + (fine_sum - fine))
                    read = tl.zeros((C,), tl.float32)  # by paths into each token's y
                    through = 0.0  # by paths over the whole chunk
                    for i_p in tl.static_range(P // BP):
                        o_p = i_p * BP + tl.arange(0, BP)
                        o_state = (i_kept + i_h) * (N * P) + o_n[:, None] * P + o_p[None, :]
                        before = tl.load(BEFORE + o_state).to(tl.float32)  # (N, BP)
                        after = tl.load(AFTER + o_state).to(tl.float32)  # (N, BP)
                        if PLACE == 0:
                            after, _ = move(
                                after, k_1, DY, strides_dy, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t + 2 * C, o_c, o_p, T, True, PRECISION,
                            )  # fmt: skip
                            after, _ = move(
                                after, k_2, DY, strides_dy, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t + C, o_c, o_p, T, True, PRECISION,
                            )  # fmt: skip
                        elif PLACE == 1:
                            before, _ = move(
                                before, k_1, X, strides_x, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t - C, o_c, o_p, T, False, PRECISION,
                            )  # fmt: skip
                            after, _ = move(
                                after, k_2, DY, strides_dy, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t + C, o_c, o_p, T, True, PRECISION,
                            )  # fmt: skip
                        else:
                            before, _ = move(
                                before, k_1, X, strides_x, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t - 2 * C, o_c, o_p, T, False, PRECISION,
                            )  # fmt: skip
                            before, _ = move(
                                before, k_2, X, strides_x, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t - C, o_c, o_p, T, False, PRECISION,
                            )  # fmt: skip
                        through += tl.sum(tl.sum(before * after, 0), 0)
                        before = before.to(k.dtype)
                        after = after.to(k.dtype)
                        dy = tile(DY, strides_dy, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
                        dy_past = (dy * from_start[:, None]).to(dy.dtype)
                        dq = tl.dot(dy_past, tl.trans(before), dq, input_precision=PRECISION)
                        past = tl.dot(q, before, input_precision=PRECISION)  # (C, BP)
                        read += tl.sum(past * dy, 1) * from_start
                        x = tile(X, strides_x, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
                        x = (x * (dt * to_end)[:, None]).to(x.dtype)
                        dk = tl.dot(x, tl.trans(after), dk, input_precision=PRECISION)
                    over = tl.cumsum(read, 0, reverse=True) + through * tl.exp2(
                        coarse_sum + fine_sum
                    )
                    tl.store(OVER + o_token + i_h, over, m_t)

            groups = H // R
            o_out = (i_b.to(tl.int64) * T + t) * groups * N + i_g * N
            o_out = o_out + o_c[:, None] * (groups * N) + o_n[None, :]
            tl.store(DK + o_out, dk.to(k.dtype), m_t[:, None])
            tl.store(DQ + o_out, dq.to(k.dtype), m_t[:, None])
