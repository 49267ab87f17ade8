"""Transforms and signals of the long convolution, in Triton (see `long_conv_kernel`)."""

import triton
import triton.language as tl


@triton.jit
def load_table(TABLE, rows: tl.constexpr, columns: tl.constexpr, PARTS: tl.constexpr):
    """A complex table (PARTS, 2, rows, columns): real and imaginary part, each in both parts."""
    o_table = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    rest: tl.constexpr = (PARTS - 1) * 2 * rows * columns
    re, im = tl.load(TABLE + o_table), tl.load(TABLE + rows * columns + o_table)
    re_rest, im_rest = re, im
    if PARTS == 2:
        re_rest = tl.load(TABLE + rest + o_table)
        im_rest = tl.load(TABLE + rest + rows * columns + o_table)
    return re, re_rest, im, im_rest


@triton.jit
def load_twiddles(TWIDDLES, N1: tl.constexpr, N2: tl.constexpr):
    """The twiddles (2, N1, N2): real and imaginary part."""
    o_table = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    return tl.load(TWIDDLES + o_table), tl.load(TWIDDLES + N1 * N2 + o_table)


@triton.jit
def parts(x, PARTS: tl.constexpr):
    """float32 as float16, and 2^11 times what is then missing."""
    main = x.to(tl.float16)
    rest = main
    if PARTS == 2:
        rest = ((x - main.to(tl.float32)) * 2048.0).to(tl.float16)
    return main, rest


@triton.jit
def product(a, a_rest, b, b_rest, added, PARTS: tl.constexpr):
    """The matrix product of a and b, each in parts, added to `added`."""
    found = tl.dot(a, b, added)
    if PARTS == 2:
        crossed = tl.dot(a, b_rest)
        crossed = tl.dot(a_rest, b, crossed)
        found += crossed * 0.00048828125
    return found


@triton.jit
def spectrum(x, f1, f2, TWIDDLES, N1: tl.constexpr, N2: tl.constexpr, PARTS: tl.constexpr):
    """The transform (N1, N2) of a real signal (N1, N2), its real and imaginary part."""
    f1_re, f1_re_rest, f1_im, f1_im_rest = f1
    zero = tl.zeros((N1, N2), tl.float32)
    x, x_rest = parts(x, PARTS)
    a_re = product(f1_re, f1_re_rest, x, x_rest, zero, PARTS)
    a_im = product(f1_im, f1_im_rest, x, x_rest, zero, PARTS)
    return second_half(a_re, a_im, f2, TWIDDLES, N1, N2, PARTS)


@triton.jit
def complex_spectrum(
    re, im, f1, f2, TWIDDLES, N1: tl.constexpr, N2: tl.constexpr, PARTS: tl.constexpr
):
    """As `spectrum`, of a complex signal."""
    f1_re, f1_re_rest, f1_im, f1_im_rest = f1
    zero = tl.zeros((N1, N2), tl.float32)
    re, re_rest = parts(re, PARTS)
    im, im_rest = parts(im, PARTS)
    a_re = product(f1_re, f1_re_rest, re, re_rest, zero, PARTS)
    a_re -= product(f1_im, f1_im_rest, im, im_rest, zero, PARTS)
    a_im = product(f1_re, f1_re_rest, im, im_rest, zero, PARTS)
    a_im = product(f1_im, f1_im_rest, re, re_rest, a_im, PARTS)
    return second_half(a_re, a_im, f2, TWIDDLES, N1, N2, PARTS)


@triton.jit
def second_half(a_re, a_im, f2, TWIDDLES, N1: tl.constexpr, N2: tl.constexpr, PARTS: tl.constexpr):
    """Of a transform: twiddles and the product with f2."""
    f2_re, f2_re_rest, f2_im, f2_im_rest = f2
    zero = tl.zeros((N1, N2), tl.float32)
    t_re, t_im = load_twiddles(TWIDDLES, N1, N2)
    b_re, b_re_rest = parts(a_re * t_re - a_im * t_im, PARTS)
    b_im, b_im_rest = parts(a_re * t_im + a_im * t_re, PARTS)
    z_re = product(b_re, b_re_rest, f2_re, f2_re_rest, zero, PARTS)
    z_re = product(-b_im, -b_im_rest, f2_im, f2_im_rest, z_re, PARTS)
    z_im = product(b_re, b_re_rest, f2_im, f2_im_rest, zero, PARTS)
    z_im = product(b_im, b_im_rest, f2_re, f2_re_rest, z_im, PARTS)
    return z_re, z_im


@triton.jit
def signal(z_re, z_im, f1, f2, TWIDDLES, N1: tl.constexpr, N2: tl.constexpr, PARTS: tl.constexpr):
    """The real part of the signal (N1, N2) that has the transform (N1, N2) given."""
    f1_re, f1_re_rest, f1_im, f1_im_rest = f1
    zero = tl.zeros((N1, N2), tl.float32)
    a_re, a_im = second_half_undone(z_re, z_im, f2, TWIDDLES, N1, N2, PARTS)
    a_re, a_re_rest = parts(a_re, PARTS)
    a_im, a_im_rest = parts(a_im, PARTS)
    x = product(tl.trans(f1_re), tl.trans(f1_re_rest), a_re, a_re_rest, zero, PARTS)
    return product(tl.trans(f1_im), tl.trans(f1_im_rest), a_im, a_im_rest, x, PARTS)


