"""Model sizes: a width, or a parameter count that every architecture is matched to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archs import LanguageModel
    from harness.record import Case

TOLERANCE = 0.01  # a matched size misses its target by at most this share
DEPTH = 2  # blocks of a model whose size is a width
WIDTH = re.compile(
    r"d(?P<width>[1-9]\d*)(?:h(?P<head_dim>[1-9]\d*))?(?:n(?P<d_state>[1-9]\d*))?"
    r"(?:l(?P<depth>[1-9]\d*))?"
)
MLP_STEP = 8  # MLP widths are multiples of this


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What the solver may choose for an architecture, and its customary proportions."""

    variants: tuple[dict[str, int], ...] = ({},)  # further `Config` fields, best first
    width_step: float  # widths are multiples of this, times the head size if there is one
    aspect: float  # customary width over depth
    mlp_ratio: float | None = None  # customary MLP width over width; None: no MLP


HEADS = ({"head_dim": 64}, {"head_dim": 32})

# Proportions of GPT-2 small and Llama's SwiGLU (2302.13971); Mamba-2 130M, whose inner width is
# twice D (2405.21060); RWKV-7 0.1B (2503.14456); Hyena 153M (2302.10866).
SCALING: dict[str, Scaling] = {
    "transformer": Scaling(variants=HEADS, width_step=1, aspect=64, mlp_ratio=8 / 3),
    "mamba2": Scaling(
        variants=(*HEADS, *({**heads, "d_state": 64} for heads in HEADS)),
        width_step=0.5,
        aspect=32,
    ),
    "rwkv7": Scaling(variants=HEADS, width_step=1, aspect=64, mlp_ratio=4),
    "hyena": Scaling(width_step=16, aspect=48, mlp_ratio=4),
}


@dataclass(frozen=True)
class Shape:
    """Width, depth and further `Config` fields of a model."""

    width: int
    depth: int
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SizeMatch:
    """A shape whose parameter count comes near a target, and by how much it misses."""

    arch: str
    shape: Shape
    params: int
    residual: float  # params / target - 1


def parse_size(size: str) -> tuple[str, int]:
    """("width", 256) for "d256", also "d256h128n64l4", ("params", 1000000) for "1M".

    Raises:
        ValueError: anything else.
    """
    if match := WIDTH.fullmatch(size):
        return "width", int(match["width"])
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([KMB])", size):
        return "params", round(float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[match[2]])
    raise ValueError(f"unknown size {size!r}: write d256 for a width or 1M for matched parameters")


def width_fields(size: str) -> dict[str, int]:
    """The `Config` fields that a width gives beside it: "d64h16n8" has heads of 16, N = 8."""
    match = WIDTH.fullmatch(size)
    found = match.groupdict() if match else {}
    return {name: int(found[name]) for name in ("head_dim", "d_state") if found.get(name)}


def shape_of(
    arch: str, size: str, vocab_size: int = 256, fields: Mapping[str, Any] | None = None
) -> Shape:
    """The shape that a case's `size` names, with further `Config` fields of its blocks.

    Where it is a width, the depth is `DEPTH`, for a hybrid rounded up to whole patterns, unless it
    says another: "d64l4" has four blocks.

    Raises:
        ValueError: no such size, or a depth that a hybrid's pattern does not divide.
    """
    from archs.model import expand_pattern

    fields = dict(fields or {})
    what, number = parse_size(size)
    if what == "params":
        return match_sizes(number, [arch], vocab_size=vocab_size, fields=fields)[arch].shape
    pattern = len(expand_pattern(arch))
    match = WIDTH.fullmatch(size)
    depth = pattern * math.ceil(DEPTH / pattern)
    if match and match["depth"]:
        depth = len(expand_pattern(arch, int(match["depth"])))
    return Shape(number, depth, width_fields(size) | fields)


