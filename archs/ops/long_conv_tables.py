"""Sizes and tables of transforms for the long convolution's kernels.

Tables are formed in float64 and rounded once.
"""

import math
from functools import cache

import torch
from torch import Tensor

# The longest N1 N2 with its N1, N2 and warps: where a tensor (N1, N2) takes 16 registers, all else
# fits in the remaining ones. N1 of 64 is the smallest for an H100's own matrix instructions.
SIZES = (
    (256, 16, 16, 4),
    (512, 32, 16, 4),
    (1024, 64, 16, 4),
    (2048, 64, 32, 4),
    (4096, 128, 32, 8),
)
TILE_TOKENS = SIZES[-1][0]  # the most; beyond, a transform is split
MOST_TOKENS = 2**20


@cache
def inner_tables(
    N1: int, N2: int, shift: float, accurate: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a transform of length N1 N2 at the frequencies k - shift.

    Returns:
        f1 (parts, 2, N1, N1) and f2 (parts, 2, N2, N2) with orthonormal rows, parts of float16, and
        between them the twiddles (2, N1, N2), float32.
    """
    one, two = (torch.arange(n, dtype=torch.float64) for n in (N1, N2))
    f1 = _turns(torch.outer(one - shift, one) / N1) / math.sqrt(N1)
    f2 = _turns(torch.outer(two, two) / N2) / math.sqrt(N2)
    twiddles = _turns(torch.outer(one - shift, two) / (N1 * N2))
    f1, f2 = (_parts(x, accurate).to(device) for x in (f1, f2))
    return f1, twiddles.float().to(device), f2


@cache
def outer_tables(
    M: int, P: int, columns: int, accurate: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a transform of length M before one of length P, at the frequencies k - 1/4 in all.

    Returns:
        f (parts, 2, M, M) with orthonormal rows, parts of float16; the twiddles of a column in its
        block (2, M, columns), float32, and of the block (2, M, P / columns).
    """
    k = torch.arange(M, dtype=torch.float64) - 0.25
    f = _turns(torch.outer(k, torch.arange(M, dtype=torch.float64)) / M) / math.sqrt(M)
    inside = torch.arange(columns, dtype=torch.float64)
    blocks = torch.arange(0, P, columns, dtype=torch.float64)
    turns, block_turns = (_turns(torch.outer(k, x) / (M * P)).float() for x in (inside, blocks))
    return _parts(f, accurate).to(device), turns.to(device), block_turns.to(device)


def _turns(x: Tensor) -> Tensor:
    """exp(-2 pi i x), of x in float64: real and imaginary part."""
    angle = -2 * math.pi * x
    return torch.stack([angle.cos(), angle.sin()])


def _parts(x: Tensor, accurate: bool) -> Tensor:
    """float64 as float16, and 2^11 times what is then missing."""
    main = x.half()
    return torch.stack([main, ((x - main) * 2**11).half()]) if accurate else main
