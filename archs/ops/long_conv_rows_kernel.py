"""The inner transforms of the long convolution, along rows, in Triton.

See `archs.ops.long_conv_split_kernel`. One program some rows k of one slot, or of one channel.
"""

import triton
import triton.language as tl

from archs.ops.long_conv_fft_kernel import (
    anew,
    complex_signal,
    complex_spectrum,
    load_table,
    scaled_complex,
)


@triton.jit
def load_own(OWN, slot, k, scales, M: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Row k of a slot, (P1, P2), by its scales."""
    P: tl.constexpr = P1 * P2
    p_own = OWN + tl.cast(slot, tl.int64) * (2 * M * P) + k * P
    p_own += tl.arange(0, P1)[:, None] * P2 + tl.arange(0, P2)[None, :]
    re, im = tl.load(p_own), tl.load(p_own + M * P)
    return re.to(tl.float32) * scales, im.to(tl.float32) * scales


@triton.jit
def put_own(
    OWN, SCALES, slot, k, re, im, scale, M: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr
):
    """Row k of a slot, and its scale."""
    P: tl.constexpr = P1 * P2
    p_own = OWN + tl.cast(slot, tl.int64) * (2 * M * P) + k * P
    p_own += tl.arange(0, P1)[:, None] * P2 + tl.arange(0, P2)[None, :]
    tl.store(p_own, re.to(OWN.dtype.element_ty))
    tl.store(p_own + M * P, im.to(OWN.dtype.element_ty))
    tl.store(SCALES + slot * M + k, scale)


@triton.jit
def row_spectrum(
    OWN,
    BLOCK_SCALES,
    slot,
    k,
    f1,
    f2,
    TWIDDLES,
    M: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The transform of row k as `long_conv_to_columns_kernel` left it, and its scale."""
    blocks: tl.constexpr = P1 * P2 // COLUMNS
    o_row = tl.arange(0, P1)[:, None] * P2 + tl.arange(0, P2)[None, :]
    scales = tl.load(BLOCK_SCALES + slot * blocks + o_row // COLUMNS)
    re, im = load_own(OWN, slot, k, scales, M, P1, P2)
    re, im, scale = scaled_complex(re, im)
    re, im = complex_spectrum(re, im, f1, f2, TWIDDLES, P1, P2, PARTS)
    return re, im, scale


@triton.jit
def long_conv_filter_rows_kernel(
    OWN,  # (slots, 2, M, P), of filters
    BLOCK_SCALES,  # (slots, P / COLUMNS)
    SCALES,  # (slots, M)
    F1,  # (PARTS, 2, P1, P1)
    TWIDDLES,  # (2, P1, P2)
    F2,  # (PARTS, 2, P2, P2)
    M: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,  # rows of a program
    PARTS: tl.constexpr,
):
    """The transforms of rows."""
    slot, first = tl.program_id(0) // (M // EACH), tl.program_id(0) % (M // EACH) * EACH
    f1, f2 = load_table(F1, P1, P1, PARTS), load_table(F2, P2, P2, PARTS)
    for k in tl.range(first, first + EACH, disable_licm=True):
        re, im, scale = row_spectrum(
            OWN, BLOCK_SCALES, slot, k, f1, f2, anew(TWIDDLES, k), M, P1, P2, COLUMNS, PARTS
        )
        put_own(OWN, SCALES, slot, k, re, im, scale, M, P1, P2)


@triton.jit(do_not_specialize=["rows"])
def long_conv_rows_kernel(
    OWN,  # (slots, 2, M, P)
    BLOCK_SCALES,  # (slots, P / COLUMNS)
    SCALES,  # (slots, M)
    FILTER,  # (channels, 2, M, P), its transform
    FILTER_SCALES,  # (channels, M)
    F1,  # (PARTS, 2, P1, P1)
    TWIDDLES,  # (2, P1, P2)
    F2,  # (PARTS, 2, P2, P2)
    rows,  # of the batch that lie side by side
    M: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,  # rows k of a program
    PARTS: tl.constexpr,
):
    """The transforms of rows, times the filter's, and back."""
    slot, first = tl.program_id(0) // (M // EACH), tl.program_id(0) % (M // EACH) * EACH
    channel = slot // rows
    size: tl.constexpr = (M * P1 * P2) ** 0.5
    f1, f2 = load_table(F1, P1, P1, PARTS), load_table(F2, P2, P2, PARTS)
    for k in tl.range(first, first + EACH, disable_licm=True):
        z_re, z_im, scale = row_spectrum(
            OWN, BLOCK_SCALES, slot, k, f1, f2, anew(TWIDDLES, k), M, P1, P2, COLUMNS, PARTS
        )
        unit = tl.load(FILTER_SCALES + channel * M + k) * size * scale
        h_re, h_im = load_own(FILTER, channel, k, unit, M, P1, P2)
        re, im = z_re * h_re - z_im * h_im, z_re * h_im + z_im * h_re
        re, im, scale = scaled_complex(re, im)
        re, im = complex_signal(re, im, f1, f2, anew(TWIDDLES, k), P1, P2, PARTS)
        put_own(OWN, SCALES, slot, k, re, im, scale, M, P1, P2)


@triton.jit(do_not_specialize=["rows"])
def long_conv_backward_rows_kernel(
    INPUT,  # (slots, 2, M, P): the convolution's input, then its output
    GRADIENT,  # (slots, 2, M, P): of the output, then of the input
    INPUT_BLOCK_SCALES,  # (slots, P / COLUMNS)
    GRADIENT_BLOCK_SCALES,
    INPUT_SCALES,  # (slots, M)
    GRADIENT_SCALES,
    FILTER,  # (channels, 2, M, P), its transform
    FILTER_SCALES,  # (channels, M)
    DFILTER,  # (channels, 2, M, P), float32
    F1,  # (PARTS, 2, P1, P1)
    TWIDDLES,  # (2, P1, P2)
    F2,  # (PARTS, 2, P2, P2)
    rows,  # of the batch that lie side by side
    again,  # whether DFILTER has something in it
    OUTPUT: tl.constexpr,  # whether the output is asked for
    M: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Of row k of one channel, for some rows of the batch."""
    channel, k = tl.program_id(0) // M, tl.program_id(0) % M
    size: tl.constexpr = (M * P1 * P2) ** 0.5
    f1, f2 = load_table(F1, P1, P1, PARTS), load_table(F2, P2, P2, PARTS)
    for i in tl.range(0, rows, disable_licm=True):
        slot = channel * rows + i
        z_re, z_im, z_scale = row_spectrum(
            INPUT, INPUT_BLOCK_SCALES, slot, k, f1, f2, anew(TWIDDLES, i),
            M, P1, P2, COLUMNS, PARTS,
        )  # fmt: skip
        g_re, g_im, g_scale = row_spectrum(
            GRADIENT, GRADIENT_BLOCK_SCALES, slot, k, f1, f2, anew(TWIDDLES, i + 1),
            M, P1, P2, COLUMNS, PARTS,
        )  # fmt: skip
        d_scale = z_scale * g_scale
        d_re, d_im = (g_re * z_re + g_im * z_im) * d_scale, (g_im * z_re - g_re * z_im) * d_scale
        p_d = DFILTER + tl.cast(channel, tl.int64) * (2 * M * P1 * P2) + anew(k, i + 1) * (P1 * P2)
        p_d += tl.arange(0, P1)[:, None] * P2 + tl.arange(0, P2)[None, :]
        present = (again + i) > 0
        tl.store(p_d, tl.load(p_d, mask=present, other=0.0) + d_re)
        p_d += M * P1 * P2
        tl.store(p_d, tl.load(p_d, mask=present, other=0.0) + d_im)
        unit = tl.load(FILTER_SCALES + channel * M + k) * size
        if OUTPUT:
            h_re, h_im = load_own(FILTER, channel, anew(k, i), unit * z_scale, M, P1, P2)
            re, im = z_re * h_re - z_im * h_im, z_re * h_im + z_im * h_re
            re, im, scale = scaled_complex(re, im)
            re, im = complex_signal(re, im, f1, f2, anew(TWIDDLES, i + 2), P1, P2, PARTS)
            put_own(INPUT, INPUT_SCALES, slot, k, re, im, scale, M, P1, P2)
        h_re, h_im = load_own(FILTER, channel, anew(k, i + 1), unit * g_scale, M, P1, P2)
        re, im = g_re * h_re + g_im * h_im, g_im * h_re - g_re * h_im
        re, im, scale = scaled_complex(re, im)
        re, im = complex_signal(re, im, f1, f2, anew(TWIDDLES, i + 3), P1, P2, PARTS)
        put_own(GRADIENT, GRADIENT_SCALES, slot, k, re, im, scale, M, P1, P2)


@triton.jit
def long_conv_signal_rows_kernel(
    SPECTRA,  # (slots, 2, M, P), float32
    OWN,  # (slots, 2, M, P)
    SCALES,  # (slots, M)
    F1,  # (PARTS, 2, P1, P1)
    TWIDDLES,  # (2, P1, P2)
    F2,  # (PARTS, 2, P2, P2)
    M: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    EACH: tl.constexpr,  # rows of a program
    PARTS: tl.constexpr,
):
    """The rows that have the transforms given."""
    slot, first = tl.program_id(0) // (M // EACH), tl.program_id(0) % (M // EACH) * EACH
    size: tl.constexpr = (M * P1 * P2) ** 0.5
    f1, f2 = load_table(F1, P1, P1, PARTS), load_table(F2, P2, P2, PARTS)
    for k in tl.range(first, first + EACH, disable_licm=True):
        re, im = load_own(SPECTRA, slot, k, size, M, P1, P2)
        re, im, scale = scaled_complex(re, im)
        re, im = complex_signal(re, im, f1, f2, anew(TWIDDLES, k), P1, P2, PARTS)
        put_own(OWN, SCALES, slot, k, re, im, scale, M, P1, P2)