@triton.jit
def complex_signal(
    z_re, z_im, f1, f2, TWIDDLES, N1: tl.constexpr, N2: tl.constexpr, PARTS: tl.constexpr
):
    """As `signal`, the real and the imaginary part."""
    f1_re, f1_re_rest, f1_im, f1_im_rest = f1
    zero = tl.zeros((N1, N2), tl.float32)
    a_re, a_im = second_half_undone(z_re, z_im, f2, TWIDDLES, N1, N2, PARTS)
    a_re, a_re_rest = parts(a_re, PARTS)
    a_im, a_im_rest = parts(a_im, PARTS)
    re = product(tl.trans(f1_re), tl.trans(f1_re_rest), a_re, a_re_rest, zero, PARTS)
    re = product(tl.trans(f1_im), tl.trans(f1_im_rest), a_im, a_im_rest, re, PARTS)
    im = product(tl.trans(f1_re), tl.trans(f1_re_rest), a_im, a_im_rest, zero, PARTS)
    im -= product(tl.trans(f1_im), tl.trans(f1_im_rest), a_re, a_re_rest, zero, PARTS)
    return re, im


@triton.jit
def second_half_undone(
    z_re, z_im, f2, TWIDDLES, N1: tl.constexpr, N2: tl.constexpr, PARTS: tl.constexpr
):
    """The inverse of `second_half`."""
    f2_re, f2_re_rest, f2_im, f2_im_rest = f2
    zero = tl.zeros((N1, N2), tl.float32)
    z_re, z_re_rest = parts(z_re, PARTS)
    z_im, z_im_rest = parts(z_im, PARTS)
    b_re = product(z_re, z_re_rest, f2_re, f2_re_rest, zero, PARTS)
    b_re = product(z_im, z_im_rest, f2_im, f2_im_rest, b_re, PARTS)
    b_im = product(z_im, z_im_rest, f2_re, f2_re_rest, zero, PARTS)
    b_im = product(-z_re, -z_re_rest, f2_im, f2_im_rest, b_im, PARTS)
    t_re, t_im = load_twiddles(TWIDDLES, N1, N2)
    return b_re * t_re + b_im * t_im, b_im * t_re - b_re * t_im


@triton.jit
def scaled(x):
    """The values by a power of two, at most 1, for which float16 has room; and what undoes it."""
    down, up = room(tl.max(tl.abs(x)))
    return x * down, up


@triton.jit
def scaled_complex(re, im):
    """As `scaled`, of complex numbers."""
    largest = tl.maximum(tl.max(tl.max(tl.abs(re), 1), 0), tl.max(tl.max(tl.abs(im), 1), 0))
    down, up = room(largest)
    return re * down, im * down, up


@triton.jit
def room(largest):
    """The power of two that brings `largest` to 1 or less, and its inverse; both are normal."""
    exponent = tl.minimum(tl.ceil(tl.log2(tl.maximum(largest, 1.2e-38))), 126.0)
    return tl.exp2(-exponent), tl.exp2(exponent)


@triton.jit
def anew(x, i):
    """x, for an i >= 0.

    A compiler cannot know, so it forms again what depends on it: addresses, which are cheap to
    form, do not stay in registers, which are scarce.
    """
    return x + tl.minimum(i, 0)


@triton.jit
def row(X, i_b, i_d, batch, channel):
    """Where channel i_d of row i_b of the batch starts."""
    return X + tl.cast(i_b, tl.int64) * batch + i_d * channel


@triton.jit
def load_row(X, o_tile, T, FULL: tl.constexpr):
    """A row of X in float32, 0 after its T tokens; FULL: there is nothing after them."""
    x = tl.load(X + o_tile) if FULL else tl.load(X + o_tile, o_tile < T, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_row(X, x, o_tile, T, FULL: tl.constexpr):
    """The T tokens of a row of X."""
    if FULL:
        tl.store(X + o_tile, x)
    else:
        tl.store(X + o_tile, x, o_tile < T)


@triton.jit
def load_earlier(X, age: tl.constexpr, o_tile, T, FULL: tl.constexpr):
    """As `load_row`, `age` tokens late."""
    m_tile = o_tile >= age
    if not FULL:
        m_tile &= o_tile < T
    return tl.load(X + o_tile - age, m_tile, other=0.0).to(tl.float32)


@triton.jit
def load_signal(X, SHORT, BIAS, i_signal: tl.constexpr, i_d, o_tile, T, D, FULL: tl.constexpr):
    """A row of X, in float32, 0 after its T tokens; its short convolution where there is one."""
    x = load_row(X, o_tile, T, FULL)
    if SHORT is not None:
        p_taps = SHORT + (i_signal * D + i_d) * 3
        x *= tl.load(p_taps + 2).to(tl.float32)
        x += load_earlier(X, 1, o_tile, T, FULL) * tl.load(p_taps + 1).to(tl.float32)
        x += load_earlier(X, 2, o_tile, T, FULL) * tl.load(p_taps).to(tl.float32)
        if BIAS is not None:
            x += tl.load(BIAS + i_signal * D + i_d).to(tl.float32)
            if not FULL:
                x = tl.where(o_tile < T, x, 0.0)
    return x


@triton.jit
def load_taps(FILTER, SKIP, i_d, o_tile, T, FULL: tl.constexpr):
    """A filter of T taps in float32, 0 after them, with the skip in its first."""
    taps = load_row(FILTER, o_tile, T, FULL)
    if SKIP is not None:
        taps += tl.where(o_tile == 0, tl.load(SKIP + i_d).to(tl.float32), 0.0)
    return taps
