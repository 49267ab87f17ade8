"""Hyena's two ways of decoding on the CPU: the mean time a token, by how many are generated.

    python tests/benchmarks/decode_modes.py [--tokens 16384] [--rounds 3]

A lazy token's time depends on how many twos divide its position, so no single position is timed:
sequences are decoded from their first token, by both modes, a window of tokens each in random
order. A mean covers all tokens up to a power of two. Printed is the median of the rounds with the
least and the most, and the local exponent, the slope from the line above on log axes. First the
long convolution alone, then the whole block. Filters and their spectra are formed before.
"""

import argparse
import math
import os
import random
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

import archs
from archs.hyena import HyenaBlock
from archs.ops.long_conv import long_conv_step
from archs.ops.long_conv_lazy import add_tiles, long_conv_lazy_step
from harness import timing

MODES = ("direct", "lazy")
SHORTEST = 1024  # a multiple of WINDOW
WINDOW = 256  # tokens that one mode decodes before the other's turn

Step = Callable[[int], None]  # decodes the token at a position
Means = dict[str, dict[int, float]]  # ms a token, by mode and length


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of the longest sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(
        timing.prepare_process(arguments.threads),
        f"torch {torch.__version__}, float32, width {arguments.width}, batch {arguments.batch}, "
        f"ms a token",
    )
    x = torch.randn(arguments.batch, WINDOW, arguments.width)
    blocks = {mode: build(mode, arguments.width, arguments.tokens) for mode in MODES}
    for name, begin in (("long convolution", operation_steps), ("block", block_steps)):
        sequences = [
            decode({mode: begin(block, x) for mode, block in blocks.items()}, arguments.tokens)
            for _ in range(arguments.rounds)
        ]
        report(name, sequences)


@torch.no_grad()
def build(mode: str, width: int, tokens: int) -> HyenaBlock:
    """A block whose filter is formed."""
    block = archs.build_block("hyena", width=width, max_len=tokens, decode=mode)
    block.filter.reversed_taps(1, record=False)
    if mode == "lazy":
        for exponent in range(int(math.log2(tokens))):
            block.filter.tile_filter(2**exponent, record=False)
    return block


def operation_steps(block: HyenaBlock, x: Tensor) -> Step:
    """A new sequence of the long convolution alone."""
    B, _, D = x.shape
    history = torch.zeros(B, D, block.config.max_len)
    pending, filter = torch.zeros_like(history), block.filter
    gated = {"pre_gate": torch.randn(B, D), "post_gate": torch.randn(B, D), "skip": torch.randn(D)}

    def tile_filters(size: int) -> Tensor:
        return filter.tile_filter(size, record=False)[0]

    def direct(t: int) -> None:
        taps = filter.reversed_taps(t + 1, record=False)[0]
        _, history[..., t] = long_conv_step(x[:, t % WINDOW], taps, history[..., :t], **gated)

    def lazy(t: int) -> None:
        tap = filter.reversed_taps(1, record=False)[0, :, 0]
        _, history[..., t] = long_conv_lazy_step(x[:, t % WINDOW], tap, pending[..., t], **gated)
        add_tiles(pending, history[..., : t + 1], t, tile_filters, backend="torch")

    return lazy if block.config.decode == "lazy" else direct


def block_steps(block: HyenaBlock, x: Tensor) -> Step:
    """A new sequence of the whole block."""
    state = block.init_state(len(x), block.config.max_len, device="cpu", dtype=x.dtype)

    def step(t: int) -> None:
        nonlocal state
        _, state, _ = block.step(x[:, t % WINDOW], state)

    return step


@torch.no_grad()
def decode(steps: dict[str, Step], tokens: int) -> Means:
    """Decode a sequence by every mode."""
    spent = dict.fromkeys(steps, 0.0)
    means: Means = {mode: {} for mode in steps}
    for first in range(0, tokens, WINDOW):
        end = first + WINDOW
        for mode in random.sample(list(steps), len(steps)):
            step, start = steps[mode], time.perf_counter()
            for t in range(first, end):
                step(t)
            spent[mode] += time.perf_counter() - start
            if end >= SHORTEST and end & (end - 1) == 0:
                means[mode][end] = 1e3 * spent[mode] / end
    return means


def report(name: str, sequences: list[Means]) -> None:
    """Print a table."""
    print(f"\n{name}\n tokens" + "".join(f"{mode:>8}{'exponent':>29}" for mode in MODES))
    before: dict[str, float] = {}
    for length in sequences[0][MODES[0]]:
        line = f"{length:7}"
        for mode in MODES:
            times = [means[mode][length] for means in sequences]
            middle = median(times)
            line += f"{middle:8.3f} [{min(times):.3f}, {max(times):.3f}]"
            slope = f"{math.log2(middle / before[mode]):.2f}" if mode in before else ""
            line += f"{slope:>13}"
            before[mode] = middle
        print(line, flush=True)


if __name__ == "__main__":
    main()
