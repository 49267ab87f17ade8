"""Triton kernels of SSD: forward, backward and one step (see `archs.ops.ssd` for the definition).

Forward. One program a head (and segment) walks the chunks in order with the state in registers:
neither states nor C B^T reach memory. Where heads are few and the sequence is long, segments run
side by side; a pass before forms what each of them adds to the state.

Backward. The forward pass keeps the state before every third chunk. A pass over the chunks in
reverse keeps the gradient of the state after every third chunk. Then all chunks are independent:
one program a chunk and group loops over the group's heads and sums their shares of db and dc in
registers.

Numerics. Decays are powers of two of differences of sums of log-decays. A sum is kept in two parts,
a multiple of 2^-10, which adds up without rounding, and the rest: small differences of large sums
are exact. Log-decays below -150 (base 2) count as -150, a factor that is zero in float32. Products
are formed in x's type and summed in float32; kept states have x's type.

Layouts. Triton lays out a product that leads to another product along its rows only. With 64 rows
and 8 warps every element is then computed and held twice. A branch that is always taken hides the
second product from the first: 24 instead of 40 matrix instructions in the forward kernel, and no
spills.

Letters: B batch, T tokens, H heads, P head dimension, N state dimension, G groups, C tokens a
chunk, S segments.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# C by the bytes of an element of x: 32 tokens do not fill a warp group's matrix instruction, 128
# spill, and tiles of 64 in float32 do not fit in shared memory.
CHUNK = {2: 64, 4: 32}
SPACED = 3  # chunks between kept states: fewer mean more bytes, more mean more work backward
BLOCK_P = 64  # columns of a state in one program
STEP_BLOCK_P = 16  # likewise in the step: small, so that few heads are many programs
BLOCK_H = 8  # heads whose x and dy one program reads twice, the second time from the cache


@triton.jit
def _decay_sums(log_decay):
    """Sums of log-decays (C,) to base 2, in two parts: up to and with each token, and in all."""
    x = tl.maximum(log_decay.to(tl.float32) * 1.4426950408889634, -150.0)
    coarse = tl.floor(x * 1024.0) * 0.0009765625
    fine = x - coarse
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def _decay(coarse, fine):
    """Decay from token s to token t of a chunk, without meaning where s > t: (C, C)."""
    return tl.exp2((coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :]))


@triton.jit
def _vector(X, strides, i_b, i_h, t, o_c, T, default):
    """Tokens t + o_c (C,) of one head of X (B, T, H), 0 after the last; `default` if X is None."""
    if X is None:
        x = tl.where(t + o_c < T, tl.full(o_c.shape, default, tl.float32), 0.0)
    else:
        p_x = _base(X, strides, i_b, i_h, t) + o_c * strides[1]
        x = tl.load(p_x, t + o_c < T, other=0.0).to(tl.float32)
    return x


@triton.jit
def _tile(X, strides, i_b, i_h, t, o_c, o_n, T):
    """Tokens t + o_c of one head of X (B, T, H, n), 0 after the last: (C, n)."""
    p_x = _base(X, strides, i_b, i_h, t) + o_c[:, None] * strides[1] + o_n[None, :]
    return tl.load(p_x, (t + o_c < T)[:, None], other=0.0)


@triton.jit
def _base(X, strides, i_b, i_h, t):
    """Where token t of one head of X lies; offsets within a chunk fit in 32 bits."""
    return (
        X
        + i_b.to(tl.int64) * strides[0]
        + i_h.to(tl.int64) * strides[2]
        + t * tl.cast(strides[1], tl.int64)
    )


@triton.jit
def _place(parts, H, S):
    """This program's part of a head, head, segment and batch row; heads lie side by side."""
    pid = tl.program_id(0)
    return pid % parts, pid // parts % H, pid // parts // H % S, pid // parts // H // S


