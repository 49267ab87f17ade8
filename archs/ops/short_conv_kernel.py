"""Triton kernels of the short convolution: what `archs.ops.short_conv` defines, forward and back.

A program takes RUNS runs of consecutive tokens by BLOCK_D channels and walks all its runs at once,
a token of each a step. The last W-1 inputs stay in registers, so that every input is read once; at
the start of a run they are read again. The backward pass walks likewise and forms the sum under the
activation anew instead of storing it: after step t it knows the gradients g of that sum up to t,
and with them the gradient of the input W-1 tokens before. Gradients of weight and bias are summed
over a program's runs, written as float32 partial sums, and added up by a second kernel in a fixed
order: the same bits every time.

Letters: B batch, T tokens, D channels, W taps.
"""

from math import prod
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

Activation = Literal["silu"] | None

# Moving bytes is all there is to do. A warp takes one run, and a lane 16 bytes of a token at two
# bytes a channel: 8 channels, or 4 in the backward pass, which keeps three times as much in
# registers. Triton loads CHUNK tokens at a time into shared memory, STAGES - 1 chunks ahead: with 2
# programs on a multiprocessor that is 32 KB in flight, more than the 20 KB that hide the latency of
# an H100's memory (3 TB/s for 0.8 us over 132 multiprocessors). A run is long against the W-1
# tokens that it reads again, and short enough for 2,000 programs at 32,768 tokens of 2,048
# channels. Not tuned on a GPU.
FORWARD = {"RUNS": 4, "STEPS": 32, "CHUNK": 4, "STAGES": 3, "BLOCK_D": 256, "num_warps": 4}
BACKWARD = {"RUNS": 4, "STEPS": 64, "CHUNK": 4, "STAGES": 3, "BLOCK_D": 128, "num_warps": 4}
STEP = {"BLOCK_D": 256, "num_warps": 4}
TOTAL = {"BLOCK_N": 16, "BLOCK": 64, "num_warps": 4}


def short_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor | None]:
    """The sequence by `short_conv_forward_kernel`; arguments and results as `short_conv`."""
    y, end = short_conv_op(x, weight, bias, state, activation == "silu")
    return y, None if state is None else end


def short_conv_step_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """One token: x (B, D), state (B, D, W-1) -> y (B, D), state (B, D, W-1), a new tensor."""
    return short_conv_step_op(x, weight, bias, state, activation == "silu")


@triton.jit
def _inputs(x, state, t, o_d, m_d, T, stride_t, W: tl.constexpr):
    """The inputs at tokens t (R, 1), those before the first from the state."""
    x_t = tl.load(x + t * stride_t + o_d, mask=(t >= 0) & (t < T) & m_d, other=0.0)
    x_t = x_t.to(tl.float32)  # (R, BLOCK_D)
    if state is not None:
        p_state = state + o_d * (W - 1) + (t + W - 1)
        x_t += tl.load(p_state, mask=(t < 0) & m_d, other=0.0).to(tl.float32)
    return x_t


@triton.jit
def _chunk(p_x, m_d, step, n, stride_t, CHUNK: tl.constexpr):
    """CHUNK tokens of every run from its token `step` on, zeros from its token n (RUNS, 1) on."""
    xs = ()
    for i in tl.static_range(CHUNK):
        xs += (tl.load(p_x + i * stride_t, mask=(step + i < n) & m_d, other=0.0),)
    return xs  # CHUNK times (RUNS, BLOCK_D)


@triton.jit
def _taps(weight, o_d, m_d, W: tl.constexpr):
    """The taps in float32, the oldest token's first."""
    taps = ()
    for i in tl.static_range(W):
        taps += (tl.load(weight + o_d * W + i, mask=m_d, other=0.0).to(tl.float32),)
    return taps  # W times (1, BLOCK_D)


@triton.jit
def _bias(bias, o_d, m_d):
    """The bias in float32, zeros if there is none."""
    if bias is None:
        shift = tl.zeros(o_d.shape, tl.float32)
    else:
        shift = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return shift  # of o_d's shape


