"""The outer transforms of the long convolution, along columns, in Triton.

See `archs.ops.long_conv_split_kernel`. One program a block of columns of one slot.
"""

import triton
import triton.language as tl

from archs.ops.long_conv_fft_kernel import (
    load_signal,
    parts,
    product,
    row,
    scaled,
    scaled_complex,
    store_row,
)


@triton.jit
def place(M: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr):
    """Slot and block of columns of this program."""
    blocks: tl.constexpr = P // COLUMNS
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def tile(o_row, block, P: tl.constexpr, COLUMNS: tl.constexpr):
    """Where rows o_row of a block of columns lie in a signal."""
    return o_row[:, None] * P + (block * COLUMNS + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def rotation(
    TURNS, BLOCK_TURNS, o_row, block, M: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr
):
    """The twiddles of rows o_row in a block of columns: the block's times the column's in it."""
    o_turn = o_row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    t_re, t_im = tl.load(TURNS + o_turn), tl.load(TURNS + M * COLUMNS + o_turn)
    blocks: tl.constexpr = P // COLUMNS
    p_block = BLOCK_TURNS + o_row * blocks + block
    b_re, b_im = tl.load(p_block)[:, None], tl.load(p_block + M * blocks)[:, None]
    return t_re * b_re - t_im * b_im, t_re * b_im + t_im * b_re


@triton.jit(do_not_specialize=["T", "first_row", "first_channel", "rows"])
def long_conv_to_columns_kernel(
    X,  # (B, D, T), and GATE
    GATE,
    SKIP,  # (D,), added to X's first token
    SHORT,  # (3, D, 3), for POST, PRE and U
    BIAS,  # (3, D)
    F,  # (PARTS, 2, M, M)
    TURNS,  # (2, M, COLUMNS)
    BLOCK_TURNS,  # (2, M, P / COLUMNS)
    OWN,  # (slots, 2, M, P)
    SCALES,  # (slots, P / COLUMNS)
    T,
    D,
    first_row,  # of the batch, of slot 0
    first_channel,
    rows,  # of the batch that lie side by side
    x_batch,
    x_channel,
    gate_batch,
    gate_channel,
    X_SHORT: tl.constexpr,  # which short convolution X goes through
    GATE_SHORT: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,  # of F, in a product
    PARTS: tl.constexpr,
):
    """The transforms of the columns of X times GATE, twiddles applied."""
    slot, block = place(M, P, COLUMNS)
    i_b, i_d = first_row + slot % rows, (first_channel + slot // rows).to(tl.int64)
    o_tile = tile(tl.arange(0, M), block, P, COLUMNS)
    p_x = row(X, i_b, i_d, x_batch, x_channel)
    if X_SHORT is None:
        x = load_signal(p_x, None, None, 0, i_d, o_tile, T, D, False)
    else:
        x = load_signal(p_x, SHORT, BIAS, X_SHORT, i_d, o_tile, T, D, False)
    if GATE is not None:
        p_gate = row(GATE, i_b, i_d, gate_batch, gate_channel)
        x *= load_signal(p_gate, SHORT, BIAS, GATE_SHORT, i_d, o_tile, T, D, False)
    if SKIP is not None:
        x += tl.where(o_tile == 0, tl.load(SKIP + i_d).to(tl.float32), 0.0)
    x, scale = scaled(x)
    tl.store(SCALES + tl.program_id(0), scale)
    x, x_rest = parts(x, PARTS)
    p_own = OWN + slot.to(tl.int64) * (2 * M * P)
    zero = tl.zeros((ROWS, COLUMNS), tl.float32)
    rest: tl.constexpr = (PARTS - 1) * 2 * M * M
    for start in range(0, M, ROWS):
        o_row = start + tl.arange(0, ROWS)
        p_f = F + o_row[:, None] * M + tl.arange(0, M)[None, :]
        a_re = product(tl.load(p_f), tl.load(p_f + rest), x, x_rest, zero, PARTS)
        p_f += M * M
        a_im = product(tl.load(p_f), tl.load(p_f + rest), x, x_rest, zero, PARTS)
        t_re, t_im = rotation(TURNS, BLOCK_TURNS, o_row, block, M, P, COLUMNS)
        p_to = p_own + tile(o_row, block, P, COLUMNS)
        tl.store(p_to, (a_re * t_re - a_im * t_im).to(OWN.dtype.element_ty))
        tl.store(p_to + M * P, (a_re * t_im + a_im * t_re).to(OWN.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "first_row", "first_channel", "rows"])
def long_conv_from_columns_kernel(
    OWN,  # (slots, 2, M, P)
    SCALES,  # (slots, M)
    GATE,  # (B, D, T)
    SECOND_GATE,
    SHORT,  # (3, D, 3), for POST, PRE and U
    BIAS,  # (3, D)
    F,  # (PARTS, 2, M, M)
    TURNS,  # (2, M, COLUMNS)
    BLOCK_TURNS,  # (2, M, P / COLUMNS)
    Y,  # (B, D, T): the signal times GATE
    SECOND_Y,  # times SECOND_GATE
    T,
    D,
    first_row,  # of the batch, of slot 0
    first_channel,
    first_y_row,
    first_y_channel,
    rows,  # of the batch that lie side by side
    gate_batch,
    gate_channel,
    second_batch,
    second_channel,
    y_batch,
    y_channel,
    GATE_SHORT: tl.constexpr,  # which short convolution GATE goes through
    SECOND_SHORT: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,  # of F, in a product
    PARTS: tl.constexpr,
):
    """The signals whose columns have the transforms given, twiddles undone, times gates."""
    slot, block = place(M, P, COLUMNS)
    i_row, i_channel = slot % rows, (slot // rows).to(tl.int64)
    i_b, i_d = first_row + i_row, first_channel + i_channel
    o_m = tl.arange(0, M)
    p_own = OWN + slot.to(tl.int64) * (2 * M * P) + tile(o_m, block, P, COLUMNS)
    scales = tl.load(SCALES + slot * M + o_m)[:, None]
    c_re = tl.load(p_own).to(tl.float32) * scales
    c_im = tl.load(p_own + M * P).to(tl.float32) * scales
    t_re, t_im = rotation(TURNS, BLOCK_TURNS, o_m, block, M, P, COLUMNS)
    a_re, a_im, scale = scaled_complex(c_re * t_re + c_im * t_im, c_im * t_re - c_re * t_im)
    a_re, a_re_rest = parts(a_re, PARTS)
    a_im, a_im_rest = parts(a_im, PARTS)
    zero = tl.zeros((ROWS, COLUMNS), tl.float32)
    rest: tl.constexpr = (PARTS - 1) * 2 * M * M
    o_y = (first_y_row + i_row, first_y_channel + i_channel)
    for start in range(0, M, ROWS):
        o_row = start + tl.arange(0, ROWS)
        p_f = F + o_m[:, None] * M + o_row[None, :]
        f, f_rest = tl.trans(tl.load(p_f)), tl.trans(tl.load(p_f + rest))
        x = product(f, f_rest, a_re, a_re_rest, zero, PARTS)
        p_f += M * M
        f, f_rest = tl.trans(tl.load(p_f)), tl.trans(tl.load(p_f + rest))
        x = product(f, f_rest, a_im, a_im_rest, x, PARTS) * scale
        o_tile = tile(o_row, block, P, COLUMNS)
        y = x
        if GATE is not None:
            p_gate = row(GATE, i_b, i_d, gate_batch, gate_channel)
            if GATE_SHORT is None:
                y = x * load_signal(p_gate, None, None, 0, i_d, o_tile, T, D, False)
            else:
                y = x * load_signal(p_gate, SHORT, BIAS, GATE_SHORT, i_d, o_tile, T, D, False)
        store_row(row(Y, o_y[0], o_y[1], y_batch, y_channel), y, o_tile, T, False)
        if SECOND_GATE is not None:
            p_gate = row(SECOND_GATE, i_b, i_d, second_batch, second_channel)
            y = x * load_signal(p_gate, SHORT, BIAS, SECOND_SHORT, i_d, o_tile, T, D, False)
            store_row(row(SECOND_Y, o_y[0], o_y[1], y_batch, y_channel), y, o_tile, T, False)
