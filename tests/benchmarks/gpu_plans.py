"""Kernels in every plan that an operation could choose: does it choose the fastest?

    python tests/benchmarks/gpu_plans.py [--rounds 40] [--op ssd]

Needs a GPU. Operations in bfloat16 at the sizes of their blocks, forward and backward: SSD and
WKV-7 in numbers of segments, the long convolution in splits of the batch and both precisions,
attention on both paths (forward) and, in decoding, in splits of the keys. Each shape's plans are
interleaved in random order, and each is compared with the one that the operation's own `plan`
chooses, marked *: the ratio of times, above 1 where the choice is slower, with a 95 % interval
(`timing.speedup`).
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archs.hyena import HyenaConfig
from archs.mamba2 import Mamba2Config
from archs.ops import attention, long_conv, ssd, wkv7
from archs.ops.attention import AttentionPlan
from archs.ops.attention_hopper_kernel import refusal
from archs.ops.long_conv import LongConvPlan
from archs.ops.long_conv_tables import TILE_TOKENS
from archs.ops.plan import Plan
from archs.rwkv7 import RWKV7Config
from archs.transformer import TransformerConfig
from harness import timing
from harness.op_inputs import AttentionOp, LongConvOp, Op, SSDOp, Tensors, WKV7Op

DTYPE = torch.bfloat16
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
# A batch is split where channels are few; of a split transform only the precision is a choice.
LONG_CONV_SHAPES = (
    (16, 2048, 2048),
    (8, 4096, 2048),
    (8, 2048, 256),
    (8, 2048, 64),
    (4, 8192, 2048),
    (1, 32768, 2048),
)
ATTENTION_SHAPES = ((16, 2048, 2048), (8, 4096, 2048), (1, 32768, 2048))
DECODE_SHAPES = ((64, 4096, 2048), (8, 32768, 2048), (1, 4096, 2048), (1, 131072, 2048))
SEGMENTS = (1, 2, 4, 8, 16, 32)
LEAST_TOKENS = 512  # a segment
SPLITS = (1, 2, 4, 8)
KEY_SPLITS = (1, 2, 4, 8, 16, 32, 64)


class DecodeOp(AttentionOp):
    """Attention of one query to T keys."""

    def inputs(self, B: int, T: int, randn: Callable[..., Tensor]) -> Tensors:
        """One query, T keys and values."""
        return self.token(B, T - 1, randn)


class Subject(NamedTuple):
    """An operation, and the plans and shapes in which it is timed."""

    op: Callable[[int], Op]  # of a width; twice Mamba-2's is heads
    operation: Callable[..., Any]
    plan: Callable[..., Any]  # of the inputs
    plans: Callable[[Tensors], set[Any]]
    shapes: tuple[tuple[int, int, int], ...]
    phases: tuple[str, ...] = ("forward", "backward")


def of_shape(plan: Callable[..., Any], name: str) -> Callable[[Tensors], Any]:
    """The plan for inputs, by the shape of one of them."""
    return lambda inputs: plan(tuple(inputs[name].shape), device="cuda")


def attention_plan(inputs: Tensors) -> AttentionPlan:
    """The plan that attention chooses."""
    q, k = inputs["q"], inputs["k"]
    return attention.plan(tuple(q.shape), (k.shape[1], k.shape[2]), "cuda")


def segments(inputs: Tensors) -> set[Plan]:
    """Plans of an operation that walks the sequence."""
    T = next(iter(inputs.values())).shape[1]
    return {Plan(n) for n in SEGMENTS if n == 1 or n * LEAST_TOKENS <= T}


def splits(inputs: Tensors) -> set[LongConvPlan]:
    """Plans of the long convolution."""
    B, _, T = inputs["u"].shape
    numbers = [n for n in SPLITS if n <= B] if T <= TILE_TOKENS else [1]
    return {LongConvPlan(n, p) for n in numbers for p in ("accurate", "fast")}


def paths(inputs: Tensors) -> set[AttentionPlan]:
    """Plans of attention over a whole sequence."""
    reason = refusal(*inputs.values())
    if reason:
        print(f"attention: no path hopper: {reason}")
    return {AttentionPlan()} | (set() if reason else {AttentionPlan("hopper")})


def key_splits(inputs: Tensors) -> set[AttentionPlan]:
    """Plans of attention of one query."""
    return {AttentionPlan("decode", n) for n in KEY_SPLITS if n * 64 <= inputs["k"].shape[1]}


def of_attention(head_dim: int) -> Subject:
    """Attention with heads of a size."""
    return Subject(
        lambda width: AttentionOp(TransformerConfig(width=width, head_dim=head_dim), DTYPE),
        attention.attention,
        attention_plan,
        paths,
        ATTENTION_SHAPES,
        ("forward",),  # the backward pass is the same whatever the path
    )


OPS = {
    "attention64": of_attention(64),
    "attention128": of_attention(128),
    "decode": Subject(
        lambda width: DecodeOp(TransformerConfig(width=width, head_dim=128), DTYPE),
        attention.attention,
        attention_plan,
        key_splits,
        DECODE_SHAPES,
        ("forward",),
    ),
    "ssd": Subject(
        lambda width: SSDOp(Mamba2Config(width=width), DTYPE),
        ssd.ssd,
        of_shape(ssd.plan, "x"),
        segments,
        SHAPES,
    ),
    "wkv7": Subject(
        lambda width: WKV7Op(RWKV7Config(width=width), DTYPE),
        wkv7.wkv7,
        of_shape(wkv7.plan, "r"),
        segments,
        SHAPES,
    ),
    "long_conv": Subject(
        lambda width: LongConvOp(HyenaConfig(width=width), DTYPE),
        long_conv.long_conv,
        of_shape(partial(long_conv.plan, dtype=DTYPE), "u"),
        splits,
        LONG_CONV_SHAPES,
    ),
}


def main() -> None:
    """Print a line a shape, phase and plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--op", choices=OPS)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, {DTYPE}")
    for name in [arguments.op] if arguments.op else OPS:
        for B, T, width in OPS[name].shapes:
            compare(name, B, T, width, arguments.rounds)


