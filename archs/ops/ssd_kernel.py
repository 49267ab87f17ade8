"""Triton kernels of SSD as operations of PyTorch (see `archs.ops.ssd` for the definition).

Forward. One program a head (and segment) walks the chunks in order with the state in registers:
neither states nor C B^T reach memory. Where heads are few and the sequence is long, segments run
side by side; a pass before forms what each of them adds to the state.

Backward. The forward pass keeps the state before every third chunk. A pass over the chunks in
reverse keeps the gradient of the state after every third chunk. Then all chunks are independent:
one program a chunk and group loops over the group's heads and sums their shares of db and dc in
registers.

Numerics. Decays are powers of two of differences of sums of log-decays. A sum is kept in two parts,
a multiple of 2^-10, which adds up without rounding, and the rest: small differences of large sums
are exact. Log-decays below -150 (base 2) count as -150, a factor that is zero in float32. Products
are formed in x's type and summed in float32; kept states have x's type.

Layouts. Triton lays out a product that leads to another product along its rows only. With 64 rows
and 8 warps every element is then computed and held twice. A branch that is always taken hides the
second product from the first: 24 instead of 40 matrix instructions in the forward kernel, and no
spills.

Letters: B batch, T tokens, H heads, P head dimension, N state dimension, G groups, C tokens a
chunk, S segments.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archs.ops.launch_kernel import on_its_device, tf32_is_allowed
from archs.ops.ssd_backward_kernel import ssd_backward_kernel, ssd_gradients_kernel
from archs.ops.ssd_forward_kernel import ssd_fold_kernel, ssd_forward_kernel, ssd_step_kernel

# C by the bytes of an element of x: 32 tokens do not fill a warp group's matrix instruction, 128
# spill, and tiles of 64 in float32 do not fit in shared memory.
CHUNK = {2: 64, 4: 32}
SPACED = 3  # chunks between kept states: fewer mean more bytes, more mean more work backward
BLOCK_P = 64  # columns of a state in one program
STEP_BLOCK_P = 16  # likewise in the step: small, so that few heads are many programs
BLOCK_H = 8  # heads whose x and dy one program reads twice, the second time from the cache


@torch.library.custom_op("seqscale::ssd", mutates_args=())
@on_its_device
def ssd_op(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None,
    dt: Tensor | None,
    skip: Tensor | None,
    segments: int,
    wants_state: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass.

    Args:
        x: (B, T, H, P), and log_decay, b, c, dt and skip as in `archs.ops.ssd`.
        log_decay: likewise.
        b: likewise.
        c: likewise.
        state: (B, H, P, N) in float32.
        dt: likewise.
        skip: likewise.
        segments: how many parts of the sequence run side by side.
        wants_state: whether the state after x is formed.
        keeps: whether states are kept for the backward pass.

    Returns:
        y (B, T, H, P), the state after x (B, H, P, N) in float32, and the states before every
        SPACED chunks (B, ceil(T / (SPACED C)), H, N, P) in x's dtype; what is not wanted is empty.
    """
    x, b, c = (_rows_in_order(t) for t in (x, b, c))
    state = None if state is None else state.contiguous()
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    y = torch.empty(B, T, H, P, dtype=x.dtype, device=x.device)
    end = x.new_empty((B, H, P, N) if wants_state else 0, dtype=torch.float32)
    chunk = CHUNK[x.element_size()]
    kept = x.new_empty((B, triton.cdiv(T, SPACED * chunk), H, N, P) if keeps else 0)
    S, segment = _segments(T, segments, chunk)
    partial = decayed = None
    if S > 1:
        partial, decayed = _parts(x, b, log_decay, dt, S, segment, reverse=False)
    block_p = min(P, BLOCK_P)
    ssd_forward_kernel[(B * S * H * (P // block_p),)](
        x,
        log_decay,
        dt,
        b,
        c,
        skip,
        state,
        partial,
        decayed,
        y,
        kept if keeps else None,
        end if wants_state else None,
        x.stride(),
        log_decay.stride(),
        _strides(dt),
        b.stride(),
        c.stride(),
        y.stride(),
        T,
        H,
        H // G,
        S,
        segment,
        P=P,
        N=N,
        BP=block_p,
        C=chunk,
        SPACED=SPACED,
        PRECISION=_precision(x),
        **_launch(x),
    )
    return y, end, kept


@torch.library.custom_op("seqscale::ssd_backward", mutates_args=())
@on_its_device
def ssd_backward_op(
    dy: Tensor,
    dend: Tensor | None,
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor | None,
    skip: Tensor | None,
    kept: Tensor,
    segments: int,
    wants_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass, from the gradients of y and of the state after x.

    Returns:
        The gradients of x, log_decay, b, c, the state before x (where `wants_state`), dt and
        skip, each in its tensor's dtype; of what is None or not wanted, empty.
    """
    x, dy, b, c = (_rows_in_order(t) for t in (x, dy, b, c))
    dend = None if dend is None else dend.contiguous()
    B, T, H, P = x.shape
    G, N = b.shape[2:]
    chunk = CHUNK[x.element_size()]
    S, segment = _segments(T, segments, chunk)
    partial = decayed = None
    if S > 1:
        partial, decayed = _parts(dy, c, log_decay, None, S, segment, reverse=True)
    after = torch.empty_like(kept)
    dstate = x.new_empty((B, H, P, N) if wants_state else 0, dtype=torch.float32)
    block_p = min(P, BLOCK_P)
    parts, chunks = P // block_p, triton.cdiv(T, chunk)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    db = torch.empty(b.shape, dtype=b.dtype, device=x.device)
    dc = torch.empty(c.shape, dtype=c.dtype, device=x.device)
    shares = torch.empty(2 + parts, B, T, H, dtype=torch.float32, device=x.device)
    ddt = x.new_empty(0 if dt is None else (parts, B, T, H), dtype=torch.float32)
    dskip = x.new_empty(0 if skip is None else (parts, B, S, H), dtype=torch.float32)
    ssd_backward_kernel[(B * S * H * parts,)](
        x,
        dy,
        log_decay,
        dt,
        b,
        c,
        skip,
        dend,
        partial,
        decayed,
        dx,
        None if dt is None else ddt,
        None if skip is None else dskip,
        shares[2:],
        after,
        dstate if wants_state else None,
        x.stride(),
        dy.stride(),
        log_decay.stride(),
        _strides(dt),
        b.stride(),
        c.stride(),
        T,
        H,
        H // G,
        S,
        segment,
        P=P,
        N=N,
        BP=block_p,
        C=chunk,
        SPACED=SPACED,
        PRECISION=_precision(x),
        **_launch(x),
    )
    ssd_gradients_kernel[(B * chunks * G,)](
        x,
        dy,
        log_decay,
        dt,
        b,
        c,
        kept,
        after,
        shares[0],
        shares[1],
        db,
        dc,
        x.stride(),
        dy.stride(),
        log_decay.stride(),
        _strides(dt),
        b.stride(),
        c.stride(),
        T,
        H,
        H // G,
        P=P,
        N=N,
        BP=block_p,
        C=chunk,
        SPACED=SPACED,
        BH=BLOCK_H,
        OVERLAP=x.element_size() == 2,
        PRECISION=_precision(x),
        **_launch(x),
    )
    if dt is not None:
        ddt = (ddt.sum(0) if parts > 1 else ddt[0]).to(dt.dtype)
    if skip is not None:
        dskip = dskip.sum((0, 1, 2)).to(skip.dtype)
    return dx, shares.sum(0).to(log_decay.dtype), db, dc, dstate, ddt, dskip


def _parts(
    u: Tensor,
    k: Tensor,
    log_decay: Tensor,
    dt: Tensor | None,
    S: int,
    segment: int,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """What each segment but the last walked adds to the state, and its decay."""
    B, T, H, P = u.shape
    G, N = k.shape[2:]
    partial = torch.empty(B, S, H, P, N, dtype=torch.float32, device=u.device)
    decayed = torch.empty(B, S, H, dtype=torch.float32, device=u.device)
    block_p = min(P, BLOCK_P)
    ssd_fold_kernel[(B * (S - 1) * H * (P // block_p),)](
        u,
        k,
        log_decay,
        dt,
        partial,
        decayed,
        u.stride(),
        k.stride(),
        log_decay.stride(),
        _strides(dt),
        T,
        H,
        H // G,
        S,
        segment,
        P=P,
        N=N,
        BP=block_p,
        C=CHUNK[u.element_size()],
        REVERSE=reverse,
        PRECISION=_precision(u),
        **_launch(u),
    )
    return partial, decayed


def _segments(T: int, segments: int, chunk: int) -> tuple[int, int]:
    """How many segments there are, none empty, and the tokens of each but the last."""
    segment = triton.cdiv(triton.cdiv(T, segments), SPACED * chunk) * SPACED * chunk
    return triton.cdiv(T, segment), segment


def _rows_in_order(x: Tensor) -> Tensor:
    """X with its last dimension contiguous: x itself wherever it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return () if x is None else x.stride()


def _precision(x: Tensor) -> str:
    """How float32 products are formed: to PyTorch's own setting for them, on tensor cores."""
    return "tf32" if tf32_is_allowed() else "tf32x3"


def _launch(x: Tensor) -> dict[str, int]:
    return {"num_warps": 8, "num_stages": 2 if x.element_size() == 2 else 1}


@ssd_op.register_fake
def _(x, log_decay, b, c, state, dt, skip, segments, wants_state, keeps):
    B, T, H, P = x.shape
    N = b.shape[3]
    blocks = -(-T // (SPACED * CHUNK[x.element_size()]))
    return (
        x.new_empty(B, T, H, P),
        x.new_empty((B, H, P, N) if wants_state else 0, dtype=torch.float32),
        x.new_empty((B, blocks, H, N, P) if keeps else 0),
    )


@ssd_backward_op.register_fake
def _(dy, dend, x, log_decay, b, c, dt, skip, kept, segments, wants_state):
    B, _, H, P = x.shape
    N = b.shape[3]
    return (
        x.new_empty(x.shape),
        log_decay.new_empty(log_decay.shape),
        b.new_empty(b.shape),
        c.new_empty(c.shape),
        x.new_empty((B, H, P, N) if wants_state else 0, dtype=torch.float32),
        x.new_empty(0, dtype=torch.float32) if dt is None else dt.new_empty(dt.shape),
        x.new_empty(0, dtype=torch.float32) if skip is None else skip.new_empty(skip.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, log_decay, b, c, state, dt, skip, ctx.segments, ctx.wants_state, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(x, log_decay, b, c, dt, skip, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dend: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    x, log_decay, b, c, dt, skip, kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dend = dend if ctx.wants_state else None
    dx, dlog_decay, db, dc, dstate, ddt, dskip = ssd_backward_op(
        dy, dend, x, log_decay, b, c, dt, skip, kept, ctx.segments, ctx.has_state
    )
    return (
        dx,
        dlog_decay,
        db,
        dc,
        dstate if ctx.has_state else None,
        None if dt is None else ddt,
        None if skip is None else dskip,
        None,
        None,
        None,
    )


ssd_op.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("seqscale::ssd_step", mutates_args=())
@on_its_device
def ssd_step_op(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    dt: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token: shapes as `archs.ops.ssd.ssd_step`, state in float32; y and the next state."""
    x, b, c = (_rows_in_order(t) for t in (x, b, c))
    state = state.contiguous()
    B, H, P = x.shape
    G, N = b.shape[1:]
    y = torch.empty(B, H, P, dtype=x.dtype, device=x.device)
    following = torch.empty_like(state)
    block_p = min(P, STEP_BLOCK_P)
    ssd_step_kernel[(B * H * (P // block_p),)](
        x,
        log_decay,
        dt,
        b,
        c,
        skip,
        state,
        y,
        following,
        x.stride(),
        log_decay.stride(),
        _strides(dt),
        b.stride(),
        c.stride(),
        H,
        H // G,
        P=P,
        N=N,
        BP=block_p,
        num_warps=4,
    )
    return y, following


@ssd_step_op.register_fake
def _(x, log_decay, b, c, state, dt, skip):
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate_step(
    ctx: Any, dy: Tensor | None, dend: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The backward pass of a sequence of one token, before which the state is kept."""
    x, log_decay, b, c, state, dt, skip = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    kept = state.to(x.dtype).transpose(2, 3).contiguous()
    dx, dlog_decay, db, dc, dstate, ddt, dskip = ssd_backward_op(
        dy[:, None],
        dend,
        x[:, None],
        log_decay[:, None],
        b[:, None],
        c[:, None],
        None if dt is None else dt[:, None],
        skip,
        kept[:, None],
        1,
        True,
    )
    return (
        dx[:, 0],
        dlog_decay[:, 0],
        db[:, 0],
        dc[:, 0],
        dstate,
        None if dt is None else ddt[:, 0],
        None if skip is None else dskip,
    )


ssd_step_op.register_autograd(_differentiate_step, setup_context=_setup_step)


@register_flop_formula(torch.ops.seqscale.ssd)
def _flops(x_shape: Any, log_decay_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    """Of the recurrence, whatever the chunk: 5 P N a token and head, a multiply-add counting 2."""
    return 5 * math.prod(x_shape) * b_shape[-1]


@register_flop_formula(torch.ops.seqscale.ssd_backward)
def _backward_flops(
    dy_shape: Any, dend_shape: Any, x_shape: Any, _: Any, b_shape: Any, *__: Any, **___: Any
) -> int:
    return 10 * math.prod(x_shape) * b_shape[-1]


@register_flop_formula(torch.ops.seqscale.ssd_step)
def _step_flops(x_shape: Any, log_decay_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return 5 * math.prod(x_shape) * b_shape[-1]
