"""Attention's kernels in other tiles than `TILES` gives them: are those the fastest?

    python tests/benchmarks/gpu_tiles.py [--rounds 30] [--head 128]

Needs a GPU. bfloat16, forward and backward at B 8, T 4,096 and B 1, T 32,768, width 2,048; a kernel
at a time, its tiles interleaved in random order. Each is compared with the one in use, marked *:
the ratio of times, above 1 where that in use is slower, with a 95 % interval (`timing.speedup`).
"""

import argparse
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from archs.ops import attention_kernel
from archs.ops.attention import AttentionPlan, attention
from archs.ops.attention_kernel import TILES, Tiles
from harness import timing

ITEM = 2  # bytes of bfloat16
# All compile for the H100 without spills.
CANDIDATES = {
    "forward": {
        64: [Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 2)],
        128: [Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)],
    },
    "dq": {
        64: [Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 3), Tiles(128, 128, 8, 2)],
        128: [Tiles(128, 64, 8, 2)],
    },
    "dkv": {
        64: [Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 3), Tiles(32, 128, 8, 3)],
        128: [Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 3)],
    },
}
SHAPES = ((8, 4096), (1, 32768))
WIDTH = 2048


def main() -> None:
    """Print a line a kernel, head size, shape and tiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--head", type=int, choices=(64, 128))
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    for K in [arguments.head] if arguments.head else (64, 128):
        for B, T in SHAPES:
            for kernel in CANDIDATES:
                compare(kernel, K, B, T, arguments.rounds)


def compare(kernel: str, K: int, B: int, T: int, rounds: int) -> None:
    """Print a line for each of a kernel's tiles."""
    torch.manual_seed(0)
    leaves = [
        torch.randn(B, T, WIDTH // K, K, dtype=torch.bfloat16, device="cuda").requires_grad_()
        for _ in range(3)
    ]
    y = attention(*leaves, plan=AttentionPlan(), backend="triton")
    call = forward if kernel == "forward" else partial(backward, y, torch.randn_like(y))
    used = TILES[kernel][ITEM][K]
    functions = {
        tiles: partial(with_tiles, kernel, K, tiles, partial(call, leaves))
        for tiles in (used, *CANDIDATES[kernel][K])
    }
    samples = timing.measure_interleaved(functions, rounds=rounds, device="cuda")
    for tiles, times in samples.items():
        line = f"{kernel:8} K {K} B {B} T {T} {tiles!s:55} {sorted(times)[len(times) // 2]:8.3f} ms"
        if tiles == used:
            line += " *"
        else:
            ratio = timing.speedup(times, samples[used])
            line += f"   x{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        print(line, flush=True)


def with_tiles(kernel: str, K: int, tiles: Tiles, call: partial) -> object:
    """The call, one kernel in other tiles."""
    with patch.dict(attention_kernel.TILES[kernel][ITEM], {K: tiles}):
        return call()


def forward(leaves: list[Tensor]) -> Tensor:
    """The forward pass, recording no graph."""
    with torch.no_grad():
        return attention(*leaves, plan=AttentionPlan(), backend="triton")


def backward(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The backward pass of a graph that stays: both kernels."""
    return torch.autograd.grad(y, leaves, dy, retain_graph=True)


if __name__ == "__main__":
    main()
