"""WKV-7 backward, in Triton (see `wkv7_kernel`)."""

import triton
import triton.language as tl

from archs.ops.wkv7_forward_kernel import (
    decays,
    earlier,
    first_token,
    inverse,
    log2_decay,
    place,
    scaled,
    so_far,
    start,
)


@triton.jit(do_not_specialize=["T", "segment"])
def wkv7_backward_fold_kernel(
    R,  # (B, T, H, N)
    DECAY,  # (B, T, H, N)
    A,  # (B, T, H, N)
    B,  # (B, T, H, N)
    DY,  # (B, T, H, N)
    MOVED,  # (B, S, H, 2, N, N): what each adds to a state's gradient, and its transition
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
    """What a segment makes of no gradient of a state, or without dy of each unit gradient."""
    i_h, i_part, i_sb = place(H, 2)
    i_s, i_b = i_sb % (S - 1) + 1, i_sb // (S - 1)  # none starts from what the first one makes
    o_c, o_n = tl.arange(0, C), tl.arange(0, N)
    o_tile = o_c[:, None] * (H * N) + o_n[None, :]
    dstate = tl.where((o_n[:, None] == o_n[None, :]) & (i_part == 1), 1.0, 0.0)  # (N, N)
    first = i_s * segment
    chunks = tl.cdiv(tl.minimum(segment, T - first), C)
    for i in range(chunks):
        t = first + (chunks - 1 - i) * C
        m_tile = (t + o_c < T)[:, None]
        i_token = first_token(i_b, i_h, t, T, H, N)
        decay = log2_decay(DECAY + i_token, o_tile, m_tile, LOGITS)
        decayed, whole = decays(decay, PRECISION)
        dstate *= whole[:, None]
        b = scaled(B + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)
        a = scaled(A + i_token, o_tile, m_tile, tl.exp2(decayed - decay), DOT)
        r = scaled(R + i_token, o_tile, m_tile, tl.exp2(decayed), DOT)
        dy = scaled(DY + i_token, o_tile, m_tile & (i_part == 0), 1.0, DOT)
        ab = earlier(tl.dot(a, tl.trans(b), input_precision=PRECISION), o_c)
        rb = so_far(tl.dot(r, tl.trans(b), input_precision=PRECISION), o_c).to(DOT)
        du = tl.dot(tl.trans(rb), dy, input_precision=PRECISION)
        du = tl.dot(b, dstate.to(DOT), du, input_precision=PRECISION)
        solve = tl.trans(inverse(ab, o_c, C, PRECISION))
        du = tl.dot(solve, du, input_precision=PRECISION).to(DOT)
        dstate = tl.dot(tl.trans(a), du, dstate, input_precision=PRECISION)
        dstate = tl.dot(tl.trans(r), dy, dstate, input_precision=PRECISION)
    i_moved = ((i_b.to(tl.int64) * S + i_s) * H + i_h) * 2 + i_part
    tl.store(MOVED + i_moved * (N * N) + o_n[:, None] * N + o_n[None, :], dstate)


@triton.jit(do_not_specialize=["T", "segment"])
def wkv7_backward_kernel(
    R,  # (B, T, H, N)
    DECAY,  # (B, T, H, N)
    K,  # (B, T, H, N)
    V,  # (B, T, H, N)
    A,  # (B, T, H, N)
    B,  # (B, T, H, N)
    DY,  # (B, T, H, N)
    START,  # (B, H, N, N), the gradient of the state after the last token, or None
    MOVED,  # as `wkv7_backward_fold_kernel` leaves it, or None
    KEPT,  # (B, ceil(T / (SPACED C)), H, N, N), the states before every SPACED chunks
    STATES,  # (programs, SPACED, N, N): of a stretch, the states before its chunks
    DSTATES,  # (programs, SPACED, N, N): their gradients after its chunks, decayed over them
    SOLVES,  # (programs, SPACED, C, C), float32: the inverses
    US,  # (programs, SPACED, C, N): u
    DUS,  # (programs, SPACED, C, N): the gradients of what the inverses are applied to
    AFTER,  # (programs, N, N), float32: the gradient of the state before the stretch
    DR,  # (B, T, H, N)
    DDECAY,  # (B, T, H, N)
    DK,  # (B, T, H, N)
    DV,  # (B, T, H, N)
    DA,  # (B, T, H, N)
    DB,  # (B, T, H, N)
    END,  # (B, H, N, N), the gradient of the state before the first token, or None
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
    """The gradients of a segment and head, a stretch of SPACED chunks after the other.

    Three loops over a stretch, which leave each other what they find in memory of the program's
    own, small enough to stay in the cache: forward, the states; backward, their gradients; then
    all that is left of each chunk. One loop would need more registers than there are.
    """
    i_h, i_s, i_b = place(H, S)
    o_c, o_n = tl.arange(0, C), tl.arange(0, N)
    o_tile = o_c[:, None] * (H * N) + o_n[None, :]
    o_state = o_n[:, None] * N + o_n[None, :]
    o_pairs = o_c[:, None] * C + o_c[None, :]
    o_chunk = o_c[:, None] * N + o_n[None, :]
    dstate = start(START, MOVED, i_b, i_s, i_h, o_state, S, H, N, True)
    i_own = tl.program_id(0).to(tl.int64) * SPACED
    first = i_s * segment
    last = tl.minimum(first + segment, T)
    stretches = tl.cdiv(last - first, SPACED * C)
    for i in tl.range(0, stretches, num_stages=1, disable_licm=True):
        begin = first + (stretches - 1 - i) * SPACED * C
        chunks = tl.cdiv(tl.minimum(SPACED * C, last - begin), C)

        i_kept = (i_b.to(tl.int64) * tl.cdiv(T, SPACED * C) + begin // (SPACED * C)) * H + i_h
        state = tl.load(KEPT + i_kept * (N * N) + o_state).to(tl.float32)
        for j in tl.range(0, chunks, num_stages=1, disable_licm=True):
            t = begin + j * C
            m_tile = (t + o_c < T)[:, None]
            i_token = first_token(i_b, i_h, t, T, H, N)
            tl.store(STATES + (i_own + j) * (N * N) + o_state, state.to(DOT))
            decay = log2_decay(DECAY + i_token, o_tile, m_tile, LOGITS)
            decayed, whole = decays(decay, PRECISION)
            b = scaled(B + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)
            k = scaled(K + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)
            a = scaled(A + i_token, o_tile, m_tile, tl.exp2(decayed - decay), DOT)
            v = scaled(V + i_token, o_tile, m_tile, 1.0, DOT)
            ab = earlier(tl.dot(a, tl.trans(b), input_precision=PRECISION), o_c)
            solve = inverse(ab, o_c, C, PRECISION)
            tl.store(SOLVES + (i_own + j) * (C * C) + o_pairs, solve)
            ak = earlier(tl.dot(a, tl.trans(k), input_precision=PRECISION), o_c).to(DOT)
            u = tl.dot(a, state.to(DOT), input_precision=PRECISION)
            u = tl.dot(ak, v, u, input_precision=PRECISION)
            u = tl.dot(solve, u, input_precision=PRECISION).to(DOT)
            tl.store(US + (i_own + j) * (C * N) + o_chunk, u)
            state = tl.dot(tl.trans(b), u, state, input_precision=PRECISION)
            state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
            state *= whole[:, None]
        tl.debug_barrier()

        for i_back in tl.range(0, chunks, num_stages=1, disable_licm=True):
            j = chunks - 1 - i_back
            t = begin + j * C
            m_tile = (t + o_c < T)[:, None]
            i_token = first_token(i_b, i_h, t, T, H, N)
            solve = tl.load(SOLVES + (i_own + j) * (C * C) + o_pairs)
            decay = log2_decay(DECAY + i_token, o_tile, m_tile, LOGITS)
            decayed, whole = decays(decay, PRECISION)
            dstate *= whole[:, None]
            dstate_low = dstate.to(DOT)
            tl.store(DSTATES + (i_own + j) * (N * N) + o_state, dstate_low)
            b = scaled(B + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)
            r = scaled(R + i_token, o_tile, m_tile, tl.exp2(decayed), DOT)
            dy = scaled(DY + i_token, o_tile, m_tile, 1.0, DOT)
            rb = so_far(tl.dot(r, tl.trans(b), input_precision=PRECISION), o_c).to(DOT)
            du = tl.dot(tl.trans(rb), dy, input_precision=PRECISION)
            du = tl.dot(b, dstate_low, du, input_precision=PRECISION)
            du = tl.dot(tl.trans(solve), du, input_precision=PRECISION).to(DOT)
            tl.store(DUS + (i_own + j) * (C * N) + o_chunk, du)
            a = scaled(A + i_token, o_tile, m_tile, tl.exp2(decayed - decay), DOT)
            dstate = tl.dot(tl.trans(a), du, dstate, input_precision=PRECISION)
            dstate = tl.dot(tl.trans(r), dy, dstate, input_precision=PRECISION)
            k = scaled(K + i_token, o_tile, m_tile, tl.exp2(-decayed), DOT)
            rk = so_far(tl.dot(r, tl.trans(k), input_precision=PRECISION), o_c).to(DOT)
            ak = earlier(tl.dot(a, tl.trans(k), input_precision=PRECISION), o_c).to(DOT)
            dv = tl.dot(tl.trans(rk), dy, input_precision=PRECISION)
            dv = tl.dot(k, dstate_low, dv, input_precision=PRECISION)
            dv = tl.dot(tl.trans(ak), du, dv, input_precision=PRECISION)
            tl.store(DV + i_token + o_tile, dv.to(DV.dtype.element_ty), m_tile)
        tl.store(AFTER + tl.program_id(0).to(tl.int64) * (N * N) + o_state, dstate)
        tl.debug_barrier()

        for j in tl.range(0, chunks, num_stages=1, disable_licm=True):
            t = begin + j * C
            m_tile = (t + o_c < T)[:, None]
            i_token = first_token(i_b, i_h, t, T, H, N)
            decay = log2_decay(DECAY + i_token, o_tile, m_tile, LOGITS)
            decayed, _ = decays(decay, PRECISION)
            s = tl.load(STATES + (i_own + j) * (N * N) + o_state)
            ds = tl.load(DSTATES + (i_own + j) * (N * N) + o_state)
            u = tl.load(US + (i_own + j) * (C * N) + o_chunk)
            v = scaled(V + i_token, o_tile, m_tile, 1.0, DOT)
            dy = scaled(DY + i_token, o_tile, m_tile, 1.0, DOT)
            drb = so_far(tl.dot(dy, tl.trans(u), input_precision=PRECISION), o_c).to(DOT)
            drk = so_far(tl.dot(dy, tl.trans(v), input_precision=PRECISION), o_c).to(DOT)
            b = scaled(B + i_token, o_tile, m_tile, tl.exp2(-decayed), tl.float32)
            k = scaled(K + i_token, o_tile, m_tile, tl.exp2(-decayed), tl.float32)

            # A decay multiplies the paths from before its token into it or later. Of those inside
            # the chunk, each token's sum of the paths that are read there, less those written.
            dr = tl.dot(dy, tl.trans(s), input_precision=PRECISION)
            dr = tl.dot(drb, b.to(DOT), dr, input_precision=PRECISION)
            dr = tl.dot(drk, k.to(DOT), dr, input_precision=PRECISION)
            dr *= tl.exp2(decayed)
            tl.store(DR + i_token + o_tile, dr.to(DR.dtype.element_ty), m_tile)
            r = scaled(R + i_token, o_tile, m_tile, 1.0, tl.float32)
            inside = dr * r
            r = (r * tl.exp2(decayed)).to(DOT)

            du = tl.load(DUS + (i_own + j) * (C * N) + o_chunk)
            dab = earlier(tl.dot(du, tl.trans(u), input_precision=PRECISION), o_c).to(DOT)
            dak = earlier(tl.dot(du, tl.trans(v), input_precision=PRECISION), o_c).to(DOT)
            da = tl.dot(du, tl.trans(s), input_precision=PRECISION)
            da = tl.dot(dab, b.to(DOT), da, input_precision=PRECISION)
            da = tl.dot(dak, k.to(DOT), da, input_precision=PRECISION)
            da *= tl.exp2(decayed - decay)
            tl.store(DA + i_token + o_tile, da.to(DA.dtype.element_ty), m_tile)
            a = scaled(A + i_token, o_tile, m_tile, 1.0, tl.float32)
            read_before = da * a  # a reads a state before its token's decay
            a = (a * tl.exp2(decayed - decay)).to(DOT)

            db = tl.dot(tl.trans(dab), a, input_precision=PRECISION)
            db = tl.dot(tl.trans(drb), r, db, input_precision=PRECISION)
            inside -= db * b
            later = tl.dot(u, tl.trans(ds), input_precision=PRECISION)
            out = later * b
            db = (db + later) * tl.exp2(-decayed)
            tl.store(DB + i_token + o_tile, db.to(DB.dtype.element_ty), m_tile)

            dk = tl.dot(tl.trans(dak), a, input_precision=PRECISION)
            dk = tl.dot(tl.trans(drk), r, dk, input_precision=PRECISION)
            inside -= dk * k
            later = tl.dot(v, tl.trans(ds), input_precision=PRECISION)
            out += later * k
            dk = (dk + later) * tl.exp2(-decayed)
            tl.store(DK + i_token + o_tile, dk.to(DK.dtype.element_ty), m_tile)

            ddecay = tl.cumsum(inside + read_before, 0, reverse=True) - read_before
            ddecay += tl.cumsum(out, 0) - out
            ddecay += tl.sum(ds.to(tl.float32) * s.to(tl.float32), 1)[None, :]
            if LOGITS:
                ddecay *= decay * (0.6931471805599453 + decay * 0.7921331036189234)
            tl.store(DDECAY + i_token + o_tile, ddecay.to(DDECAY.dtype.element_ty), m_tile)
        tl.debug_barrier()
        dstate = tl.load(AFTER + tl.program_id(0).to(tl.int64) * (N * N) + o_state)
    if END is not None and i_s == 0:
        tl.store(END + (i_b.to(tl.int64) * H + i_h) * (N * N) + o_state, dstate)
