"""Triton kernels of the gated long convolution as operations of PyTorch.

See `archs.ops.long_conv` for the definition.

Transform. A causal convolution of T tokens needs a cyclic one of 2 T. For real signals half of that
does: with N >= T, transforms at the frequencies (k - 1/4) / N, as if each signal were multiplied
by exp(i pi n / 2 N) before a transform of length N. What wraps around then comes back with a
factor i, and the real part is the causal convolution ("right-angle convolution": Crandall and
Fagin 1994, "Discrete weighted transforms and large-integer arithmetic"). Rows of the batch stay
apart, none is packed into another's imaginary part. A transform of N = N1 N2 is two matrix
products on the tensor cores with twiddles between (Bailey's four steps; as in FlashFFTConv, Fu et
al. 2023, arXiv 2311.05908); of the first product the input, of the last the output is real.

Forward. One program a channel forms the transform of its filter, the skip in the first tap, and
keeps it in registers while it goes over the rows of the batch: short convolutions, gates, both
transforms, gate. Nothing but y is written.

Backward. One program a channel again. For each row it forms the transforms of the convolution's
input and of its output's gradient; from these the post_gate's gradient, the filter's, summed over
rows, and the input's. Short convolutions are then undone in the same program. What it keeps
between these parts is small, and its own.

More tokens than a tile has (4,096). The same convolution, the transform split once more: see
`archs.ops.long_conv_split_kernel`.

Numerics. The products take float16 operands, sum in float32 and are exact to float32 elsewhere.
Every signal is first brought to at most 1 by a power of two, and the tables have orthonormal rows,
so that nothing overflows. "fast" rounds each operand to float16: outputs err by 7e-4, from
8,192 tokens on by 1e-3 (bfloat16, which has no such room to spare, would err by 4e-3, and tf32, as
tensor cores truncate it, by 3e-3).
"accurate" takes each operand as a sum of two float16 numbers and forms three products for one:
outputs err by 4e-7, as in float32. An error is relative to the largest value of a row: an outlier
costs the others of its row precision, and later tokens reach earlier ones by rounding, as in every
transform; other rows and channels are not touched.

Letters: B batch, D channels, T tokens, N1 and N2 the factors of a transform's length.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archs.ops.launch_kernel import on_its_device
from archs.ops.long_conv_forward_kernel import long_conv_step_kernel
from archs.ops.long_conv_split_kernel import split_backward, split_forward
from archs.ops.long_conv_tables import TILE_TOKENS
from archs.ops.long_conv_tile_kernel import tile_backward, tile_forward

STEP_ROWS, STEP_NUMBERS = 16, 4096  # of the batch and in all, that a program of the step sums


@torch.library.custom_op("seqscale::long_conv", mutates_args=())
@on_its_device
def long_conv_op(
    u: Tensor,
    filter: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    skip: Tensor | None,
    short_filters: Tensor | None,
    short_bias: Tensor | None,
    splits: int,
    accurate: bool,
) -> Tensor:
    """The forward pass; arguments as in `archs.ops.long_conv`, a filter of T taps.

    `splits` is how many programs share the rows of a channel.
    """
    u, filter, pre, post = _in_rows(u, filter, pre_gate, post_gate)
    parameters = _contiguous(skip, short_filters, short_bias)
    y = _empty_like(u)
    if u.shape[2] > TILE_TOKENS:
        split_forward(u, filter, pre, post, *parameters, y, accurate)
    else:
        tile_forward(u, filter, pre, post, *parameters, y, splits, accurate)
    return y


@torch.library.custom_op("seqscale::long_conv_backward", mutates_args=())
@on_its_device
def long_conv_backward_op(
    dy: Tensor,
    u: Tensor,
    filter: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    skip: Tensor | None,
    short_filters: Tensor | None,
    short_bias: Tensor | None,
    splits: int,
    accurate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass: the gradients of all tensors, of missing ones empty."""
    u, filter, pre, post, dy = _in_rows(u, filter, pre_gate, post_gate, dy)
    parameters = _contiguous(skip, short_filters, short_bias)
    d_u, *d_gates = [None if x is None else _empty_like(u) for x in (u, pre, post)]
    if u.shape[2] > TILE_TOKENS:
        found = split_backward(dy, u, filter, pre, post, *parameters, d_u, *d_gates, accurate)
    else:
        found = tile_backward(
            dy, u, filter, pre, post, *parameters, d_u, *d_gates, splits, accurate
        )
    d_taps, d_short = found
    d_parameters = (
        None if x is None else x.new_empty(x.shape).copy_(d)
        for x, d in (
            (skip, d_taps[:, 0]),
            (short_filters, None if d_short is None else d_short[:, :, :3]),
            (short_bias, None if d_short is None else d_short[:, :, 3]),
        )
    )
    gradients = (u.new_empty(0) if d is None else d for d in (*d_gates, *d_parameters))
    return d_u, d_taps.to(filter.dtype), *gradients


