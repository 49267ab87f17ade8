"""SSD's kernels in every number of segments that `plan` could choose: does it choose the fastest?

    python tests/benchmarks/gpu_plans.py [--rounds 40]

Needs a GPU. bfloat16 at Mamba-2's sizes, forward and backward; each shape's plans are interleaved
in random order, and each is compared with the one that `archs.ops.ssd.plan` chooses, marked *: the
ratio of times, above 1 where the choice is slower, with a 95 % interval (`timing.speedup`).
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from archs.mamba2 import Mamba2Config
from archs.ops.ssd import Plan, plan, ssd
from harness import timing
from harness.op_inputs import SSDOp, Tensors

# B, T, H: as h100-ops, and with fewer heads.
SHAPES = (
    (16, 2048, 64),
    (8, 4096, 64),
    (4, 8192, 64),
    (1, 32768, 64),
    (1, 8192, 64),
    (1, 32768, 16),
    (1, 131072, 16),
)
SEGMENTS = (1, 2, 4, 8, 16, 32)
LEAST_TOKENS = 512  # a segment


def main() -> None:
    """Print a line a shape, phase and plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, bfloat16")
    for B, T, H in SHAPES:
        # Twice the width is H heads of 64.
        op = SSDOp(Mamba2Config(width=32 * H), torch.bfloat16)
        torch.manual_seed(0)
        inputs = op.inputs(B, T, partial(torch.randn, device="cuda"))
        chosen = plan(tuple(inputs["x"].shape), "cuda")
        plans = {Plan(n) for n in SEGMENTS if n == 1 or n * LEAST_TOKENS <= T} | {chosen}
        for phase, timed in (("forward", forward), ("backward", backward)):
            functions = {p: timed(inputs, p) for p in sorted(plans)}
            samples = timing.measure_interleaved(functions, rounds=arguments.rounds, device="cuda")
            for p, times in samples.items():
                middle = sorted(times)[len(times) // 2]
                line = f"B {B} T {T} H {H} {phase:8} segments {p.segments:3} {middle:8.3f} ms"
                if p == chosen:
                    line += " *"
                else:
                    ratio = timing.speedup(times, samples[chosen])
                    line += f"   x{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
                print(line, flush=True)


def forward(inputs: Tensors, chosen: Plan) -> Callable[[], Tensor]:
    """A forward pass that records no graph."""
    return torch.no_grad()(lambda: ssd(**inputs, plan=chosen, backend="triton")[0])


def backward(inputs: Tensors, chosen: Plan) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass of a graph that stays."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = ssd(**leaves, plan=chosen, backend="triton")[0]
    return partial(
        torch.autograd.grad, y, list(leaves.values()), torch.randn_like(y), retain_graph=True
    )


if __name__ == "__main__":
    main()
