"""The long convolution backward, in Triton (see `long_conv_kernel`)."""

import triton
import triton.language as tl

from archs.ops.long_conv_fft_kernel import (
    anew,
    load_row,
    load_signal,
    load_table,
    load_taps,
    row,
    scaled,
    scaled_complex,
    signal,
    spectrum,
    store_row,
)


@triton.jit
def keep(P, x, o_row, SHORT):
    """Keep a signal that is dear to form again: it went through a short convolution."""
    if SHORT is not None:
        tl.store(P + o_row, x)


@triton.jit
def load_kept(X, P, o_row, T, SHORT, FULL: tl.constexpr):
    """A signal that was kept, or did not have to be."""
    if SHORT is not None:
        return tl.load(P + o_row)
    return load_row(X, o_row, T, FULL)


@triton.jit
def put(DX, P, d, o_row, T, SHORT, FULL: tl.constexpr):
    """A signal's gradient: where it is asked for, or where `short_backward` finds it."""
    if SHORT is not None:
        tl.store(P + o_row, d)
    else:
        store_row(DX, d, o_row, T, FULL)


@triton.jit
def short_backward(
    X, P, DX, SHORT, SUMS, i_signal: tl.constexpr, again, i_d, o_row, T, D, FULL: tl.constexpr
):
    """A short convolution's gradients of a row X, of its taps and of its bias."""
    x = load_row(X, o_row, T, FULL)
    d = load_row(P, o_row, T, FULL)
    d_next = load_row(P + 1, o_row, T - 1, False)
    d_second = load_row(P + 2, o_row, T - 2, False)
    p_taps = SHORT + (i_signal * D + i_d) * 3
    dx = d * tl.load(p_taps + 2).to(tl.float32)
    dx += d_next * tl.load(p_taps + 1).to(tl.float32)
    dx += d_second * tl.load(p_taps).to(tl.float32)
    store_row(DX, dx, o_row, T, FULL)
    add(SUMS, tl.sum(d_second * x), again)
    add(SUMS + 1, tl.sum(d_next * x), again)
    add(SUMS + 2, tl.sum(d * x), again)
    add(SUMS + 3, tl.sum(d), again)


@triton.jit
def add(P, x, again):
    """Add x to what is there or, first, put it there."""
    tl.store(P, tl.load(P, mask=again, other=0.0) + x)


