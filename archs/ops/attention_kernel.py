"""Triton kernels of attention as operations of PyTorch (see `archs.ops.attention`).

Forward. One program a head and tile of queries walks the tiles of keys that they read; the sums of
weights and of weighted values stay in registers, relative to the largest weight so far. Masks are
formed at the ends of that walk alone. Few queries over many keys are another kernel: the queries
of all heads that share a key head are rows of one tile, the keys are split over programs, and the
last of these to finish puts the parts together, in the same launch. For Hopper GPUs there is a
third, in Gluon: `attention_hopper_kernel`.

Backward. The forward pass keeps log2 of the sum of 2^logits of each query, from which the weights
are formed again, twice: for the gradient of queries by a program a tile of queries, and for those
of keys and values, sums over the queries of all heads that share the key head, by a program a tile
of keys. Nothing is added in memory, so gradients are the same to the last bit every time. Adding
the gradient of queries to memory from all tiles of keys would save two of seven products, but
needs more registers than there are (79 spills at K = 64, 547 at 128).

Numerics. Logits, sums and gradients are in float32; products take their operands in the inputs'
type, float32 in tf32 or, at PyTorch's "highest" precision, in three products of tf32. With operands
rounded as in bfloat16, outputs and gradients err by 2.0e-3 to 2.5e-3 against float64 on the same
inputs (emulated), which is bfloat16's own rounding; in float32 by 3e-7 to 5e-7.

Letters: B batch, T queries, S keys, H query and H_kv key heads, K head size, R heads a key head.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from archs.ops.attention_backward_kernel import attention_dkv_kernel, attention_dq_kernel
from archs.ops.attention_decode_kernel import attention_decode_kernel
from archs.ops.attention_forward_kernel import attention_forward_kernel
from archs.ops.attention_hopper_kernel import attention_hopper
from archs.ops.launch_kernel import on_its_device, tf32_is_allowed

Strides = tuple[int, int, int]


class Tiles(NamedTuple):
    """How large the tiles of a kernel are, and what a program is compiled for."""

    queries: int  # BM
    keys: int  # BN
    warps: int
    stages: int


# By kernel, bytes of an element, and head size rounded up. Those of 16 bits compile for sm_90
# without spills, but for two outside the loops at 256. Not tuned on a GPU.
TILES = {
    "forward": {
        2: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 128, 8, 3), 256: Tiles(128, 64, 8, 2)},
        4: {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 16, 4, 1)},
    },
    "dq": {
        2: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 4, 2)},
        4: {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 16, 4, 1)},
    },
    "dkv": {
        2: {64: Tiles(64, 128, 8, 3), 128: Tiles(64, 128, 8, 3), 256: Tiles(32, 64, 8, 2)},
        4: {64: Tiles(32, 64, 4, 2), 128: Tiles(32, 64, 4, 1), 256: Tiles(16, 32, 4, 1)},
    },
    "decode": {
        2: {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(64, 32, 4, 2)},
        4: {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 16, 4, 2)},
    },
}
# Of GPUs other than those of data centres from the H100 on: less shared memory, or no asynchronous
# products, whose operands then lie in registers.
TILES_OF_OTHERS = {
    ("forward", 2, 128): Tiles(128, 64, 8, 2),
    ("dq", 2, 64): Tiles(128, 64, 8, 2),
    ("dq", 2, 128): Tiles(64, 64, 4, 2),
    ("dkv", 2, 64): Tiles(64, 128, 8, 1),
    ("dkv", 2, 128): Tiles(64, 64, 8, 2),
}
MERGED = 64  # rows of sums that are put together at a time: 64 registers a thread at K = 128
LEAST = 16  # rows and columns of an operand of a product


@torch.library.custom_op("seqscale::attention", mutates_args=())
@on_its_device
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    window: int | None,
    path: str,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """The forward pass.

    Args:
        q: (B, T, H, K).
        k: (B, S, H_kv, K).
        v: (B, S, H_kv, K).
        lengths: (B,), valid keys, or None.
        window: keys that a query reads, or None.
        path: "tiles", "decode" or, without lengths, "hopper", as in `archs.ops.attention`.
        splits: of the keys, in path "decode".

    Returns:
        y (B, T, H, K) in q's dtype, and log2 of the sum of 2^logits (B, H, T) in float32, logits
        being to base 2: -1e30 for a query without keys.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    lengths = None if lengths is None else lengths.contiguous()
    if path == "hopper":
        return attention_hopper(q, k, v, window)
    B, T, H, _ = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if path == "decode":
        _decode(q, k, v, lengths, window, splits, y, lse)
        return y, lse
    sizes, constants, tiles = _launch("forward", q, k, window)
    attention_forward_kernel[(triton.cdiv(T, tiles.queries) * H * B,)](
        q, k, v, lengths, y, lse, *_strides(q, k, v, y), *sizes, **constants
    )
    return y, lse


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    window: int | None,
    splits: int,
    y: Tensor,
    lse: Tensor,
) -> None:
    """Few queries, their keys split, into y and lse."""
    B, T, H, K = q.shape
    H_kv = k.shape[2]
    rows = T * H // H_kv
    parts = weights = done = None
    if splits > 1:
        parts = lse.new_empty(B, H_kv, rows, splits, K)
        weights = lse.new_empty(B, H_kv, 2, rows, splits)
        done = torch.zeros(B, H_kv, dtype=torch.int32, device=q.device)
    sizes, constants, _ = _launch("decode", q, k, window)
    constants["BM"] = max(LEAST, triton.next_power_of_2(rows))
    attention_decode_kernel[(splits * H_kv * B,)](
        q,
        k,
        v,
        lengths,
        y,
        lse,
        parts,
        weights,
        done,
        *_strides(q, k, v, y),
        *sizes,
        splits,
        BR=triton.next_power_of_2(rows),
        BS=MERGED // triton.next_power_of_2(rows),
        **constants,
    )


