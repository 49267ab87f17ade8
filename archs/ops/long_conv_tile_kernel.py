"""The long convolution of as many tokens as a tile has, by one Triton kernel forward, one backward.

See `archs.ops.long_conv_kernel`.
"""

import torch
import triton
from torch import Tensor

from archs.ops.long_conv_backward_kernel import long_conv_backward_kernel
from archs.ops.long_conv_forward_kernel import long_conv_forward_kernel
from archs.ops.long_conv_tables import SIZES, inner_tables

SHIFT = 0.25  # of the frequencies


def tile_forward(
    u: Tensor,
    filter: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    skip: Tensor | None,
    short_filters: Tensor | None,
    short_bias: Tensor | None,
    y: Tensor,
    splits: int,
    accurate: bool,
) -> None:
    """Writes y. Tokens of all signals lie side by side."""
    B, D, T = u.shape
    splits, rows = _splits(B, splits)
    N1, N2, warps = _size(T)
    long_conv_forward_kernel[(splits * D,)](
        u,
        pre,
        post,
        filter,
        skip,
        short_filters,
        short_bias,
        *inner_tables(N1, N2, SHIFT, accurate, u.device),
        y,
        T,
        B,
        D,
        rows,
        *_strides(u),
        *_strides(pre),
        *_strides(post),
        filter.stride(0),
        *_strides(y),
        N1=N1,
        N2=N2,
        PARTS=2 if accurate else 1,
        num_warps=warps,
        num_stages=1,
    )


def tile_backward(
    dy: Tensor,
    u: Tensor,
    filter: Tensor,
    pre: Tensor | None,
    post: Tensor | None,
    skip: Tensor | None,
    short_filters: Tensor | None,
    short_bias: Tensor | None,
    d_u: Tensor,
    d_pre: Tensor | None,
    d_post: Tensor | None,
    splits: int,
    accurate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Writes d_u, d_pre and d_post, of the same strides.

    Returns:
        The gradients of the taps (D, T), and of short filters and bias (3, D, 4).
    """
    B, D, T = u.shape
    splits, rows = _splits(B, splits)
    N1, N2, warps = _size(T)

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=u.device)

    d_taps = empty(splits, D, T)
    d_short = None if short_filters is None else empty(splits, D, 3, 4)
    long_conv_backward_kernel[(splits * D,)](
        u,
        pre,
        post,
        filter,
        skip,
        short_filters,
        short_bias,
        *inner_tables(N1, N2, SHIFT, accurate, u.device),
        dy,
        empty(splits * D, 6, N1, N2),
        empty(0 if short_filters is None else splits * D, 3, N1, N2),
        d_u,
        d_pre,
        d_post,
        d_taps,
        d_short,
        T,
        B,
        D,
        rows,
        *_strides(u),
        *_strides(pre),
        *_strides(post),
        filter.stride(0),
        *_strides(dy),
        *_strides(d_u),
        N1=N1,
        N2=N2,
        PARTS=2 if accurate else 1,
        FULL=N1 * N2 == T,
        num_warps=warps,
        num_stages=1,
    )
    sums = None if d_short is None else d_short.sum(0).transpose(0, 1)  # (3, D, 4)
    return d_taps[0] if splits == 1 else d_taps.sum(0), sums


def _strides(signal: Tensor | None) -> tuple[int, int]:
    return (0, 0) if signal is None else (signal.stride(0), signal.stride(1))


def _splits(B: int, splits: int) -> tuple[int, int]:
    """How many splits of a batch there are, none empty, and the rows of each but the last."""
    rows = triton.cdiv(B, splits)
    return triton.cdiv(B, rows), rows


def _size(T: int) -> tuple[int, int, int]:
    """N1, N2 and warps for T tokens."""
    return next(sizes[1:] for sizes in SIZES if sizes[0] >= T)