@triton.jit(do_not_specialize=["T"])
def short_conv_forward_kernel(
    x,  # (B, T, D), strides stride_b, stride_t, 1
    weight,  # (D, W)
    bias,  # (D,) or None
    state,  # (B, D, W-1) or None
    y,  # (B, T, D)
    end,  # (B, D, W-1) or None
    T,
    D,
    stride_b,
    stride_t,
    W: tl.constexpr,
    SILU: tl.constexpr,
    RUNS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The outputs of RUNS runs, and the state after the sequence."""
    n_d, n_t = tl.cdiv(D, BLOCK_D), tl.cdiv(T, RUNS * STEPS)
    i_d = tl.program_id(0) % n_d
    i_t = tl.program_id(0) // n_d % n_t
    i_b = (tl.program_id(0) // n_d // n_t).to(tl.int64)
    first = i_t * RUNS * STEPS
    t_start = first.to(tl.int64) + STEPS * tl.arange(0, RUNS)[:, None]  # (RUNS, 1)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    m_d = o_d < D
    x += i_b * stride_b
    y += i_b * T * D
    if state is not None:
        state += i_b * D * (W - 1)

    taps, shift = _taps(weight, o_d, m_d, W), _bias(bias, o_d, m_d)
    before = ()  # W-1 times (RUNS, BLOCK_D)
    for i in tl.static_range(W - 1):
        before += (_inputs(x, state, t_start - (W - 1) + i, o_d, m_d, T, stride_t, W),)
    n = tl.minimum(T - t_start, STEPS).to(tl.int32)  # (RUNS, 1), tokens of each run
    p_x = x + t_start * stride_t + o_d  # (RUNS, BLOCK_D)
    p_y = y + t_start * D + o_d
    for step in tl.range(0, min(STEPS, T - first), CHUNK, num_stages=STAGES):
        xs = _chunk(p_x + step * stride_t, m_d, step, n, stride_t, CHUNK)
        for i in tl.static_range(CHUNK):
            inputs = before + (xs[i].to(tl.float32),)
            z = shift
            for j in tl.static_range(W):
                z += taps[j] * inputs[j]
            if SILU:
                z = z / (1 + tl.exp(-z))
            tl.store(p_y + (step + i) * D, z.to(y.dtype.element_ty), mask=(step + i < n) & m_d)
            before = inputs[1:]

    if end is not None:
        if i_t == n_t - 1:
            for i in tl.static_range(W - 1):
                t = tl.full((1, 1), T - (W - 1) + i, tl.int64)
                x_t = _inputs(x, state, t, o_d, m_d, T, stride_t, W)  # (1, BLOCK_D)
                p_end = end + (i_b * D + o_d) * (W - 1) + i
                tl.store(p_end, x_t.to(end.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["T"])
def short_conv_backward_kernel(
    x,  # (B, T, D), strides stride_b, stride_t, 1
    weight,  # (D, W)
    bias,  # (D,) or None
    state,  # (B, D, W-1) or None
    dy,  # (B, T, D), strides stride_dyb, stride_dyt, 1
    dend,  # (B, D, W-1) or None
    dx,  # (B, T, D)
    dstate,  # (B, D, W-1) or None
    partials,  # (N, W + 1, D), the gradients of the taps and the bias of N batch rows and runs
    T,
    D,
    stride_b,
    stride_t,
    stride_dyb,
    stride_dyt,
    W: tl.constexpr,
    SILU: tl.constexpr,
    RUNS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of RUNS runs, those of weight and bias as partial sums."""
    RUN: tl.constexpr = STEPS - (W - 1)  # its last gradients come W-1 steps after its last inputs
    n_d, n_t = tl.cdiv(D, BLOCK_D), tl.cdiv(T, RUNS * RUN)
    i_d = tl.program_id(0) % n_d
    i_n = (tl.program_id(0) // n_d).to(tl.int64)
    i_b = i_n // n_t
    i_t = (i_n % n_t).to(tl.int32)
    first = i_t * RUNS * RUN
    t_start = first.to(tl.int64) + RUN * tl.arange(0, RUNS)[:, None]  # (RUNS, 1)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    m_d = o_d < D
    x += i_b * stride_b
    dy += i_b * stride_dyb
    dx += i_b * T * D
    if state is not None:
        state += i_b * D * (W - 1)
        dstate += i_b * D * (W - 1)
    if dend is not None:
        dend += i_b * D * (W - 1)

    taps, shift = _taps(weight, o_d, m_d, W), _bias(bias, o_d, m_d)
    zeros = tl.zeros((RUNS, BLOCK_D), tl.float32)
    before, g_before, dtaps = (), (), (zeros,)  # each of the parts (RUNS, BLOCK_D)
    for i in tl.static_range(W - 1):
        before += (_inputs(x, state, t_start - (W - 1) + i, o_d, m_d, T, stride_t, W),)
        g_before += (zeros,)
        dtaps += (zeros,)
    dbias = zeros
    n = tl.minimum(T - t_start, STEPS).to(tl.int32)  # (RUNS, 1), tokens that each run reads
    n_own = tl.minimum(n, RUN)  # and those that it forms gradients of
    p_x = x + t_start * stride_t + o_d  # (RUNS, BLOCK_D)
    p_dy = dy + t_start * stride_dyt + o_d
    p_dx = dx + (t_start - (W - 1)) * D + o_d
    for step in tl.range(0, min(STEPS, T + W - 1 - first), CHUNK, num_stages=STAGES):
        xs = _chunk(p_x + step * stride_t, m_d, step, n, stride_t, CHUNK)
        dys = _chunk(p_dy + step * stride_dyt, m_d, step, n, stride_dyt, CHUNK)
        for i in tl.static_range(CHUNK):
            inputs = before + (xs[i].to(tl.float32),)
            g = dys[i].to(tl.float32)
            if SILU:
                z = shift
                for j in tl.static_range(W):
                    z += taps[j] * inputs[j]
                s = 1 / (1 + tl.exp(-z))
                g *= s * (1 + z * (1 - s))
            own = tl.where(step + i < RUN, g, 0.0)
            dbias += own
            summed = ()
            for j in tl.static_range(W):
                summed += (dtaps[j] + own * inputs[j],)
            dtaps = summed

            done = step + i - (W - 1)  # the token of each run whose gradient is complete
            gs = g_before + (g,)
            dx_t = taps[0] * gs[W - 1]
            for j in tl.static_range(W - 1):
                dx_t += taps[W - 1 - j] * gs[j]
            if dend is not None:
                if first + RUNS * RUN > T - (W - 1):
                    o_end = t_start + done - (T - (W - 1))
                    m_end = (o_end >= 0) & (o_end < W - 1) & m_d
                    p_dend = dend + o_d * (W - 1) + o_end
                    dx_t += tl.load(p_dend, mask=m_end, other=0.0).to(tl.float32)
            m_dx = (done >= 0) & (done < n_own) & m_d
            tl.store(p_dx + (step + i) * D, dx_t.to(dx.dtype.element_ty), mask=m_dx)
            if dstate is not None:
                if (first == 0) & (done < 0):
                    p_dstate = dstate + o_d * (W - 1) + (t_start + done + W - 1)
                    m_dstate = (t_start + done < 0) & m_d
                    tl.store(p_dstate, dx_t.to(dstate.dtype.element_ty), mask=m_dstate)
            before, g_before = inputs[1:], gs[1:]

    o_c = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    p_partials = partials + i_n * (W + 1) * D + o_c
    for i in tl.static_range(W):
        tl.store(p_partials + i * D, tl.sum(dtaps[i], axis=0), mask=o_c < D)
    tl.store(p_partials + W * D, tl.sum(dbias, axis=0), mask=o_c < D)


@triton.jit(do_not_specialize=["N"])
def short_conv_total_kernel(
    partials,  # (N, W + 1, D)
    dweight,  # (D, W)
    dbias,  # (D,) or None
    N,
    D,
    W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums partials over N."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of (W + 1) D columns
    m_c = o_c < (W + 1) * D
    sums = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    for n in range(0, N, BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)  # (BLOCK_N, 1)
        p_partials = partials + o_n * (W + 1) * D + o_c[None, :]
        sums += tl.load(p_partials, mask=(o_n < N) & m_c[None, :], other=0.0)
    total = tl.sum(sums, axis=0)  # (BLOCK,)
    o_w, o_d = o_c // D, o_c % D
    tl.store(dweight + o_d * W + o_w, total.to(dweight.dtype.element_ty), mask=o_w < W)
    if dbias is not None:
        tl.store(dbias + o_d, total.to(dbias.dtype.element_ty), mask=(o_w == W) & m_c)


@triton.jit
def short_conv_step_kernel(
    x,  # (B, D), strides stride_b, 1
    weight,  # (D, W)
    bias,  # (D,) or None
    state,  # (B, D, W-1)
    y,  # (B, D)
    end,  # (B, D, W-1)
    D,
    stride_b,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token."""
    n_d = tl.cdiv(D, BLOCK_D)
    i_d = tl.program_id(0) % n_d
    i_b = (tl.program_id(0) // n_d).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_state = (i_b * D + o_d) * (W - 1)
    inputs = ()  # W times (BLOCK_D,)
    for i in tl.static_range(W - 1):
        inputs += (tl.load(state + o_state + i, mask=m_d, other=0.0).to(tl.float32),)
    inputs += (tl.load(x + i_b * stride_b + o_d, mask=m_d, other=0.0).to(tl.float32),)
    for i in tl.static_range(W - 1):
        tl.store(end + o_state + i, inputs[i + 1].to(end.dtype.element_ty), mask=m_d)
    taps, z = _taps(weight, o_d, m_d, W), _bias(bias, o_d, m_d)
    for i in tl.static_range(W):
        z += taps[i] * inputs[i]
    if SILU:
        z = z / (1 + tl.exp(-z))
    tl.store(y + i_b * D + o_d, z.to(y.dtype.element_ty), mask=m_d)


@custom_op("seqscale::short_conv", mutates_args=())
def short_conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Y (B, T, D) and the state after; that is empty where none was passed in."""
    B, T, D = x.shape
    W = weight.shape[1]
    x, weight, bias, state = _rows(x), *_contiguous(weight, bias, state)
    y, end = _like(x), _state_like(x, state)
    programs = B * triton.cdiv(T, FORWARD["RUNS"] * FORWARD["STEPS"])
    with torch.cuda.device_of(x):
        short_conv_forward_kernel[(programs * triton.cdiv(D, FORWARD["BLOCK_D"]),)](
            x,
            weight,
            bias,
            state,
            y,
            None if state is None else end,
            T,
            D,
            x.stride(0),
            x.stride(1),
            W=W,
            SILU=silu,
            **FORWARD,
        )
    return y, end


@custom_op("seqscale::short_conv_backward", mutates_args=())
def short_conv_backward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    dy: Tensor,
    dend: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and state; the last two empty where there is none."""
    B, T, D = x.shape
    W = weight.shape[1]
    x, dy = _rows(x), _rows(dy)
    weight, bias, state, dend = _contiguous(weight, bias, state, dend)
    dx, dweight, dbias, dstate = _gradients(x, weight, bias, state)
    N = B * triton.cdiv(T, BACKWARD["RUNS"] * (BACKWARD["STEPS"] - (W - 1)))
    partials = x.new_empty((N, W + 1, D), dtype=torch.float32)
    with torch.cuda.device_of(x):
        short_conv_backward_kernel[(N * triton.cdiv(D, BACKWARD["BLOCK_D"]),)](
            x,
            weight,
            bias,
            state,
            dy,
            dend,
            dx,
            None if state is None else dstate,
            partials,
            T,
            D,
            x.stride(0),
            x.stride(1),
            dy.stride(0),
            dy.stride(1),
            W=W,
            SILU=silu,
            **BACKWARD,
        )
        short_conv_total_kernel[(triton.cdiv((W + 1) * D, TOTAL["BLOCK"]),)](
            partials, dweight, None if bias is None else dbias, N, D, W=W, **TOTAL
        )
    return dx, dweight, dbias, dstate


@custom_op("seqscale::short_conv_step", mutates_args=())
def short_conv_step_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """Y (B, D) and the state after."""
    B, D = x.shape
    W = weight.shape[1]
    x, weight, bias, state = _rows(x), *_contiguous(weight, bias, state)
    y, end = _like(x), _state_like(x, state)
    with torch.cuda.device_of(x):
        short_conv_step_kernel[(B * triton.cdiv(D, STEP["BLOCK_D"]),)](
            x, weight, bias, state, y, end, D, x.stride(0), W=W, SILU=silu, **STEP
        )
    return y, end


def _rows(x: Tensor) -> Tensor:
    """X with its channels side by side, wherever its rows lie."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _like(x: Tensor) -> Tensor:
    """Contiguous memory, whatever the strides of x."""
    return x.new_empty(x.shape)


def _state_like(x: Tensor, state: Tensor | None) -> Tensor:
    return x.new_empty(0) if state is None else _like(state)


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else _like(bias)
    return _like(x), _like(weight), dbias, _state_like(x, state)


@register_fake("seqscale::short_conv")
@register_fake("seqscale::short_conv_step")
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return _like(x), _state_like(x, state)


@register_fake("seqscale::short_conv_backward")
def _fake_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    dy: Tensor,
    dend: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, state)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
    """For the sequence, and for the step as a sequence of one token."""
    x, weight, bias, state = ctx.saved_tensors
    tokens = x[:, None] if x.ndim == 2 else x  # (B, T, D)
    if dy is None:
        dy = x.new_zeros(x.shape[-1])  # one row for all
    elif x.ndim == 2:
        dy = dy[:, None]
    dx, dweight, dbias, dstate = short_conv_backward_op(
        tokens,
        weight,
        bias,
        state,
        dy.expand(tokens.shape),
        None if state is None else dend,
        ctx.silu,
    )
    return (
        dx.view(x.shape),
        dweight,
        None if bias is None else dbias,
        None if state is None else dstate,
        None,
    )


for _op in (short_conv_op, short_conv_step_op):
    register_autograd(_op, _backward, setup_context=_remember)


@register_flop_formula([torch.ops.seqscale.short_conv, torch.ops.seqscale.short_conv_step])
def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """A multiply and an add a tap."""
    return 2 * prod(x_shape) * weight_shape[1]


@register_flop_formula(torch.ops.seqscale.short_conv_backward)
def _backward_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """For the gradients of the inputs and of the taps; what is formed anew does not count."""
    return 4 * prod(x_shape) * weight_shape[1]