def model_of(case: Case, shape: Shape, vocab_size: int, max_len: int) -> LanguageModel:
    """The model of a case in float32 on the CPU, its weights drawn from the seed."""
    import torch

    from archs import build_model

    torch.manual_seed(case.seed)
    return build_model(
        case.arch,
        width=shape.width,
        depth=shape.depth,
        vocab_size=vocab_size,
        max_len=max_len,
        backend=case.backend,
        options={case.arch: shape.fields} if shape.fields else None,
    )


def match_sizes(
    target_params: int,
    archs: Sequence[str] = tuple(SCALING),
    *,
    vocab_size: int = 256,
    fields: Mapping[str, Any] | None = None,
) -> dict[str, SizeMatch]:
    """The shapes at which architectures have `target_params` parameters, embedding and head too.

    Among all shapes within 1 % of the target the one nearest the architecture's customary
    proportions is taken; the residual mismatch is in the result. `fields` of the blocks' `Config`
    are held.

    Raises:
        ValueError: an architecture without a row in `SCALING`, or a target no shape comes near.
    """
    held = tuple(sorted((fields or {}).items()))
    return {arch: _match(arch, target_params, vocab_size, held) for arch in archs}


@cache
def _match(arch: str, target: int, vocab_size: int, held: tuple[tuple[str, Any], ...]) -> SizeMatch:
    if arch not in SCALING:
        raise ValueError(f"no row for {arch!r} in harness.sizes.SCALING: give a width, as d256")
    for fields in SCALING[arch].variants:
        near = [
            (strangeness, match)
            for strangeness, match in _candidates(arch, target, vocab_size, fields | dict(held))
            if abs(match.residual) <= TOLERANCE
        ]
        if near:
            return min(near, key=lambda pair: pair[0])[1]
    raise ValueError(f"no {arch} within 1 % of {target} parameters: choose another size")


def _candidates(
    arch: str, target: int, vocab_size: int, fields: Mapping[str, Any]
) -> Iterator[tuple[float, SizeMatch]]:
    """Shapes near the target, each with its distance from customary proportions."""
    row = SCALING[arch]
    step = round(row.width_step * fields.get("head_dim", 1))
    # Blocks have 6 to 12 D^2 parameters: this lies near the width of customary proportions.
    middle = (target * row.aspect / 10) ** (1 / 3)
    for width in range(step, math.ceil(2 * middle) + step, step):
        if width < middle / 2:
            continue
        for depth in range(1, 1 + math.ceil(4 * width / row.aspect)):
            strangeness = abs(math.log(width / depth / row.aspect))
            params = _params(arch, width, depth, vocab_size, **fields)
            extra = {}
            if row.mlp_ratio is not None:
                customary = MLP_STEP * round(row.mlp_ratio * width / MLP_STEP)
                params, more = (
                    _params(arch, width, depth, vocab_size, mlp_width=m, **fields)
                    for m in (customary, customary + MLP_STEP)
                )
                steps = round((target - params) / (more - params))
                params += steps * (more - params)
                mlp_width = customary + steps * MLP_STEP
                if not customary / 2 <= mlp_width <= 2 * customary:
                    continue
                strangeness += abs(math.log(mlp_width / customary))
                extra = {"mlp_width": mlp_width}
            shape = Shape(width, depth, {**fields, **extra})
            yield strangeness, SizeMatch(arch, shape, params, params / target - 1)


def _params(arch: str, width: int, depth: int, vocab_size: int, **fields: Any) -> int:
    """Parameters of a model: only a stack's first block may differ from the others."""
    first, later, norm = _block_params(arch, width, **fields)
    return 2 * vocab_size * width + first + (depth - 1) * later + norm


@cache
def _block_params(arch: str, width: int, **fields: Any) -> tuple[int, int, int]:
    """Parameters of the first block, of any later one, and of the norm before the head."""
    import torch

    from archs import build_block

    with torch.device("meta"):
        blocks = [build_block(arch, width=width, layer_index=i, depth=2, **fields) for i in (0, 1)]
        modules = (*blocks, blocks[0].final_norm())
    first, later, norm = (sum(p.numel() for p in module.parameters()) for module in modules)
    return first, later, norm
