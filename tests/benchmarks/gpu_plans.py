"""Kernels in every number of segments that `plan` could choose: does it choose the fastest?

    python tests/benchmarks/gpu_plans.py [--rounds 40] [--op ssd]

Needs a GPU. SSD and WKV-7 in bfloat16 at the sizes of their blocks, forward and backward; each
shape's plans are interleaved in random order, and each is compared with the one that the
operation's own `plan` chooses, marked *: the ratio of times, above 1 where the choice is slower,
with a 95 % interval (`timing.speedup`).
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from archs.mamba2 import Mamba2Config
from archs.ops import ssd, wkv7
from archs.ops.plan import Plan
from archs.rwkv7 import RWKV7Config
from harness import timing
from harness.op_inputs import Op, SSDOp, Tensors, WKV7Op

# Of a width: the operation's inputs, and the module that plans. Twice Mamba-2's width is heads.
OPS = {
    "ssd": (lambda width: SSDOp(Mamba2Config(width=width), torch.bfloat16), ssd),
    "wkv7": (lambda width: WKV7Op(RWKV7Config(width=width), torch.bfloat16), wkv7),
}
# B, T, width: as h100-ops, and narrower.
SHAPES = (
    (16, 2048, 2048),
    (8, 4096, 2048),
    (4, 8192, 2048),
    (1, 32768, 2048),
    (1, 8192, 2048),
    (1, 32768, 512),
    (1, 131072, 512),
)
SEGMENTS = (1, 2, 4, 8, 16, 32)
LEAST_TOKENS = 512  # a segment


def main() -> None:
    """Print a line a shape, phase and plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--op", choices=OPS)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, bfloat16")
    for name in [arguments.op] if arguments.op else OPS:
        for B, T, width in SHAPES:
            compare(name, B, T, width, arguments.rounds)


def compare(name: str, B: int, T: int, width: int, rounds: int) -> None:
    """Print a line a phase and plan."""
    build, module = OPS[name]
    op = build(width)
    torch.manual_seed(0)
    inputs = op.inputs(B, T, partial(torch.randn, device="cuda"))
    chosen = module.plan(tuple(inputs[op.LIKE_Y].shape), "cuda")
    plans = {Plan(n) for n in SEGMENTS if n == 1 or n * LEAST_TOKENS <= T} | {chosen}
    for phase, timed in (("forward", forward), ("backward", backward)):
        functions = {p: timed(op, inputs, p) for p in sorted(plans)}
        samples = timing.measure_interleaved(functions, rounds=rounds, device="cuda")
        for p, times in samples.items():
            middle = sorted(times)[len(times) // 2]
            line = f"{name} B {B} T {T} width {width} {phase:8} segments {p.segments:3} "
            line += f"{middle:8.3f} ms"
            if p == chosen:
                line += " *"
            else:
                ratio = timing.speedup(times, samples[chosen])
                line += f"   x{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            print(line, flush=True)


def forward(op: Op, inputs: Tensors, chosen: Plan) -> Callable[[], Tensor]:
    """A forward pass that records no graph."""
    return torch.no_grad()(lambda: op.run(inputs, "triton", partial(operation(op), plan=chosen)))


def backward(op: Op, inputs: Tensors, chosen: Plan) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass of a graph that stays."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = op.run(leaves, "triton", partial(operation(op), plan=chosen))
    return partial(
        torch.autograd.grad, y, list(leaves.values()), torch.randn_like(y), retain_graph=True
    )


def operation(op: Op) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that an operation's inputs are for."""
    return ssd.ssd if isinstance(op, SSDOp) else wkv7.wkv7


if __name__ == "__main__":
    main()
