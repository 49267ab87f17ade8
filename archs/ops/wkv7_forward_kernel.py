"""WKV-7 forward and in one step, in Triton; what its backward pass shares (see `wkv7_kernel`)."""

import triton
import triton.language as tl


@triton.jit
def place(H, S):
    """This program's head, segment and batch row; heads lie side by side."""
    pid = tl.program_id(0)
    return pid % H, pid // H % S, pid // H // S


@triton.jit
def first_token(i_b, i_h, t, T, H, N: tl.constexpr):
    """Where token t of one head lies in a tensor (B, T, H, N)."""
    return ((i_b.to(tl.int64) * T + t) * H + i_h) * N


@triton.jit
def log2_decay(DECAY, o_tile, m_tile, LOGITS: tl.constexpr):
    """Log-decays (C, N) to base 2, 0 after the last token."""
    decay = tl.load(DECAY + o_tile, m_tile, other=0.0).to(tl.float32)
    if LOGITS:
        decay = tl.where(m_tile, -0.8750387749145276 * tl.sigmoid(decay), 0.0)
    else:
        decay *= 1.4426950408889634
        decay = tl.where(decay < -1.4426950408889634, float("nan"), decay)
    return decay


@triton.jit
def decays(log2, PRECISION: tl.constexpr):
    """Sums of log-decays (C, N), up to and with each token, and the decay over all of them (N,)."""
    if PRECISION == "tf32x3":  # multiples of 2^-10, which add up without rounding, and the rest
        coarse = tl.floor(log2 * 1024.0) * 0.0009765625
        fine = log2 - coarse
        decayed = tl.cumsum(coarse, 0) + tl.cumsum(fine, 0)
        whole = tl.exp2(tl.sum(coarse, 0)) * tl.exp2(tl.sum(fine, 0))
    else:
        decayed = tl.cumsum(log2, 0)
        whole = tl.exp2(tl.sum(log2, 0))
    return decayed, whole


@triton.jit
def scaled(X, o_tile, m_tile, by, DOT: tl.constexpr):
    """Tokens (C, N) of one head of X times `by`, 0 after the last, as products take them."""
    return (tl.load(X + o_tile, m_tile, other=0.0).to(tl.float32) * by).to(DOT)


@triton.jit
def earlier(pairs, o_c):
    """The pairs (C, C) of a token and those before it; 0 elsewhere."""
    return tl.where(o_c[:, None] > o_c[None, :], pairs, 0.0)


@triton.jit
def so_far(pairs, o_c):
    """The pairs (C, C) of a token and those up to it; 0 elsewhere."""
    return tl.where(o_c[:, None] >= o_c[None, :], pairs, 0.0)


