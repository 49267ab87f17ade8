"""A short convolution backward, beside a convolution of many tokens, in Triton."""

import triton
import triton.language as tl

from archs.ops.long_conv_backward_kernel import short_backward
from archs.ops.long_conv_fft_kernel import row

SHORT_TOKENS = 2048  # of a program


@triton.jit(do_not_specialize=["T", "first_row", "first_channel", "rows"])
def long_conv_short_backward_kernel(
    X,  # (B, D, T)
    DOUT,  # (slots, T): of its output
    DX,  # (B, D, T)
    TAPS,  # (3, D, 3)
    SUMS,  # (D, B, chunks, 4): of three taps and the bias
    T,
    D,
    B,
    first_row,  # of the batch, of slot 0
    first_channel,
    rows,  # of the batch that lie side by side
    x_batch,
    x_channel,
    dx_batch,
    dx_channel,
    SHORT: tl.constexpr,  # which short convolution
    BLOCK: tl.constexpr,
):
    """One chunk of one slot."""
    chunks = tl.cdiv(T, BLOCK)
    slot, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    i_b, i_d = first_row + slot % rows, (first_channel + slot // rows).to(tl.int64)
    o_t = chunk * BLOCK + tl.arange(0, BLOCK)
    short_backward(
        row(X, i_b, i_d, x_batch, x_channel),
        DOUT + slot.to(tl.int64) * T,
        row(DX, i_b, i_d, dx_batch, dx_channel),
        TAPS,
        SUMS + ((i_d * B + i_b) * chunks + chunk) * 4,
        SHORT,
        False,
        i_d,
        o_t,
        T,
        D,
        False,
    )