@torch.library.custom_op("seqscale::attention_backward", mutates_args=())
@on_its_device
def attention_backward_op(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass: the gradients of q, k and v, each in its tensor's dtype."""
    dy, q, k, v = _rows(dy), _rows(q), _rows(k), _rows(v)
    lengths = None if lengths is None else lengths.contiguous()
    B, T, H, _ = q.shape
    S, H_kv = k.shape[1:3]
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sizes, constants, tiles = _launch("dq", q, k, window)
    attention_dq_kernel[(triton.cdiv(T, tiles.queries) * H * B,)](
        q,
        k,
        v,
        lengths,
        y,
        dy,
        lse,
        delta,
        dq,
        *_strides(q, k, v, y, dy, dq),
        *sizes,
        **constants,
    )
    sizes, constants, tiles = _launch("dkv", q, k, window)
    attention_dkv_kernel[(triton.cdiv(S, tiles.keys) * H_kv * B,)](
        q,
        k,
        v,
        lengths,
        dy,
        lse,
        delta,
        dk,
        dv,
        *_strides(q, k, v, dy, dk, dv),
        *sizes,
        **constants,
    )
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """The rows of every head contiguous, whatever lies between them: a cache is not copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Iterator[Strides]:
    """Between batch rows, tokens and heads."""
    return (x.stride()[:3] for x in tensors)


def _launch(
    kernel: str, q: Tensor, k: Tensor, window: int | None
) -> tuple[tuple[Any, ...], dict[str, Any], Tiles]:
    """What all kernels take: T, S, H, R, window and scale; constants; and the tiles."""
    _, T, H, K = q.shape
    S, H_kv = k.shape[1:3]
    BK = max(LEAST, triton.next_power_of_2(K))
    size = q.element_size(), max(64, BK)
    tiles = TILES[kernel][size[0]][size[1]]
    if not 90 <= _arch() < 120:
        tiles = TILES_OF_OTHERS.get((kernel, *size), tiles)
    exact = q.dtype == torch.float32 and not tf32_is_allowed()
    constants = {
        "K": K,
        "BK": BK,
        "BM": tiles.queries,
        "BN": tiles.keys,
        "PRECISION": "tf32x3" if exact else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return (T, S, H, H // H_kv, window, K**-0.5 / math.log(2)), constants, tiles


def _arch() -> int:
    """Of the GPU that kernels are compiled for: 90 is sm_90."""
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


@attention_op.register_fake
def _(q, k, v, lengths, window, path, splits):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@attention_backward_op.register_fake
def _(dy, q, k, v, y, lse, lengths, window):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, ctx.window, *_ = inputs
    ctx.save_for_backward(q, k, v, *output, lengths)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    *tensors, lengths = ctx.saved_tensors
    gradients = attention_backward_op(dy, *tensors, lengths, ctx.window)
    return *gradients, None, None, None, None


attention_op.register_autograd(_differentiate, setup_context=_setup)


@register_flop_formula(torch.ops.seqscale.attention)
def _flops(
    q_shape: Any, k_shape: Any, v_shape: Any, lengths: Any, window: int | None, *_: Any, **__: Any
) -> int:
    """4 K for each pair of a query and a key that it reads, were all keys valid."""
    B, T, H, K = q_shape
    S = k_shape[1]

    def pairs(tokens: int) -> int:
        ramp = tokens if window is None else min(tokens, window)
        return ramp * (ramp + 1) // 2 + (tokens - ramp) * ramp

    return 4 * B * H * K * (pairs(S) - pairs(S - T))


@register_flop_formula(torch.ops.seqscale.attention_backward)
def _backward_flops(
    dy_shape: Any,
    q_shape: Any,
    k_shape: Any,
    v_shape: Any,
    y_shape: Any,
    lse_shape: Any,
    lengths: Any,
    window: int | None,
    **_: Any,
) -> int:
    """Twice the forward pass: weights that are formed again are not counted."""
    return 2 * _flops(q_shape, k_shape, v_shape, lengths, window)