@triton.jit
def _start(
    START, PARTIAL, DECAYED, i_b, i_s, i_h, o_n, o_p, S, H, N: tl.constexpr, P: tl.constexpr,
    REVERSE: tl.constexpr, n: tl.constexpr, p: tl.constexpr,
):  # fmt: skip
    """The state (n, p) in which a segment starts: from the segments walked before."""
    state = tl.zeros((n, p), tl.float32)
    o_state = o_p[None, :] * N + o_n[:, None]
    i_bh = i_b.to(tl.int64) * H + i_h
    if START is not None:
        state += tl.load(START + i_bh * (P * N) + o_state)
    if PARTIAL is not None:
        before = S - 1 - i_s if REVERSE else i_s
        for i in range(before):
            i_from = S - 1 - i if REVERSE else i
            i_part = (i_b.to(tl.int64) * S + i_from) * H + i_h
            decay = tl.exp2(tl.load(DECAYED + i_part))
            state = state * decay + tl.load(PARTIAL + i_part * (P * N) + o_state)
    return state


@triton.jit
def _move(
    state, k, U, strides_u, LOG_DECAY, strides_l, DT, strides_d, i_b, i_h, t, o_c, o_p, T,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A state (n, p) moved over the chunk at t, and log2 of its decay.

    It gains what is written along k, a tile of b (C, n), of U = x; in reverse, a gradient of a
    state gains what is read along k, a tile of c, of U = dy.
    """
    coarse, fine, coarse_sum, fine_sum = _decay_sums(
        _vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
    )
    if REVERSE:
        weight = tl.exp2(coarse + fine)
    else:
        weight = tl.exp2((coarse_sum - coarse) + (fine_sum - fine))
        weight *= _vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
    u = _tile(U, strides_u, i_b, i_h, t, o_c, o_p, T)  # (C, p)
    u = (u * weight[:, None]).to(u.dtype)
    log2_whole = coarse_sum + fine_sum
    state = tl.dot(tl.trans(k), u, state * tl.exp2(log2_whole), input_precision=PRECISION)
    return state, log2_whole


@triton.jit(do_not_specialize=["T", "segment"])
def ssd_fold_kernel(
    U,  # what is written into the state: x (B, T, H, P), or in reverse dy
    K,  # along what: b (B, T, G, N), or in reverse c
    LOG_DECAY,  # (B, T, H)
    DT,  # (B, T, H), or None
    PARTIAL,  # (B, S, H, P, N), what each segment adds to the state
    DECAYED,  # (B, S, H), log2 of the decay over each segment
    strides_u,
    strides_k,
    strides_l,
    strides_d,
    T,
    H,
    R,  # heads a group
    S,
    segment,  # tokens, a multiple of SPACED C
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a segment adds to a head's state; none starts from what the last one adds."""
    i_p, i_h, i_s, i_b = _place(P // BP, H, S - 1)
    if REVERSE:
        i_s += 1
    o_p = i_p * BP + tl.arange(0, BP)
    o_n = tl.arange(0, N)
    o_c = tl.arange(0, C)
    state = tl.zeros((N, BP), tl.float32)
    decayed = 0.0
    first = i_s * segment
    chunks = tl.cdiv(tl.minimum(segment, T - first), C)
    for i in range(chunks):
        t = first + (chunks - 1 - i if REVERSE else i) * C
        k = _tile(K, strides_k, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        state, log2_decay = _move(
            state, k, U, strides_u, LOG_DECAY, strides_l, DT, strides_d, i_b, i_h, t, o_c, o_p, T,
            REVERSE, PRECISION,
        )  # fmt: skip
        decayed += log2_decay
    i_part = (i_b.to(tl.int64) * S + i_s) * H + i_h
    tl.store(PARTIAL + i_part * (P * N) + o_p[None, :] * N + o_n[:, None], state)
    tl.store(DECAYED + i_part, decayed, i_p == 0)


@triton.jit(do_not_specialize=["T", "segment"])
def ssd_forward_kernel(
    X,  # (B, T, H, P)
    LOG_DECAY,  # (B, T, H)
    DT,  # (B, T, H), or None
    K,  # b (B, T, G, N)
    Q,  # c (B, T, G, N)
    SKIP,  # (H,), or None
    START,  # (B, H, P, N), or None
    PARTIAL,  # as `ssd_fold_kernel` leaves them, or None
    DECAYED,
    Y,  # (B, T, H, P)
    KEPT,  # (B, ceil(T / (SPACED C)), H, N, P), the states before every SPACED chunks, or None
    END,  # (B, H, P, N), or None
    strides_x,
    strides_l,
    strides_d,
    strides_k,
    strides_q,
    strides_y,
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
    """The outputs of a segment and head."""
    i_p, i_h, i_s, i_b = _place(P // BP, H, S)
    o_p = i_p * BP + tl.arange(0, BP)
    o_n = tl.arange(0, N)
    o_c = tl.arange(0, C)
    state = _start(START, PARTIAL, DECAYED, i_b, i_s, i_h, o_n, o_p, S, H, N, P, False, N, BP)
    if SKIP is not None:
        skip = tl.load(SKIP + i_h).to(tl.float32)
    first = i_s * segment
    for t in range(first, tl.minimum(first + segment, T), C):
        if KEPT is not None:
            i_kept = (i_b.to(tl.int64) * tl.cdiv(T, SPACED * C) + t // (SPACED * C)) * H + i_h
            p_kept = KEPT + i_kept * (N * P) + o_n[:, None] * P + o_p[None, :]
            # A masked store: around it a branch would cost registers, and spills.
            tl.store(p_kept, state.to(KEPT.dtype.element_ty), t % (SPACED * C) == 0)
        dt = _vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
        coarse, fine, coarse_sum, fine_sum = _decay_sums(
            _vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
        )
        x = _tile(X, strides_x, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
        k = _tile(K, strides_k, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        q = _tile(Q, strides_q, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        y = tl.zeros((C, BP), tl.float32)
        if t < T:  # see "Layouts" above
            y = tl.dot(q, state.to(x.dtype), input_precision=PRECISION)
        y *= tl.exp2(coarse + fine)[:, None]
        weight = dt * tl.exp2((coarse_sum - coarse) + (fine_sum - fine))
        u = (x * weight[:, None]).to(x.dtype)
        state *= tl.exp2(coarse_sum + fine_sum)
        state = tl.dot(tl.trans(k), u, state, input_precision=PRECISION)
        mixing = tl.zeros((C, C), x.dtype)
        if t < T:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores *= _decay(coarse, fine) * dt[None, :]
            mixing = tl.where(o_c[:, None] >= o_c[None, :], scores, 0.0).to(x.dtype)
        y += tl.dot(mixing, x, input_precision=PRECISION)
        if SKIP is not None:
            y += skip * x.to(tl.float32)
        p_y = _base(Y, strides_y, i_b, i_h, t) + o_c[:, None] * strides_y[1] + o_p[None, :]
        tl.store(p_y, y.to(Y.dtype.element_ty), (t + o_c < T)[:, None])
    if END is not None and i_s == S - 1:
        o_state = o_p[None, :] * N + o_n[:, None]
        tl.store(END + (i_b.to(tl.int64) * H + i_h) * (P * N) + o_state, state)


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
    i_p, i_h, i_s, i_b = _place(P // BP, H, S)
    o_p = i_p * BP + tl.arange(0, BP)
    o_n = tl.arange(0, N)
    o_c = tl.arange(0, C)
    dstate = _start(START, PARTIAL, DECAYED, i_b, i_s, i_h, o_n, o_p, S, H, N, P, True, N, BP)
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
        dt = _vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
        coarse, fine, coarse_sum, fine_sum = _decay_sums(
            _vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
        )
        x = _tile(X, strides_x, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
        dy = _tile(DY, strides_dy, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
        k = _tile(K, strides_k, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        q = _tile(Q, strides_q, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        du = tl.zeros((C, BP), tl.float32)
        if t < T:  # see "Layouts" above
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
            k = _tile(K, strides_k, i_b, i_g, t, o_c, o_n, T)  # (C, N)
            q = _tile(Q, strides_q, i_b, i_g, t, o_c, o_n, T)  # (C, N)
            tl.static_assert(SPACED == 3)
            if PLACE == 0:
                k_1 = _tile(Q, strides_q, i_b, i_g, t + 2 * C, o_c, o_n, T)  # (C, N)
                k_2 = _tile(Q, strides_q, i_b, i_g, t + C, o_c, o_n, T)  # (C, N)
            elif PLACE == 1:
                k_1 = _tile(K, strides_k, i_b, i_g, t - C, o_c, o_n, T)  # (C, N)
                k_2 = _tile(Q, strides_q, i_b, i_g, t + C, o_c, o_n, T)  # (C, N)
            else:
                k_1 = _tile(K, strides_k, i_b, i_g, t - 2 * C, o_c, o_n, T)  # (C, N)
                k_2 = _tile(K, strides_k, i_b, i_g, t - C, o_c, o_n, T)  # (C, N)
            i_kept = (i_b.to(tl.int64) * tl.cdiv(T, SPACED * C) + i_c // SPACED) * H
            o_token = (i_b.to(tl.int64) * T + t) * H + o_c * H

            dk = tl.zeros((C, N), tl.float32)
            dq = tl.zeros((C, N), tl.float32)
            for first in tl.range(0, R, BH, disable_licm=True):
                last = tl.minimum(first + BH, R)

                # Matrices over a chunk: tokens written at in rows, tokens read at in columns.
                scores = tl.zeros((C, C), tl.float32)
                if t < T:  # see "Layouts" above
                    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                dscores = tl.zeros((C, C), tl.float32)
                for i in tl.range(first, last, num_stages=2 if OVERLAP else 1, disable_licm=True):
                    i_h = i_g * R + i
                    dt = _vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
                    coarse, fine, _, _ = _decay_sums(
                        _vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
                    )
                    dmixing = tl.zeros((C, C), tl.float32)
                    for i_p in tl.static_range(P // BP):
                        o_p = i_p * BP + tl.arange(0, BP)
                        x = _tile(X, strides_x, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
                        dy = _tile(DY, strides_dy, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
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
                    dt = _vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
                    coarse, fine, coarse_sum, fine_sum = _decay_sums(
                        _vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
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
                            after, _ = _move(
                                after, k_1, DY, strides_dy, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t + 2 * C, o_c, o_p, T, True, PRECISION,
                            )  # fmt: skip
                            after, _ = _move(
                                after, k_2, DY, strides_dy, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t + C, o_c, o_p, T, True, PRECISION,
                            )  # fmt: skip
                        elif PLACE == 1:
                            before, _ = _move(
                                before, k_1, X, strides_x, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t - C, o_c, o_p, T, False, PRECISION,
                            )  # fmt: skip
                            after, _ = _move(
                                after, k_2, DY, strides_dy, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t + C, o_c, o_p, T, True, PRECISION,
                            )  # fmt: skip
                        else:
                            before, _ = _move(
                                before, k_1, X, strides_x, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t - 2 * C, o_c, o_p, T, False, PRECISION,
                            )  # fmt: skip
                            before, _ = _move(
                                before, k_2, X, strides_x, LOG_DECAY, strides_l, DT, strides_d,
                                i_b, i_h, t - C, o_c, o_p, T, False, PRECISION,
                            )  # fmt: skip
                        through += tl.sum(tl.sum(before * after, 0), 0)
                        before = before.to(k.dtype)
                        after = after.to(k.dtype)
                        dy = _tile(DY, strides_dy, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
                        dy_past = (dy * from_start[:, None]).to(dy.dtype)
                        dq = tl.dot(dy_past, tl.trans(before), dq, input_precision=PRECISION)
                        past = tl.dot(q, before, input_precision=PRECISION)  # (C, BP)
                        read += tl.sum(past * dy, 1) * from_start
                        x = _tile(X, strides_x, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
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


@triton.jit
def ssd_step_kernel(
    X,  # (B, H, P)
    LOG_DECAY,  # (B, H)
    DT,  # (B, H), or None
    K,  # b (B, G, N)
    Q,  # c (B, G, N)
    SKIP,  # (H,), or None
    STATE,  # (B, H, P, N)
    Y,  # (B, H, P)
    NEXT,  # (B, H, P, N)
    strides_x,
    strides_l,
    strides_d,
    strides_k,
    strides_q,
    H,
    R,  # heads a group
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
):
    """One token of a head."""
    i_p, i_h, i_b, _ = _place(P // BP, H, tl.num_programs(0))
    o_p = i_p * BP + tl.arange(0, BP)
    o_n = tl.arange(0, N)
    i_bh = i_b.to(tl.int64) * H + i_h
    o_state = i_bh * (P * N) + o_p[:, None] * N + o_n[None, :]
    b = i_b.to(tl.int64)
    x = tl.load(X + b * strides_x[0] + i_h * strides_x[1] + o_p).to(tl.float32)
    k = tl.load(K + b * strides_k[0] + i_h // R * strides_k[1] + o_n).to(tl.float32)
    q = tl.load(Q + b * strides_q[0] + i_h // R * strides_q[1] + o_n).to(tl.float32)
    log_decay = tl.load(LOG_DECAY + b * strides_l[0] + i_h * strides_l[1]).to(tl.float32)
    u = x
    if DT is not None:
        u *= tl.load(DT + b * strides_d[0] + i_h * strides_d[1]).to(tl.float32)
    state = tl.load(STATE + o_state) * tl.exp2(log_decay * 1.4426950408889634)
    state += u[:, None] * k[None, :]  # (BP, N)
    tl.store(NEXT + o_state, state)
    y = tl.sum(state * q[None, :], 1)
    if SKIP is not None:
        y += tl.load(SKIP + i_h).to(tl.float32) * x
    tl.store(Y + i_bh * P + o_p, y.to(Y.dtype.element_ty))


@torch.library.custom_op("seqscale::ssd", mutates_args=())
def ssd_op(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None,
    dt: Tensor | None,
    skip: Tensor | None,
    segments: int,
    wants_state: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass.

    Args:
        x: (B, T, H, P), and log_decay, b, c, dt and skip as in `archs.ops.ssd`.
        log_decay: likewise.
        b: likewise.
        c: likewise.
        state: (B, H, P, N) in float32.
        dt: likewise.
        skip: likewise.
        segments: how many parts of the sequence run side by side.
        wants_state: whether the state after x is formed.
        keeps: whether states are kept for the backward pass.

    Returns:
        y (B, T, H, P), the state after x (B, H, P, N) in float32, and the states before every
        SPACED chunks (B, ceil(T / (SPACED C)), H, N, P) in x's dtype; what is not wanted is empty.
    """
    x, b, c = (_rows_in_order(t) for t in (x, b, c))
    state = None if state is None else state.contiguous()
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    y = torch.empty(B, T, H, P, dtype=x.dtype, device=x.device)
    end = x.new_empty((B, H, P, N) if wants_state else 0, dtype=torch.float32)
    chunk = CHUNK[x.element_size()]
    kept = x.new_empty((B, triton.cdiv(T, SPACED * chunk), H, N, P) if keeps else 0)
    S, segment = _segments(T, segments, chunk)
    partial = decayed = None
    if S > 1:
        partial, decayed = _parts(x, b, log_decay, dt, S, segment, reverse=False)
    block_p = min(P, BLOCK_P)
    ssd_forward_kernel[(B * S * H * (P // block_p),)](
        x,
        log_decay,
        dt,
        b,
        c,
        skip,
        state,
        partial,
        decayed,
        y,
        kept if keeps else None,
        end if wants_state else None,
        x.stride(),
        log_decay.stride(),
        _strides(dt),
        b.stride(),
        c.stride(),
        y.stride(),
        T,
        H,
        H // G,
        S,
        segment,
        P=P,
        N=N,
        BP=block_p,
        C=chunk,
        SPACED=SPACED,
        PRECISION=_precision(x),
        **_launch(x),
    )
    return y, end, kept


@torch.library.custom_op("seqscale::ssd_backward", mutates_args=())
def ssd_backward_op(
    dy: Tensor,
    dend: Tensor | None,
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor | None,
    skip: Tensor | None,
    kept: Tensor,
    segments: int,
    wants_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass, from the gradients of y and of the state after x.

    Returns:
        The gradients of x, log_decay, b, c, the state before x (where `wants_state`), dt and
        skip, each in its tensor's dtype; of what is None or not wanted, empty.
    """
    x, dy, b, c = (_rows_in_order(t) for t in (x, dy, b, c))
    dend = None if dend is None else dend.contiguous()
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    chunk = CHUNK[x.element_size()]
    S, segment = _segments(T, segments, chunk)
    partial = decayed = None
    if S > 1:
        partial, decayed = _parts(dy, c, log_decay, None, S, segment, reverse=True)
    after = torch.empty_like(kept)
    dstate = x.new_empty((B, H, P, N) if wants_state else 0, dtype=torch.float32)
    block_p = min(P, BLOCK_P)
    parts, chunks = P // block_p, triton.cdiv(T, chunk)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    db = torch.empty(b.shape, dtype=b.dtype, device=x.device)
    dc = torch.empty(c.shape, dtype=c.dtype, device=x.device)
    shares = torch.empty(2 + parts, B, T, H, dtype=torch.float32, device=x.device)
    ddt = x.new_empty(0 if dt is None else (parts, B, T, H), dtype=torch.float32)
    dskip = x.new_empty(0 if skip is None else (parts, B, S, H), dtype=torch.float32)
    ssd_backward_kernel[(B * S * H * parts,)](
        x,
        dy,
        log_decay,
        dt,
        b,
        c,
        skip,
        dend,
        partial,
        decayed,
        dx,
        None if dt is None else ddt,
        None if skip is None else dskip,
        shares[2:],
        after,
        dstate if wants_state else None,
        x.stride(),
        dy.stride(),
        log_decay.stride(),
        _strides(dt),
        b.stride(),
        c.stride(),
        T,
        H,
        H // G,
        S,
        segment,
        P=P,
        N=N,
        BP=block_p,
        C=chunk,
        SPACED=SPACED,
        PRECISION=_precision(x),
        **_launch(x),
    )
    ssd_gradients_kernel[(B * chunks * G,)](
        x,
        dy,
        log_decay,
        dt,
        b,
        c,
        kept,
        after,
        shares[0],
        shares[1],
        db,
        dc,
        x.stride(),
        dy.stride(),
        log_decay.stride(),
        _strides(dt),
        b.stride(),
        c.stride(),
        T,
        H,
        H // G,
        P=P,
        N=N,
        BP=block_p,
        C=chunk,
        SPACED=SPACED,
        BH=BLOCK_H,
        OVERLAP=x.element_size() == 2,
        PRECISION=_precision(x),
        **_launch(x),
    )
    if dt is not None:
        ddt = (ddt.sum(0) if parts > 1 else ddt[0]).to(dt.dtype)
    if skip is not None:
        dskip = dskip.sum((0, 1, 2)).to(skip.dtype)
    return dx, shares.sum(0).to(log_decay.dtype), db, dc, dstate, ddt, dskip


def _parts(
    u: Tensor,
    k: Tensor,
    log_decay: Tensor,
    dt: Tensor | None,
    S: int,
    segment: int,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What each segment but the last walked adds to the state, and its decay."""
    B, T, H, P = u.shape
    G, N = k.shape[2:]
    partial = torch.empty(B, S, H, P, N, dtype=torch.float32, device=u.device)
    decayed = torch.empty(B, S, H, dtype=torch.float32, device=u.device)
    block_p = min(P, BLOCK_P)
    ssd_fold_kernel[(B * (S - 1) * H * (P // block_p),)](
        u,
        k,
        log_decay,
        dt,
        partial,
        decayed,
        u.stride(),
        k.stride(),
        log_decay.stride(),
        _strides(dt),
        T,
        H,
        H // G,
        S,
        segment,
        P=P,
        N=N,
        BP=block_p,
        C=CHUNK[u.element_size()],
        REVERSE=reverse,
        PRECISION=_precision(u),
        **_launch(u),
    )
    return partial, decayed


def _segments(T: int, segments: int, chunk: int) -> tuple[int, int]:
    """How many segments there are, none empty, and the tokens of each but the last."""
    segment = triton.cdiv(triton.cdiv(T, segments), SPACED * chunk) * SPACED * chunk
    return triton.cdiv(T, segment), segment


def _rows_in_order(x: Tensor) -> Tensor:
    """X with its last dimension contiguous: x itself wherever it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return () if x is None else x.stride()


def _precision(x: Tensor) -> str:
    """How float32 products are formed: to PyTorch's own setting for them, on tensor cores."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _launch(x: Tensor) -> dict[str, int]:
    return {"num_warps": 8, "num_stages": 2 if x.element_size() == 2 else 1}


@ssd_op.register_fake
def _(x, log_decay, b, c, state, dt, skip, segments, wants_state, keeps):
    B, T, H, P = x.shape
    N = b.shape[3]
    blocks = -(-T // (SPACED * CHUNK[x.element_size()]))
    return (
        x.new_empty(B, T, H, P),
        x.new_empty((B, H, P, N) if wants_state else 0, dtype=torch.float32),
        x.new_empty((B, blocks, H, N, P) if keeps else 0),
    )


@ssd_backward_op.register_fake
def _(dy, dend, x, log_decay, b, c, dt, skip, kept, segments, wants_state):
    B, _, H, P = x.shape
    N = b.shape[3]
    return (
        x.new_empty(x.shape),
        log_decay.new_empty(log_decay.shape),
        b.new_empty(b.shape),
        c.new_empty(c.shape),
        x.new_empty((B, H, P, N) if wants_state else 0, dtype=torch.float32),
        x.new_empty(0, dtype=torch.float32) if dt is None else dt.new_empty(dt.shape),
        x.new_empty(0, dtype=torch.float32) if skip is None else skip.new_empty(skip.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, log_decay, b, c, state, dt, skip, ctx.segments, ctx.wants_state, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(x, log_decay, b, c, dt, skip, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dend: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    x, log_decay, b, c, dt, skip, kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dend = dend if ctx.wants_state else None
    dx, dlog_decay, db, dc, dstate, ddt, dskip = ssd_backward_op(
        dy, dend, x, log_decay, b, c, dt, skip, kept, ctx.segments, ctx.has_state
    )
    return (
        dx,
        dlog_decay,
        db,
        dc,
        dstate if ctx.has_state else None,
        None if dt is None else ddt,
        None if skip is None else dskip,
        None,
        None,
        None,
    )


ssd_op.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("seqscale::ssd_step", mutates_args=())
def ssd_step_op(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    dt: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token: shapes as `archs.ops.ssd.ssd_step`, state in float32; y and the next state."""
    x, b, c = (_rows_in_order(t) for t in (x, b, c))
    state = state.contiguous()
    B, H, P = x.shape
    G, N = b.shape[1:]
    y = torch.empty(B, H, P, dtype=x.dtype, device=x.device)
    following = torch.empty_like(state)
    block_p = min(P, STEP_BLOCK_P)
    ssd_step_kernel[(B * H * (P // block_p),)](
        x,
        log_decay,
        dt,
        b,
        c,
        skip,
        state,
        y,
        following,
        x.stride(),
        log_decay.stride(),
        _strides(dt),
        b.stride(),
        c.stride(),
        H,
        H // G,
        P=P,
        N=N,
        BP=block_p,
        num_warps=4,
    )
    return y, following


@ssd_step_op.register_fake
def _(x, log_decay, b, c, state, dt, skip):
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate_step(
    ctx: Any, dy: Tensor | None, dend: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The backward pass of a sequence of one token, before which the state is kept."""
    x, log_decay, b, c, state, dt, skip = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    kept = state.to(x.dtype).transpose(2, 3).contiguous()
    dx, dlog_decay, db, dc, dstate, ddt, dskip = ssd_backward_op(
        dy[:, None],
        dend,
        x[:, None],
        log_decay[:, None],
        b[:, None],
        c[:, None],
        None if dt is None else dt[:, None],
        skip,
        kept[:, None],
        1,
        True,
    )
    return (
        dx[:, 0],
        dlog_decay[:, 0],
        db[:, 0],
        dc[:, 0],
        dstate,
        None if dt is None else ddt[:, 0],
        None if skip is None else dskip,
    )


ssd_step_op.register_autograd(_differentiate_step, setup_context=_setup_step)


@register_flop_formula(torch.ops.seqscale.ssd)
def _flops(x_shape: Any, log_decay_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    """Of the recurrence, whatever the chunk: 5 P N a token and head, a multiply-add counting 2."""
    return 5 * math.prod(x_shape) * b_shape[-1]


@register_flop_formula(torch.ops.seqscale.ssd_backward)
def _backward_flops(
    dy_shape: Any, dend_shape: Any, x_shape: Any, _: Any, b_shape: Any, *__: Any, **___: Any
) -> int:
    return 10 * math.prod(x_shape) * b_shape[-1]


@register_flop_formula(torch.ops.seqscale.ssd_step)
def _step_flops(x_shape: Any, log_decay_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return 5 * math.prod(x_shape) * b_shape[-1]
