"""Causal attention forward for Hopper GPUs, in Gluon (see `archs.ops.attention`).

One program holds 128 queries of a head: two warpgroups of 64 rows compute, and one warp starts the
copies. Tiles of 128 keys and of their values come by TMA into two stages each; mbarriers say when a
stage is full, and when both warpgroups are done with it. A warpgroup starts the scores of one tile
and then the product of the weights and values of the tile before, which the tensor cores work on
while it exponentiates the scores. Registers are handed from the warp that copies to those that
compute.

Tiles are walked from the newest keys to the oldest, so that those that need a mask come first, and
with a window last. Only tiles that some row of the program sees are loaded. Programs that see the
most keys are started first, all of a head in a row, while its keys lie in L2.

TMA reads 0 behind the last key of a batch row, whatever lies there in memory, and drops what would
be written behind the last query.

Numerics. Products are formed in the inputs' type and summed in float32; weights are rounded to the
inputs' type, but their sum is of weights not yet rounded, as in FlashAttention.

Letters: B batch, T queries, S keys (S >= T), H query heads, H_kv key heads, K head size.
"""

import math

import torch
import triton
from torch import Tensor

import archs.ops

try:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma  # noqa: F401
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from archs.ops.attention_hopper_forward_kernel import attention_hopper_forward_kernel
except (ImportError, AttributeError) as error:
    MISSING = f"Triton {triton.__version__} lacks what it is written in: {error}"
else:
    MISSING = None

DTYPES = (torch.float16, torch.bfloat16)
HEAD_SIZES = (64, 128)
ROWS = 64  # queries of a warpgroup: what one of its matrix instructions takes
KEYS = 128  # keys of a tile: the scores of 256 would take all of a thread's registers
STAGES = 2  # tiles of keys, and of values, in shared memory: 160 KB with the queries at K = 128
ALIGNED_BYTES = 16  # TMA's addresses and strides are multiples of this


def attention_hopper(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Causal attention of the T newest tokens to S keys, themselves included.

    Args:
        q: (B, T, H, K).
        k: (B, S, H_kv, K), S >= T >= 1, H a multiple of H_kv. May be a part of a cache.
        v: (B, S, H_kv, K).
        window: how many of the newest keys a query reads, its own included; None reads all.

    Returns:
        y (B, T, H, K) in the type of q, and log2 of the sum of 2^(q . k log2(e) / sqrt(K)) over
        the keys that a query reads, (B, H, T) in float32.

    Raises:
        ValueError: `refusal` has something to say.
    """
    if reason := refusal(q, k, v):
        raise ValueError(f"attention on Hopper: {reason}; use path 'tiles'")
    B, T, H, K = q.shape
    S, H_kv = k.shape[1:3]
    if window is not None and window >= S:
        window = None
    y = torch.empty((B, T, H, K), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    attention_hopper_forward_kernel[(B * H * triton.cdiv(T, 2 * ROWS),)](
        _in_blocks(q, ROWS),
        _in_blocks(k, KEYS),
        _in_blocks(v, KEYS),
        _in_blocks(y, ROWS),
        lse,
        T,
        S,
        H,
        window or 0,
        math.log2(math.e) * K**-0.5,
        SHARED=H // H_kv,
        WINDOW=window is not None,
        STAGES=STAGES,
        num_warps=4,
    )
    return y, lse


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why `attention_hopper` cannot take tensors of shapes that fit, in a line; None if it can."""
    if MISSING:
        return MISSING
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"takes float16 or bfloat16, one for all, got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] not in HEAD_SIZES:
        return f"takes head sizes {' and '.join(map(str, HEAD_SIZES))}, got {q.shape[-1]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _is_aligned(x):
            return (
                f"{name} must start, and step along B, T and H, at multiples of {ALIGNED_BYTES} "
                f"bytes, and be contiguous along K, got strides {x.stride()} of {x.dtype}"
            )
    if archs.ops.interpreted():
        return "Triton's interpreter does not run Gluon"
    if not archs.ops.has_gpu(q):
        return f"needs a GPU of compute capability 9.0, and q is on {q.device}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability != (9, 0):
        return f"needs compute capability 9.0, and {q.device} has {'.'.join(map(str, capability))}"
    return None


def _is_aligned(x: Tensor) -> bool:
    steps = [x.stride(i) * x.element_size() for i in range(3) if x.shape[i] > 1]
    return (
        x.stride(-1) == 1
        and x.data_ptr() % ALIGNED_BYTES == 0
        and all(step > 0 and step % ALIGNED_BYTES == 0 for step in steps)
    )


def _in_blocks(x: Tensor, rows: int) -> "TensorDescriptor":
    """What TMA is told of x (B, T, H, K): it copies `rows` rows of one head at a time."""
    K = x.shape[-1]
    x = x.transpose(1, 2)  # (B, H, T, K)
    # The stride of a dimension of size 1 is never used, but checked.
    strides = [x.stride(i) if x.shape[i] > 1 else K for i in range(3)] + [1]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, K], layout)
