"""Triton kernels of WKV-7 as operations of PyTorch (see `archs.ops.wkv7` for the definition).

Forward. One program a head (and segment) walks chunks of 32 tokens with the state in registers.
Inside a chunk the rows u, what is removed, solve a triangular system whose inverse is put together
from blocks: those of 2, merged two by two. Where heads are few and the sequence is long, segments
run side by side; a pass before forms what each makes of the state, which takes a whole matrix.

Backward. The forward pass keeps the state before every 128 tokens. One program a head (and
segment) goes back over these stretches, and in each forms the states again, then their gradients,
then the rest. What the three loops leave each other is small, and the program's own.

Numerics. Inside a chunk every tensor is multiplied by its token's decay from the chunk's start, or
by the inverse of it: of RWKV-7's decays that is at most 2^28, which every type used here can hold,
wherever in the chunk the exponents are centred. They are not, so that no token's rounding depends
on later ones. In bfloat16 products take their operands in bfloat16, but the inverse and what it is
applied to are kept in float32 and multiplied in tf32; float16, which cannot hold these factors, is
multiplied in tf32. Against the float64 fold of the rounded inputs, outputs then err by at most
4.9e-3 with keys correlated at 0.9 and 5.4e-3 at 0.98, at any decay and in-context rate: as with an
exact inverse, where the textbook product (I + A) (I + A^2) (I + A^4) ... diverges. In float32 they
err by 3e-7, gradients by 1e-6. Log-decays under -1, which RWKV-7 does not have, give NaN.

Letters: B batch, T tokens, H heads, N key and value dimension, C tokens a chunk, S segments.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archs.ops.launch_kernel import on_its_device, tf32_is_allowed
from archs.ops.wkv7_backward_kernel import wkv7_backward_fold_kernel, wkv7_backward_kernel
from archs.ops.wkv7_forward_kernel import wkv7_fold_kernel, wkv7_forward_kernel, wkv7_step_kernel

CHUNK = 32  # C: 16 does not fill a matrix instruction, 64 spills
SPACED = 4  # chunks between kept states: 128 tokens
STEP_BLOCK_V = 16  # columns of a state in one program of the step: few heads are many programs


@torch.library.custom_op("seqscale::wkv7", mutates_args=())
@on_its_device
def wkv7_op(
    r: Tensor,
    decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    logits: bool,
    segments: int,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass.

    Args:
        r: (B, T, H, N), and k, v, a and b as in `archs.ops.wkv7`, all of one dtype.
        decay: (B, T, H, N), log-decays, or logits of them.
        k: likewise.
        v: likewise.
        a: likewise.
        b: likewise.
        state: (B, H, N, N) in float32; the state after r is formed exactly when it is given.
        logits: what decay holds.
        segments: how many parts of the sequence run side by side.
        keeps: whether states are kept for the backward pass.

    Returns:
        y (B, T, H, N), the state after r (B, H, N, N) in float32, and the states before every
        128 tokens (B, ceil(T / 128), H, N, N) in r's dtype; what is not wanted is empty.
    """
    inputs = r, decay, k, v, a, b = tuple(x.contiguous() for x in (r, decay, k, v, a, b))
    state = None if state is None else state.contiguous()
    B, T, H, N = r.shape
    y = torch.empty_like(v)
    end = r.new_empty(0 if state is None else (B, H, N, N), dtype=torch.float32)
    kept = r.new_empty((B, triton.cdiv(T, SPACED * CHUNK), H, N, N) if keeps else 0)
    S, segment = _segments(T, segments)
    warps = 8 if N == 128 else 4
    moved = None
    if S > 1:
        moved = torch.empty(B, S, H, 2, N, N, dtype=torch.float32, device=r.device)
        wkv7_fold_kernel[(B * (S - 1) * 2 * H,)](
            *inputs[1:],
            moved,
            T,
            H,
            S,
            segment,
            **_constants(r, logits),
            num_warps=warps,
            num_stages=1,
        )
    wkv7_forward_kernel[(B * S * H,)](
        *inputs,
        state,
        moved,
        y,
        kept if keeps else None,
        None if state is None else end,
        T,
        H,
        S,
        segment,
        SPACED=SPACED,
        **_constants(r, logits),
        num_warps=warps,
        num_stages=1,
    )
    return y, end, kept


