"""SSD forward and in one step, in Triton; what its backward pass shares (see `ssd_kernel`)."""

import triton
import triton.language as tl


@triton.jit
def decay_sums(log_decay):
    """Sums of log-decays (C,) to base 2, in two parts: up to and with each token, and in all."""
    x = tl.maximum(log_decay.to(tl.float32) * 1.4426950408889634, -150.0)
    coarse = tl.floor(x * 1024.0) * 0.0009765625
    fine = x - coarse
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def vector(X, strides, i_b, i_h, t, o_c, T, default):
    """Tokens t + o_c (C,) of one head of X (B, T, H), 0 after the last; `default` if X is None."""
    if X is None:
        x = tl.where(t + o_c < T, tl.full(o_c.shape, default, tl.float32), 0.0)
    else:
        p_x = base(X, strides, i_b, i_h, t) + o_c * strides[1]
        x = tl.load(p_x, t + o_c < T, other=0.0).to(tl.float32)
    return x


@triton.jit
def tile(X, strides, i_b, i_h, t, o_c, o_n, T):
    """Tokens t + o_c of one head of X (B, T, H, n), 0 after the last: (C, n)."""
    p_x = base(X, strides, i_b, i_h, t) + o_c[:, None] * strides[1] + o_n[None, :]
    return tl.load(p_x, (t + o_c < T)[:, None], other=0.0)


@triton.jit
def base(X, strides, i_b, i_h, t):
    """Where token t of one head of X lies; offsets within a chunk fit in 32 bits."""
    return (
        X
        + i_b.to(tl.int64) * strides[0]
        + i_h.to(tl.int64) * strides[2]
        + t * tl.cast(strides[1], tl.int64)
    )


@triton.jit
def place(parts, H, S):
    """This program's part of a head, head, segment and batch row; heads lie side by side."""
    pid = tl.program_id(0)
    return pid % parts, pid // parts % H, pid // parts // H % S, pid // parts // H // S


@triton.jit
def start(
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
def move(
    state, k, U, strides_u, LOG_DECAY, strides_l, DT, strides_d, i_b, i_h, t, o_c, o_p, T,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A state (n, p) moved over the chunk at t, and log2 of its decay.

    It gains what is written along k, a tile of b (C, n), of U = x; in reverse, a gradient of a
    state gains what is read along k, a tile of c, of U = dy.
    """
    coarse, fine, coarse_sum, fine_sum = decay_sums(
        vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
    )
    if REVERSE:
        weight = tl.exp2(coarse + fine)
    else:
        weight = tl.exp2((coarse_sum - coarse) + (fine_sum - fine))
        weight *= vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
    u = tile(U, strides_u, i_b, i_h, t, o_c, o_p, T)  # (C, p)
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
    i_p, i_h, i_s, i_b = place(P // BP, H, S - 1)
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
        k = tile(K, strides_k, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        state, log2_decay = move(
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
    i_p, i_h, i_s, i_b = place(P // BP, H, S)
    o_p = i_p * BP + tl.arange(0, BP)
    o_n = tl.arange(0, N)
    o_c = tl.arange(0, C)
    state = start(START, PARTIAL, DECAYED, i_b, i_s, i_h, o_n, o_p, S, H, N, P, False, N, BP)
    if SKIP is not None:
        skip = tl.load(SKIP + i_h).to(tl.float32)
    first = i_s * segment
    for t in range(first, tl.minimum(first + segment, T), C):
        if KEPT is not None:
            i_kept = (i_b.to(tl.int64) * tl.cdiv(T, SPACED * C) + t // (SPACED * C)) * H + i_h
            p_kept = KEPT + i_kept * (N * P) + o_n[:, None] * P + o_p[None, :]
            # A masked store: around it a branch would cost registers, and spills.
            tl.store(p_kept, state.to(KEPT.dtype.element_ty), t % (SPACED * C) == 0)
        dt = vector(DT, strides_d, i_b, i_h, t, o_c, T, 1.0)
        coarse, fine, coarse_sum, fine_sum = decay_sums(
            vector(LOG_DECAY, strides_l, i_b, i_h, t, o_c, T, 0.0)
        )
        x = tile(X, strides_x, i_b, i_h, t, o_c, o_p, T)  # (C, BP)
        k = tile(K, strides_k, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        q = tile(Q, strides_q, i_b, i_h // R, t, o_c, o_n, T)  # (C, N)
        y = tl.zeros((C, BP), tl.float32)
        if t < T:  # see "Layouts" in `ssd_kernel`
            y = tl.dot(q, state.to(x.dtype), input_precision=PRECISION)
        y *= tl.exp2(coarse + fine)[:, None]
        weight = dt * tl.exp2((coarse_sum - coarse) + (fine_sum - fine))
        u = (x * weight[:, None]).to(x.dtype)
        state *= tl.exp2(coarse_sum + fine_sum)
        state = tl.dot(tl.trans(k), u, state, input_precision=PRECISION)
        mixing = tl.zeros((C, C), x.dtype)
        if t < T:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores *= tl.exp2((coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :]))
            scores *= dt[None, :]
            mixing = tl.where(o_c[:, None] >= o_c[None, :], scores, 0.0).to(x.dtype)
        y += tl.dot(mixing, x, input_precision=PRECISION)
        if SKIP is not None:
            y += skip * x.to(tl.float32)
        p_y = base(Y, strides_y, i_b, i_h, t) + o_c[:, None] * strides_y[1] + o_p[None, :]
        tl.store(p_y, y.to(Y.dtype.element_ty), (t + o_c < T)[:, None])
    if END is not None and i_s == S - 1:
        o_state = o_p[None, :] * N + o_n[:, None]
        tl.store(END + (i_b.to(tl.int64) * H + i_h) * (P * N) + o_state, state)


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
    i_p, i_h, i_b, _ = place(P // BP, H, tl.num_programs(0))
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