@triton.jit(do_not_specialize=["T"])
def long_conv_backward_kernel(
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
    DY,
    OWN_SPECTRA,  # (programs, 6, N1, N2): the filter's gradient, the filter, the input
    OWN_SIGNALS,  # (programs, 3, N1, N2): POST, PRE and U after short convolutions; gradients
    DU,
    DPRE,
    DPOST,
    DTAPS,  # (splits, D, T), the skip's gradient in the first
    DSHORT,  # (splits, D, 3, 4): of three taps and the bias
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
    dy_batch,
    dy_channel,
    dx_batch,  # of DU, DPRE and DPOST
    dx_channel,
    N1: tl.constexpr,
    N2: tl.constexpr,
    PARTS: tl.constexpr,
    FULL: tl.constexpr,  # T = N1 N2
):
    """One channel of some rows of the batch."""
    program = tl.program_id(0).to(tl.int64)
    i_d = program % D
    first = tl.program_id(0) // D * rows
    o_tile = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    N: tl.constexpr = N1 * N2
    size: tl.constexpr = N**0.5
    f1, f2 = load_table(F1, N1, N1, PARTS), load_table(F2, N2, N2, PARTS)
    p_spectra = OWN_SPECTRA + program * (6 * N)
    taps, unit = scaled(load_taps(FILTER + i_d * filter_channel, SKIP, i_d, o_tile, T, FULL))
    unit *= size
    h_re, h_im = spectrum(taps, f1, f2, TWIDDLES, N1, N2, PARTS)
    tl.store(p_spectra + 2 * N + o_tile, h_re)
    tl.store(p_spectra + 3 * N + o_tile, h_im)
    tl.debug_barrier()

    for i in tl.range(first, min(first + rows, B), disable_licm=True):
        # The input of the convolution, and its transform.
        o_row, i_c = anew(o_tile, i), anew(i_d, i)
        p_signals = OWN_SIGNALS + anew(program, i) * (3 * N)
        p_twiddles = anew(TWIDDLES, i)
        p_u = row(U, i, i_c, u_batch, u_channel)
        z = load_signal(p_u, SHORT, BIAS, 2, i_c, o_row, T, D, FULL)
        keep(p_signals + 2 * N, z, o_row, SHORT)
        tl.debug_barrier()
        if PRE is not None:
            o_row, i_c = anew(o_tile, i + 1), anew(i_d, i + 1)
            p_signals = OWN_SIGNALS + anew(program, i + 1) * (3 * N)
            p_pre = row(PRE, i, i_c, pre_batch, pre_channel)
            pre = load_signal(p_pre, SHORT, BIAS, 1, i_c, o_row, T, D, FULL)
            keep(p_signals + N, pre, o_row, SHORT)
            z *= pre
        z, z_scale = scaled(z)
        z_re, z_im = spectrum(z, f1, f2, p_twiddles, N1, N2, PARTS)
        p_spectra = OWN_SPECTRA + anew(program, i + 1) * (6 * N)
        tl.store(p_spectra + 4 * N + o_row, z_re)
        tl.store(p_spectra + 5 * N + o_row, z_im)
        tl.debug_barrier()

        # The gradient of its output.
        o_row, i_c = anew(o_tile, i + 2), anew(i_d, i + 2)
        p_spectra = OWN_SPECTRA + anew(program, i + 2) * (6 * N)
        p_signals = OWN_SIGNALS + anew(program, i + 2) * (3 * N)
        p_twiddles = anew(TWIDDLES, i + 2)
        if POST is not None:
            h_re, h_im = tl.load(p_spectra + 2 * N + o_row), tl.load(p_spectra + 3 * N + o_row)
            v_re, v_im = z_re * h_re - z_im * h_im, z_re * h_im + z_im * h_re
            d_post = signal(v_re, v_im, f1, f2, p_twiddles, N1, N2, PARTS) * (unit * z_scale)
            o_row, i_c = anew(o_tile, i + 3), anew(i_d, i + 3)
            p_signals = OWN_SIGNALS + anew(program, i + 3) * (3 * N)
            p_dy = row(DY, i, i_c, dy_batch, dy_channel)
            d_post *= load_row(p_dy, o_row, T, FULL)
            p_dpost = row(DPOST, i, i_c, dx_batch, dx_channel)
            put(p_dpost, p_signals, d_post, o_row, T, SHORT, FULL)
            o_row, i_c = anew(o_tile, i + 4), anew(i_d, i + 4)
            p_post = row(POST, i, i_c, post_batch, post_channel)
            g = load_signal(p_post, SHORT, BIAS, 0, i_c, o_row, T, D, FULL)
            g *= load_row(row(DY, i, i_c, dy_batch, dy_channel), o_row, T, FULL)
        else:
            g = load_row(row(DY, i, i_c, dy_batch, dy_channel), o_row, T, FULL)
        g, g_scale = scaled(g)
        g_re, g_im = spectrum(g, f1, f2, anew(TWIDDLES, i + 5), N1, N2, PARTS)
        tl.debug_barrier()

        # Of the filter's transform, summed over rows.
        o_row = anew(o_tile, i + 6)
        p_spectra = OWN_SPECTRA + anew(program, i + 6) * (6 * N)
        z_re, z_im = tl.load(p_spectra + 4 * N + o_row), tl.load(p_spectra + 5 * N + o_row)
        scale = g_scale * z_scale
        dh_re, dh_im = (g_re * z_re + g_im * z_im) * scale, (g_im * z_re - g_re * z_im) * scale
        add(p_spectra + o_row, dh_re, i > first)
        tl.debug_barrier()
        add(p_spectra + N + anew(o_tile, i + 7), dh_im, i > first)

        # Of its input.
        o_row = anew(o_tile, i + 8)
        p_spectra = OWN_SPECTRA + anew(program, i + 8) * (6 * N)
        p_twiddles = anew(TWIDDLES, i + 8)
        h_re, h_im = tl.load(p_spectra + 2 * N + o_row), tl.load(p_spectra + 3 * N + o_row)
        v_re, v_im = g_re * h_re + g_im * h_im, g_im * h_re - g_re * h_im
        d_z = signal(v_re, v_im, f1, f2, p_twiddles, N1, N2, PARTS) * (unit * g_scale)
        o_row, i_c = anew(o_tile, i + 9), anew(i_d, i + 9)
        p_signals = OWN_SIGNALS + anew(program, i + 9) * (3 * N)
        if PRE is not None:
            p_u = row(U, i, i_c, u_batch, u_channel)
            u = load_kept(p_u, p_signals + 2 * N, o_row, T, SHORT, FULL)
            p_pre = row(PRE, i, i_c, pre_batch, pre_channel)
            pre = load_kept(p_pre, p_signals + N, o_row, T, SHORT, FULL)
            p_dpre = row(DPRE, i, i_c, dx_batch, dx_channel)
            put(p_dpre, p_signals + N, d_z * u, o_row, T, SHORT, FULL)
            d_z *= pre
        p_du = row(DU, i, i_c, dx_batch, dx_channel)
        put(p_du, p_signals + 2 * N, d_z, o_row, T, SHORT, FULL)
        tl.debug_barrier()

        if SHORT is not None:
            o_row, i_c = anew(o_tile, i + 10), anew(i_d, i + 10)
            p_signals = OWN_SIGNALS + anew(program, i + 10) * (3 * N)
            p_x, p_dx = (
                row(POST, i, i_c, post_batch, post_channel),
                row(DPOST, i, i_c, dx_batch, dx_channel),
            )
            p_sums = DSHORT + (anew(program, i + 10) * 3 + 0) * 4
            short_backward(
                p_x, p_signals, p_dx, SHORT, p_sums, 0, i > first, i_c, o_row, T, D, FULL
            )
            o_row, i_c = anew(o_tile, i + 11), anew(i_d, i + 11)
            p_signals = OWN_SIGNALS + anew(program, i + 11) * (3 * N)
            p_x, p_dx = (
                row(PRE, i, i_c, pre_batch, pre_channel),
                row(DPRE, i, i_c, dx_batch, dx_channel),
            )
            p_sums = DSHORT + (anew(program, i + 11) * 3 + 1) * 4
            short_backward(
                p_x, p_signals + N, p_dx, SHORT, p_sums, 1, i > first, i_c, o_row, T, D, FULL
            )
            o_row, i_c = anew(o_tile, i + 12), anew(i_d, i + 12)
            p_signals = OWN_SIGNALS + anew(program, i + 12) * (3 * N)
            p_x, p_dx = row(U, i, i_c, u_batch, u_channel), row(DU, i, i_c, dx_batch, dx_channel)
            p_sums = DSHORT + (anew(program, i + 12) * 3 + 2) * 4
            short_backward(
                p_x, p_signals + 2 * N, p_dx, SHORT, p_sums, 2, i > first, i_c, o_row, T, D, FULL
            )
            tl.debug_barrier()

    p_spectra = OWN_SPECTRA + program * (6 * N)
    dh_re, dh_im = tl.load(p_spectra + o_tile), tl.load(p_spectra + N + o_tile)
    dh_re, dh_im, scale = scaled_complex(dh_re, dh_im)
    d_taps = signal(dh_re, dh_im, f1, f2, TWIDDLES, N1, N2, PARTS) * (size * scale)
    store_row(DTAPS + program * T, d_taps, o_tile, T, FULL)