def compare(name: str, B: int, T: int, width: int, rounds: int) -> None:
    """Print a line a phase and plan."""
    subject = OPS[name]
    op = subject.op(width)
    torch.manual_seed(0)
    inputs = op.inputs(B, T, partial(torch.randn, device="cuda"))
    chosen = subject.plan(inputs)
    plans = subject.plans(inputs) | {chosen}
    for phase in subject.phases:
        timed = forward if phase == "forward" else backward
        functions = {
            p: timed(op, inputs, partial(subject.operation, plan=p)) for p in sorted(plans)
        }
        samples = timing.measure_interleaved(functions, rounds=rounds, device="cuda")
        for p, times in samples.items():
            middle = sorted(times)[len(times) // 2]
            variant = " ".join(f"{field} {value}" for field, value in p._asdict().items())
            line = f"{name} B {B} T {T} width {width} {phase:8} {variant:27} {middle:8.3f} ms"
            if p == chosen:
                line += " *"
            else:
                ratio = timing.speedup(times, samples[chosen])
                line += f"   x{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            print(line, flush=True)


def forward(op: Op, inputs: Tensors, operation: Callable[..., Any]) -> Callable[[], Tensor]:
    """A forward pass that records no graph."""
    return torch.no_grad()(lambda: op.run(inputs, "triton", operation))


def backward(
    op: Op, inputs: Tensors, operation: Callable[..., Any]
) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass of a graph that stays."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = op.run(leaves, "triton", operation)
    return partial(
        torch.autograd.grad, y, list(leaves.values()), torch.randn_like(y), retain_graph=True
    )


if __name__ == "__main__":
    main()
