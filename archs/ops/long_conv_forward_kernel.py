"""The long convolution forward and in one step, in Triton (see `long_conv_kernel`)."""

import triton
import triton.language as tl

from archs.ops.long_conv_fft_kernel import (
    anew,
    load_signal,
    load_table,
    load_taps,
    row,
    scaled,
    signal,
    spectrum,
    store_row,
)


@triton.jit(do_not_specialize=["T"])
def long_conv_forward_kernel(
    U,  # (B, D, T), and every signal
    PRE,
    POST,
    FILTER,  # (D, T)
    SKIP,  # (D,)
    SHORT,  # (3, D, 3), for POST, PRE and U
    BIAS,  # (3, D)
    F1,  # (PARTS, 2, N1, N1)
    TWIDDLES,  # (2, N1, N2)
    F2,  # (PARTS, 2, N2, N2)
    Y,
    T,
    B,
    D,
    rows,  # of the batch, of a program
    u_batch,
    u_channel,
    pre_batch,
    pre_channel,
    post_batch,
    post_channel,
    filter_channel,
    y_batch,
    y_channel,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One channel of some rows of the batch."""
    i_d = (tl.program_id(0) % D).to(tl.int64)
    first = tl.program_id(0) // D * rows
    o_tile = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    f1, f2 = load_table(F1, N1, N1, PARTS), load_table(F2, N2, N2, PARTS)
    taps, unit = scaled(load_taps(FILTER + i_d * filter_channel, SKIP, i_d, o_tile, T, False))
    unit *= (N1 * N2) ** 0.5
    h_re, h_im = spectrum(taps, f1, f2, TWIDDLES, N1, N2, PARTS)
    for i in tl.range(first, min(first + rows, B), disable_licm=True):
        o_row, p_twiddles = anew(o_tile, i), anew(TWIDDLES, i)
        p_u = row(U, i, i_d, u_batch, u_channel)
        z = load_signal(p_u, SHORT, BIAS, 2, i_d, o_row, T, D, False)
        if PRE is not None:
            o_row = anew(o_tile, i + 1)
            p_pre = row(PRE, i, i_d, pre_batch, pre_channel)
            z *= load_signal(p_pre, SHORT, BIAS, 1, i_d, o_row, T, D, False)
        z, scale = scaled(z)
        z_re, z_im = spectrum(z, f1, f2, p_twiddles, N1, N2, PARTS)
        v_re, v_im = z_re * h_re - z_im * h_im, z_re * h_im + z_im * h_re
        y = signal(v_re, v_im, f1, f2, p_twiddles, N1, N2, PARTS) * (unit * scale)
        if POST is not None:
            p_post = row(POST, i, i_d, post_batch, post_channel)
            y *= load_signal(p_post, SHORT, BIAS, 0, i_d, o_row, T, D, False)
        store_row(row(Y, i, i_d, y_batch, y_channel), y, o_row, T, False)


@triton.jit(do_not_specialize=["S"])
def long_conv_step_kernel(
    U,  # (B, D)
    TAPS,  # (D, S+1), oldest first
    HISTORY,  # (B, D, S)
    PRE,  # (B, D)
    POST,  # (B, D)
    SKIP,  # (D,)
    Y,  # (B, D)
    Z,  # (B, D)
    S,
    B,
    D,
    taps_channel,
    history_batch,
    history_channel,
    ROWS: tl.constexpr,  # of the batch, of a program
    BLOCK: tl.constexpr,  # tokens at a time
):
    """One channel of some rows of the batch: the direct sum over the history."""
    i_d = (tl.program_id(0) % D).to(tl.int64)
    o_b = tl.program_id(0) // D * ROWS + tl.arange(0, ROWS)
    o_s = tl.arange(0, BLOCK)
    m_b = o_b < B
    p_taps = TAPS + i_d * taps_channel
    p_history = HISTORY + o_b.to(tl.int64)[:, None] * history_batch + i_d * history_channel
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for s in range(0, S, BLOCK):
        m_s = s + o_s < S
        taps = tl.load(p_taps + s + o_s, m_s, other=0.0).to(tl.float32)
        past = tl.load(p_history + s + o_s[None, :], m_b[:, None] & m_s[None, :], other=0.0)
        sums += taps[None, :] * past.to(tl.float32)
    o_row = o_b.to(tl.int64) * D + i_d
    z = tl.load(U + o_row, m_b, other=0.0).to(tl.float32)
    if PRE is not None:
        z *= tl.load(PRE + o_row, m_b, other=0.0).to(tl.float32)
    own = tl.load(p_taps + S).to(tl.float32)
    if SKIP is not None:
        own += tl.load(SKIP + i_d).to(tl.float32)
    y = tl.sum(sums, 1) + own * z
    if POST is not None:
        y *= tl.load(POST + o_row, m_b, other=0.0).to(tl.float32)
    tl.store(Y + o_row, y, m_b)
    tl.store(Z + o_row, z, m_b)