@triton.jit
def inverse(pairs, o_c, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I - pairs)^-1 of pairs (C, C) below the diagonal: inverses of blocks, merged two by two."""
    i, j = o_c[:, None], o_c[None, :]
    found = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, pairs, 0.0))
    tl.static_assert(C == 32)
    for n in tl.static_range(1, 5):  # blocks of 2, 4, 8 and 16 tokens
        same, merged = i >> n == j >> n, i >> (n + 1) == j >> (n + 1)
        between = tl.where(merged & (same == 0), pairs, 0.0)
        half = tl.dot(found, between, input_precision=PRECISION)
        found = tl.dot(half, found, found, input_precision=PRECISION)
    return found


@triton.jit
def start(STATE, MOVED, i_b, i_s, i_h, o_state, S, H, N: tl.constexpr, REVERSE: tl.constexpr):
    """The state (N, N) in which a segment starts: moved over the segments walked before."""
    state = tl.zeros((N, N), tl.float32)
    if STATE is not None:
        state += tl.load(STATE + (i_b.to(tl.int64) * H + i_h) * (N * N) + o_state)
    if MOVED is not None:
        before = S - 1 - i_s if REVERSE else i_s
        for i in range(before):
            i_from = S - 1 - i if REVERSE else i
            p_moved = MOVED + ((i_b.to(tl.int64) * S + i_from) * H + i_h) * (2 * N * N) + o_state
            added = tl.load(p_moved)
            transition = tl.load(p_moved + N * N)
            state = tl.dot(transition, state, added, input_precision="tf32x3")
    return state


@triton.jit(do_not_specialize=["T", "segment"])
def wkv7_fold_kernel(
    DECAY,  # (B, T, H, N)
    K,  # (B, T, H, N)
    V,  # (B, T, H, N)
    A,  # (B, T, H, N)
    B,  # (B, T, H, N)
    MOVED,  # (B, S, H, 2, N, N): what each segment adds to the state, and its transition
    T,
    H,
    S,
    segment,  # tokens, a multiple of SPACED C
    N: tl.constexpr,
    C: tl.constexpr,
    LOGITS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a segment makes of no state, or without values of each unit state."""
    i_h, i_part, i_sb = place(H, 2)
    i_s, i_b = i_sb % (S - 1), i_sb // (S - 1)  # none starts from what the last one makes
    o_c, o_n = tl.arange(0, C), tl.arange(0, N)
    o_tile = o_c[:, None] * (H * N) + o_n[None, :]
    state = tl.where((o_n[:, None] == o_n[None, :]) & (i_part == 1), 1.0, 0.0)  # (N, N)
    for t in range(i_s * segment, (i_s + 1) * segment, C):
        m_tile = (t + o_c < T)[:, None]
        i_token = first_token(i_b, i_h, t, T, H, N)
        decay = log2_decay(DECAY + i_token, o_tile, m_tile, LOGITS)
        decayed, whole = decays(decay, PRECISION)
        b = scaled(B + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)
        k = scaled(K + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)
        a = scaled(A + i_token, o_tile, m_tile, tl.exp2(decayed - decay), DOT)
        v = scaled(V + i_token, o_tile, m_tile & (i_part == 0), 1.0, DOT)
        ab = earlier(tl.dot(a, tl.trans(b), input_precision=PRECISION), o_c)
        ak = earlier(tl.dot(a, tl.trans(k), input_precision=PRECISION), o_c).to(DOT)
        u = tl.dot(a, state.to(DOT), input_precision=PRECISION)
        u = tl.dot(ak, v, u, input_precision=PRECISION)
        u = tl.dot(inverse(ab, o_c, C, PRECISION), u, input_precision=PRECISION).to(DOT)
        state = tl.dot(tl.trans(b), u, state, input_precision=PRECISION)
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
        state *= whole[:, None]
    i_moved = ((i_b.to(tl.int64) * S + i_s) * H + i_h) * 2 + i_part
    tl.store(MOVED + i_moved * (N * N) + o_n[:, None] * N + o_n[None, :], state)