def _in_rows(*signals: Tensor | None) -> list[Any]:
    """As they are where tokens lie side by side, else copies."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in signals]


def _empty_like(signal: Tensor) -> Tensor:
    """In its strides, but with tokens side by side also where rows of `signal` overlap."""
    empty = torch.empty_like(signal)
    return empty if empty.stride(-1) == 1 else empty.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


@long_conv_op.register_fake
def _(u, filter, pre_gate, post_gate, skip, short_filters, short_bias, splits, accurate):
    return _empty_like(*_in_rows(u))


@long_conv_backward_op.register_fake
def _(dy, u, filter, pre_gate, post_gate, skip, short_filters, short_bias, splits, accurate):
    (signal,) = _in_rows(u)
    return (
        _empty_like(signal),
        filter.new_empty(filter.shape),
        *(u.new_empty(0) if x is None else _empty_like(signal) for x in (pre_gate, post_gate)),
        *(
            u.new_empty(0) if x is None else x.new_empty(x.shape)
            for x in (skip, short_filters, short_bias)
        ),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.splits, ctx.accurate = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = long_conv_backward_op(dy, *tensors, ctx.splits, ctx.accurate)
    gradients = (None if x is None else d for x, d in zip(tensors, found, strict=True))
    return *gradients, None, None


long_conv_op.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("seqscale::long_conv_step", mutates_args=())
@on_its_device
def long_conv_step_op(
    u: Tensor,
    taps: Tensor,
    history: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token; arguments and results as `archs.ops.long_conv.long_conv_step`."""
    taps, history = (x if x.stride(-1) == 1 else x.contiguous() for x in (taps, history))
    u, pre, post, skip = (
        None if x is None else x.contiguous() for x in (u, pre_gate, post_gate, skip)
    )
    B, D = u.shape
    y, z = torch.empty_like(u), torch.empty_like(u)
    rows = min(STEP_ROWS, triton.next_power_of_2(B))
    long_conv_step_kernel[(D * triton.cdiv(B, rows),)](
        u,
        taps,
        history,
        pre,
        post,
        skip,
        y,
        z,
        history.shape[2],
        B,
        D,
        taps.stride(0),
        history.stride(0),
        history.stride(1),
        ROWS=rows,
        BLOCK=STEP_NUMBERS // rows,
        num_warps=4,
    )
    return y, z


@long_conv_step_op.register_fake
def _(u, taps, history, pre_gate, post_gate, skip):
    return u.new_empty(u.shape), u.new_empty(u.shape)


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_step(ctx: Any, dy: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    """In PyTorch, in float32."""
    u, taps, history, pre, post, skip = ctx.saved_tensors
    wide = [None if x is None else x.float() for x in (u, taps, history, pre, post, skip, dy, dz)]
    u_, taps_, history_, pre_, post_, skip_, dy, dz = wide
    z = u_ if pre_ is None else u_ * pre_
    own = taps_[:, -1] if skip_ is None else taps_[:, -1] + skip_
    d_post = None
    d_sum = dy
    if post_ is not None:
        d_post = dy * (torch.einsum("ds,bds->bd", taps_[:, :-1], history_) + own * z)
        d_sum = dy * post_
    d_z = dz + own * d_sum
    d_own = (d_sum * z).sum(0)
    d_past = torch.einsum("bd,bds->ds", d_sum, history_)
    gradients = (
        d_z if pre_ is None else d_z * pre_,
        torch.cat([d_past, d_own.unsqueeze(1)], 1),
        taps_[:, :-1] * d_sum.unsqueeze(2),
        None if pre_ is None else d_z * u_,
        d_post,
        None if skip_ is None else d_own,
    )
    tensors = ctx.saved_tensors
    return tuple(
        None if x is None else d.to(x.dtype) for x, d in zip(tensors, gradients, strict=True)
    )


long_conv_step_op.register_autograd(_differentiate_step, setup_context=_setup_step)


@register_flop_formula(torch.ops.seqscale.long_conv)
def _flops(u_shape: Any, *_: Any, **__: Any) -> int:
    """Of the transforms of length 2 T, as `archs.hyena` counts them: two a row, one a filter."""
    B, D, T = u_shape
    fft = round(2.5 * 2 * T * math.log2(2 * T))
    return D * (B * (2 * fft + 6 * T) + fft)


@register_flop_formula(torch.ops.seqscale.long_conv_backward)
def _backward_flops(dy_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(dy_shape)


@register_flop_formula(torch.ops.seqscale.long_conv_step)
def _step_flops(u_shape: Any, taps_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * u_shape[0] * math.prod(taps_shape)