@torch.library.custom_op("seqscale::wkv7_backward", mutates_args=())
@on_its_device
def wkv7_backward_op(
    dy: Tensor,
    dend: Tensor | None,
    r: Tensor,
    decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    kept: Tensor,
    logits: bool,
    segments: int,
    wants_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass, from the gradients of y and of the state after r.

    Returns:
        The gradients of r, decay, k, v, a, b, each in its tensor's dtype, and of the state before
        r in float32, empty where not wanted.
    """
    dy, r, decay, k, v, a, b = (x.contiguous() for x in (dy, r, decay, k, v, a, b))
    dend = None if dend is None else dend.contiguous()
    B, T, H, N = r.shape
    S, segment = _segments(T, segments)
    constants, programs = _constants(r, logits), B * S * H
    moved = None
    if S > 1:
        moved = torch.empty(B, S, H, 2, N, N, dtype=torch.float32, device=r.device)
        wkv7_backward_fold_kernel[(B * (S - 1) * 2 * H,)](
            r,
            decay,
            a,
            b,
            dy,
            moved,
            T,
            H,
            S,
            segment,
            **constants,
            num_warps=8 if N == 128 else 4,
            num_stages=1,
        )

    def own(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(programs, *sizes, dtype=dtype, device=r.device)

    low = torch.bfloat16 if r.dtype == torch.bfloat16 else torch.float32
    gradients = [torch.empty_like(x) for x in (r, decay, k, v, a, b)]
    dstate = r.new_empty((B, H, N, N) if wants_state else 0, dtype=torch.float32)
    wkv7_backward_kernel[(programs,)](
        r,
        decay,
        k,
        v,
        a,
        b,
        dy,
        dend,
        moved,
        kept,
        own(SPACED, N, N, dtype=low),
        own(SPACED, N, N, dtype=low),
        own(SPACED, CHUNK, CHUNK, dtype=torch.float32),
        own(SPACED, CHUNK, N, dtype=low),
        own(SPACED, CHUNK, N, dtype=low),
        own(N, N, dtype=torch.float32),
        *gradients,
        dstate if wants_state else None,
        T,
        H,
        S,
        segment,
        SPACED=SPACED,
        **constants,
        num_warps=4 if N < 64 else 8,
        num_stages=1,
    )
    return *gradients, dstate


def _segments(T: int, segments: int) -> tuple[int, int]:
    """How many segments there are, none empty, and the tokens of each but the last."""
    stretch = SPACED * CHUNK
    segment = triton.cdiv(triton.cdiv(T, segments), stretch) * stretch
    return triton.cdiv(T, segment), segment


def _constants(r: Tensor, logits: bool) -> dict[str, Any]:
    """What kernels are compiled for."""
    exact = r.dtype == torch.float32 and not tf32_is_allowed()
    return {
        "N": r.shape[-1],
        "C": CHUNK,
        "LOGITS": logits,
        "DOT": tl.bfloat16 if r.dtype == torch.bfloat16 else tl.float32,
        "PRECISION": "tf32x3" if exact else "tf32",
    }


@wkv7_op.register_fake
def _(r, decay, k, v, a, b, state, logits, segments, keeps):
    B, T, H, N = r.shape
    kept = (B, -(-T // (SPACED * CHUNK)), H, N, N)
    return (
        v.new_empty(v.shape),
        r.new_empty(0 if state is None else (B, H, N, N), dtype=torch.float32),
        r.new_empty(kept if keeps else 0),
    )


@wkv7_backward_op.register_fake
def _(dy, dend, r, decay, k, v, a, b, kept, logits, segments, wants_state):
    B, _, H, N = r.shape
    dstate = r.new_empty((B, H, N, N) if wants_state else 0, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (r, decay, k, v, a, b)), dstate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, ctx.logits, ctx.segments, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dend: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    dy = torch.zeros_like(tensors[3]) if dy is None else dy
    dend = dend if ctx.has_state else None
    *gradients, dstate = wkv7_backward_op(
        dy, dend, *tensors, kept, ctx.logits, ctx.segments, ctx.has_state
    )
    return *gradients, dstate if ctx.has_state else None, None, None, None


wkv7_op.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("seqscale::wkv7_step", mutates_args=())
@on_its_device
def wkv7_step_op(
    r: Tensor,
    decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    logits: bool,
) -> tuple[Tensor, Tensor]:
    """One token (B, H, N) from a state (B, H, N, N) in float32: y and the next state."""
    inputs = tuple(x.contiguous() for x in (r, decay, k, v, a, b, state))
    B, H, N = r.shape
    y, following = torch.empty_like(inputs[3]), torch.empty_like(inputs[6])
    wkv7_step_kernel[(B * H * (N // STEP_BLOCK_V),)](
        *inputs, y, following, N=N, BV=STEP_BLOCK_V, LOGITS=logits, num_warps=2
    )
    return y, following


@wkv7_step_op.register_fake
def _(r, decay, k, v, a, b, state, logits):
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.logits = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_step(
    ctx: Any, dy: Tensor | None, dend: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The backward pass of a sequence of one token, before which the state is kept."""
    *tensors, state = ctx.saved_tensors
    dy = torch.zeros_like(tensors[3]) if dy is None else dy
    kept = state.to(dy.dtype)[:, None]
    *gradients, dstate = wkv7_backward_op(
        dy[:, None], dend, *(x[:, None] for x in tensors), kept, ctx.logits, 1, True
    )
    return *(x[:, 0] for x in gradients), dstate, None


wkv7_step_op.register_autograd(_differentiate_step, setup_context=_setup_step)


@register_flop_formula(torch.ops.seqscale.wkv7)
def _flops(r_shape: Any, *_: Any, **__: Any) -> int:
    """Of the recurrence, whatever the chunk: 9 N^2 a token and head, a multiply-add counting 2."""
    return 9 * math.prod(r_shape) * r_shape[-1]


@register_flop_formula(torch.ops.seqscale.wkv7_backward)
def _backward_flops(dy_shape: Any, *_: Any, **__: Any) -> int:
    return 18 * math.prod(dy_shape) * dy_shape[-1]


@register_flop_formula(torch.ops.seqscale.wkv7_step)
def _step_flops(r_shape: Any, *_: Any, **__: Any) -> int:
    return 9 * math.prod(r_shape) * r_shape[-1]