@triton.jit(do_not_specialize=["T", "segment"])
def wkv7_forward_kernel(
    R,  # (B, T, H, N)
    DECAY,  # (B, T, H, N)
    K,  # (B, T, H, N)
    V,  # (B, T, H, N)
    A,  # (B, T, H, N)
    B,  # (B, T, H, N)
    START,  # (B, H, N, N), or None
    MOVED,  # as `wkv7_fold_kernel` leaves it, or None
    Y,  # (B, T, H, N)
    KEPT,  # (B, ceil(T / (SPACED C)), H, N, N), the states before every SPACED chunks, or None
    END,  # (B, H, N, N), or None
    T,
    H,
    S,
    segment,  # tokens, a multiple of SPACED C
    N: tl.constexpr,
    C: tl.constexpr,
    SPACED: tl.constexpr,  # chunks between kept states
    LOGITS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of a segment and head."""
    i_h, i_s, i_b = place(H, S)
    o_c, o_n = tl.arange(0, C), tl.arange(0, N)
    o_tile = o_c[:, None] * (H * N) + o_n[None, :]
    o_state = o_n[:, None] * N + o_n[None, :]
    state = start(START, MOVED, i_b, i_s, i_h, o_state, S, H, N, False)
    first = i_s * segment
    for t in range(first, tl.minimum(first + segment, T), C):
        if KEPT is not None:
            i_kept = (i_b.to(tl.int64) * tl.cdiv(T, SPACED * C) + t // (SPACED * C)) * H + i_h
            p_kept = KEPT + i_kept * (N * N) + o_state
            tl.store(p_kept, state.to(KEPT.dtype.element_ty), t % (SPACED * C) == 0)
        m_tile = (t + o_c < T)[:, None]
        i_token = first_token(i_b, i_h, t, T, H, N)
        decay = log2_decay(DECAY + i_token, o_tile, m_tile, LOGITS)
        decayed, whole = decays(decay, PRECISION)
        b = scaled(B + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)  # (C, N), as all of these
        k = scaled(K + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)
        a = scaled(A + i_token, o_tile, m_tile, tl.exp2(decayed - decay), DOT)
        r = scaled(R + i_token, o_tile, m_tile, tl.exp2(decayed), DOT)
        v = scaled(V + i_token, o_tile, m_tile, 1.0, DOT)
        ab = earlier(tl.dot(a, tl.trans(b), input_precision=PRECISION), o_c)  # (C, C)
        ak = earlier(tl.dot(a, tl.trans(k), input_precision=PRECISION), o_c).to(DOT)
        u = tl.dot(a, state.to(DOT), input_precision=PRECISION)  # (C, N)
        u = tl.dot(ak, v, u, input_precision=PRECISION)
        u = tl.dot(inverse(ab, o_c, C, PRECISION), u, input_precision=PRECISION).to(DOT)
        rk = so_far(tl.dot(r, tl.trans(k), input_precision=PRECISION), o_c).to(DOT)
        rb = so_far(tl.dot(r, tl.trans(b), input_precision=PRECISION), o_c).to(DOT)
        y = tl.dot(r, state.to(DOT), input_precision=PRECISION)  # (C, N)
        y = tl.dot(rk, v, y, input_precision=PRECISION)
        y = tl.dot(rb, u, y, input_precision=PRECISION)
        tl.store(Y + i_token + o_tile, y.to(Y.dtype.element_ty), m_tile)
        state = tl.dot(tl.trans(b), u, state, input_precision=PRECISION)
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
        state *= whole[:, None]
    if END is not None and i_s == S - 1:
        tl.store(END + (i_b.to(tl.int64) * H + i_h) * (N * N) + o_state, state)


@triton.jit
def wkv7_step_kernel(
    R,  # (B, H, N)
    DECAY,  # (B, H, N)
    K,  # (B, H, N)
    V,  # (B, H, N)
    A,  # (B, H, N)
    B,  # (B, H, N)
    STATE,  # (B, H, N, N)
    Y,  # (B, H, N)
    NEXT,  # (B, H, N, N)
    N: tl.constexpr,
    BV: tl.constexpr,  # columns of the state in one program
    LOGITS: tl.constexpr,
):
    """One token of a head."""
    pid = tl.program_id(0)
    i_bh, i_v = pid // (N // BV), pid % (N // BV)
    o_n, o_v = tl.arange(0, N), i_v * BV + tl.arange(0, BV)
    i_token = i_bh.to(tl.int64) * N
    r = tl.load(R + i_token + o_n).to(tl.float32)
    k = tl.load(K + i_token + o_n).to(tl.float32)
    a = tl.load(A + i_token + o_n).to(tl.float32)
    b = tl.load(B + i_token + o_n).to(tl.float32)
    v = tl.load(V + i_token + o_v).to(tl.float32)
    decay = tl.load(DECAY + i_token + o_n).to(tl.float32)
    if LOGITS:
        decay = tl.exp2(-0.8750387749145276 * tl.sigmoid(decay))
    else:
        decay = tl.exp2(decay * 1.4426950408889634)
    p_state = i_token * N + o_n[:, None] * N + o_v[None, :]
    state = tl.load(STATE + p_state)  # (N, BV)
    removed = tl.sum(a[:, None] * state, 0)
    state = decay[:, None] * state + b[:, None] * removed[None, :] + k[:, None] * v[None, :]
    tl.store(NEXT + p_state, state)
    tl.store(Y + i_token + o_v, tl.sum(r[:, None] * state, 0).to(Y.dtype.element_ty))
