"""Laws of the losses of studies: by context length, parameters, tokens and compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.learned import Point, Study
from harness.loss_laws import (
    FEWEST_SIZES,
    IsoFlop,
    JointLaw,
    LossLaw,
    isoflop,
    joint_law,
    loss_law,
)
from harness.points import TooFewPointsError
from harness.report import number
from harness.sweep import in_order

FEWEST = 4  # points of a law with a floor
ALIKE = 1.1  # largest over least training FLOPs of runs of one compute budget

# What a study's runs have in common that a law along it lets vary.
ALONG = {"context length": (), "parameters": ("size",), "tokens": ("tokens",)}


@dataclass(frozen=True, eq=False)  # laws hold arrays
class Fitted:
    """A law of one architecture, or why there is none.

    Attributes:
        arch: the architecture.
        along: "context length", "parameters", "tokens", "parameters and tokens", or "compute".
        held: what all its points have in common, in words.
        points: how many.
        law: None where there are too few points, or no seed that all have.
        reason: why there is none.
    """

    arch: str
    along: str
    held: str
    points: int
    law: LossLaw | JointLaw | IsoFlop | None = None
    reason: str = ""


def length_law(study: Study, arch: str) -> Fitted | None:
    """Loss against context length in a study; None where it has fewer than two lengths."""
    points = [point for point in study.finished if point.arch == arch]
    return _fitted(arch, "context length", _said(study, "size", "tokens"), points)


def laws(found: Sequence[Study]) -> list[Fitted]:
    """All laws of the losses of studies, along what has two points or more.

    Of compute only where a budget has three sizes, jointly only where there are runs enough.
    """
    losses = [study for study in found if study.kind == "loss"]
    made: list[Fitted | None] = []
    for study in losses:
        made += [length_law(study, arch) for arch in study.archs]
    archs = in_order(arch for study in losses for arch in study.archs)
    for arch in archs:
        for along, held in (("parameters", ("T", "tokens")), ("tokens", ("T", "size"))):
            for members in _alike(losses, arch, ALONG[along]):
                said = _said(members[0][0], *held, point=members[0][1])
                made.append(_fitted(arch, along, said, [point for _, point in members]))
        for members in _alike(losses, arch, ("size", "tokens")):
            said = _said(members[0][0], "T", point=members[0][1])
            points = [point for _, point in members]
            made += [_joint(arch, said, points), _compute(arch, said, points)]
    return [fitted for fitted in made if fitted is not None]


def _alike(
    losses: Sequence[Study], arch: str, but: tuple[str, ...]
) -> Iterable[list[tuple[Study, Point]]]:
    """Points of an architecture that differ in what the names of common say, and in no more."""
    found: dict[Any, list[tuple[Study, Point]]] = {}
    for study in losses:
        common = {k: str(v) for k, v in study.common.items() if k not in (*but, "batch", "size")}
        for point in study.finished:
            if point.arch == arch:
                size = None if "size" in but else point.size
                key = (*common.items(), size, point.seq_len, point.batch)
                found.setdefault(key, []).append((study, point))
    return found.values()


def _fitted(arch: str, along: str, held: str, points: list[Point]) -> Fitted | None:
    x = [_place(point, along) for point in points]
    if len(set(x)) < 2:
        return None
    if len(set(x)) < FEWEST:
        reason = f"no law: {len(set(x))} of {FEWEST} points"
        return Fitted(arch, along, held, len(x), reason=reason)
    return _attempt(Fitted(arch, along, held, len(x)), points, lambda losses: loss_law(x, losses))


def _joint(arch: str, held: str, points: list[Point]) -> Fitted | None:
    """The law of parameters and tokens; None where there are too few runs."""
    params, tokens = ([_place(p, along) for p in points] for along in ("parameters", "tokens"))
    try:
        return _attempt(
            Fitted(arch, "parameters and tokens", held, len(points)),
            points,
            lambda losses: joint_law(params, tokens, losses),
        )
    except TooFewPointsError:
        return None


def _compute(arch: str, held: str, points: list[Point]) -> Fitted | None:
    """The best size of each compute budget that has sizes enough; None where none has."""
    known = sorted(
        (point for point in points if point.mean_of("train_flops") > 0),
        key=lambda point: point.mean_of("train_flops"),
    )
    budgets: list[list[Point]] = []
    for point in known:
        if budgets and point.mean_of("train_flops") <= ALIKE * budgets[-1][0].mean_of(
            "train_flops"
        ):
            budgets[-1].append(point)
        else:
            budgets.append([point])
    budgets = [of for of in budgets if len({point.size for point in of}) >= FEWEST_SIZES]
    if not budgets:
        return None
    kept = [point for of in budgets for point in of]
    compute = [
        math.exp(sum(math.log(p.mean_of("train_flops")) for p in of) / len(of))
        for of in budgets
        for _ in of
    ]
    params = [_place(point, "parameters") for point in kept]
    return _attempt(
        Fitted(arch, "compute", held, len(kept)),
        kept,
        lambda losses: isoflop(compute, params, losses),
    )


def _attempt(
    without: Fitted, points: list[Point], fit: Callable[[list[list[float]]], Any]
) -> Fitted:
    """The law of the losses of the seeds that all points have."""
    values = [point.best.values for point in points if point.best is not None]
    seeds = sorted(set.intersection(*map(set, values)))
    about = (without.arch, without.along, without.held, without.points)
    if not seeds:
        return Fitted(*about, reason="no law: no seed finished at all points")
    return Fitted(*about, law=fit([[of_seed[seed] for seed in seeds] for of_seed in values]))


def _place(point: Point, along: str) -> float:
    if along == "context length":
        return float(point.seq_len)
    return point.mean_of("params" if along == "parameters" else "tokens")


def _said(study: Study, *names: str, point: Point | None = None) -> str:
    common = study.common
    words = {
        "size": str(point.size if point else common["size"]),
        "tokens": f"{number(common['tokens'])} tokens",
        "T": f"T = {point.seq_len:,}" if point else "",
    }
    return ", ".join(words[name] for name in names)
