"""How long a cell will take and how much memory, roughly, without running anything.

For `--dry-run`: analytic FLOPs, parameters and activations of blocks on the meta device, put into a
few constants that were measured on a two-core CPU with AVX-512. Expect a factor of 5 in time and
of 4 in memory there; elsewhere the order of magnitude. On a GPU give its own rate.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

import archs
from archs.block import Block, parameter_bytes, projection_flops, state_bytes
from archs.model import expand_pattern
from harness.record import Case
from harness.sizes import shape_of
from harness.workload import VOCAB_SIZE

# Rate of a mixer's counted FLOPs over that of matrix products: chunked recurrences do more than is
# counted (RWKV-7's partly in float64), FFTs are bound by memory. The rest: of a plug-in.
MIXER_EFFICIENCY = {"transformer": 0.7, "mamba2": 0.3, "rwkv7": 0.07, "hyena": 0.07}
PLUG_IN_EFFICIENCY = 0.1
BYTES_PER_S = 8e9  # of activations, of which every element-wise operation makes a pass
STEP_S = 3e-4  # Python and dispatch of one block's token
CALL_S = 1e-3  # likewise of one call of a block over a sequence
FIXED_S = 0.5  # of a cell: build, folds of the two checks, at least 0.3 s of timing
CORPUS_S = 3.0  # reading the sources to train on

BACKWARD = 2  # FLOPs and passes over those of forward
REFERENCE_BACKWARD = 4  # the recorded fold and its backward, over the fold
# Calls of a cell in all: warm-up, peak, at least 5 samples, and what the checks call.
CALLS = {"forward": 10, "backward": 14, "train_step": 12, "prefill": 13, "decode": 12}


@dataclass(frozen=True)
class Estimate:
    """A rough cost of a whole cell, two threads."""

    seconds: float  # build, two checks, warm-up, peak and timing
    bytes: int  # parameters, inputs, states and temporaries at their most


class _Shape(NamedTuple):
    """What the estimate reads of a case."""

    blocks: list[tuple[str, Block]]
    params: int
    new: int
    context: int


def estimate(case: Case, matmul_flops_per_s: float = 6e10) -> Estimate:
    """Time and memory of a cell; those of the `reference` backend are the roughest.

    Args:
        case: a cell of any kind; of a training run the longest that it may be.
        matmul_flops_per_s: rate of a large matrix product in the case's type, all threads.

    Raises:
        ValueError: an unknown architecture or size.
    """
    shape = _shape(case)
    call = _call_seconds(case, shape, matmul_flops_per_s)
    if case.kind != "cost":
        seconds = FIXED_S + CORPUS_S + (case.options["steps"] + 2) * call
    else:
        # Random weights and states, and their copies in float64.
        setup = shape.params / 1e7 + _states(case, shape) / 2e7
        seconds = FIXED_S + setup + max(0.3, 5 * call) + (CALLS[case.phase] - 5) * call
    return Estimate(seconds, _bytes(case, shape))


def _shape(case: Case) -> _Shape:
    size = shape_of(case.arch, case.size)
    new, context = (1, case.position or 0) if case.phase == "decode" else (case.seq_len or 1, 0)
    names = expand_pattern(case.arch, size.depth) if case.level == "model" else [case.arch]
    with torch.device("meta"):
        built = {
            name: archs.build_block(
                name, width=size.width, max_len=new + context + 1, **size.fields
            )
            for name in dict.fromkeys(names)
        }
    blocks = [(name, built[name]) for name in names]
    params = sum(p.numel() for _, block in blocks for p in block.parameters())
    ends = 2 * VOCAB_SIZE * size.width if case.level == "model" else 0
    return _Shape(blocks, params + ends if case.level != "op" else 0, new, context)


def _call_seconds(case: Case, shape: _Shape, rate: float) -> float:
    """One timed call."""
    new, context = shape.new, shape.context
    training = case.phase in ("backward", "train_step")
    seconds = 0.0
    for name, block in shape.blocks:
        mixer = block.mixer_flops(new, context) / MIXER_EFFICIENCY.get(name, PLUG_IN_EFFICIENCY)
        passes = _features(case, block) * case.batch * new * _itemsize(case) / BYTES_PER_S
        part = case.batch * mixer / rate + passes
        if case.level != "op":
            part += case.batch * projection_flops(block, new) / rate
            # The filter of Hyena; for decode, reading the weights.
            part += block.shared_flops(new, context) / (PLUG_IN_EFFICIENCY * rate)
        if case.phase == "decode":
            state = state_bytes(block, case.batch, context + 1, _dtype(case))
            read = state + (parameter_bytes(block) if case.level != "op" else 0)
            part += read / BYTES_PER_S + STEP_S
        elif case.backend == "reference":
            # A Python step a token; the fold's tensors lie in no cache.
            part = 3 * part + new * STEP_S
        else:
            part += CALL_S
        seconds += part
    if case.level == "model":
        seconds += 2 * case.batch * new * VOCAB_SIZE * _width(case) / rate
    if training:
        backward = REFERENCE_BACKWARD if case.backend == "reference" else BACKWARD
        seconds *= backward + (case.phase == "train_step")
    if case.phase == "train_step":
        seconds += 10 * shape.params * _itemsize(case) / BYTES_PER_S  # the optimiser
    return seconds


def _features(case: Case, block: Block) -> int:
    """Activations of a token that projections read and write; of an op, a few of the width."""
    if case.level == "op":
        return 4 * _width(case)
    return sum(sum(layer.weight.shape) for layer in block.projections())


def _bytes(case: Case, shape: _Shape) -> int:
    """Memory above that of the process."""
    tokens, item = case.batch * shape.new, _itemsize(case)
    features = [_features(case, block) for _, block in shape.blocks]
    logits = VOCAB_SIZE if case.level == "model" else 0
    training = case.phase in ("backward", "train_step")
    if training:
        activations = 2.5 * sum(features) + 4 * logits
        copies = 2 if case.phase == "backward" else 4  # gradients, and two moments
    else:
        activations = 1.5 * max(features) + logits
        copies = 1
    temporary = activations * tokens * item
    if case.backend == "reference" and training:
        temporary += _recorded(case, shape)
    workspace = 2**22
    if case.backend != "reference" and any(name != "transformer" for name, _ in shape.blocks):
        # Chunked forms and FFTs work on segments of up to tens of megabytes, whatever the length.
        workspace += min(2**25, 4 * temporary)
    return round(copies * shape.params * item + temporary + workspace + 2 * _states(case, shape))


def _recorded(case: Case, shape: _Shape) -> float:
    """What the graph of a fold keeps: a recurrent state a token, or a token's whole past."""
    total = 0.0
    for _, block in shape.blocks:
        state = state_bytes(block, case.batch, shape.new, _dtype(case))
        grows = state > state_bytes(block, case.batch, 1, _dtype(case))
        total += state * shape.new * (0.25 if grows else 2)
    return total


def _states(case: Case, shape: _Shape) -> int:
    """Bytes of the states that the call takes or returns."""
    if case.phase not in ("prefill", "decode"):
        return 0
    length = shape.new + shape.context
    return sum(state_bytes(b, case.batch, length, _dtype(case)) for _, b in shape.blocks)


def _dtype(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)


def _itemsize(case: Case) -> int:
    return _dtype(case).itemsize


def _width(case: Case) -> int:
    return shape_of(case.arch, case.size).width
