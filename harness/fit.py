"""How a measured quantity grows with sequence length: exponents, laws, crossovers, departures.

Every function takes lengths and samples. The samples of a length are the repeated values of one
process, or a list of such arrays, one a process; a single number stands for an exact count. A
length's value is the median of its samples, over processes the geometric mean of their medians.

Intervals are 95 %, by the standard error of a bootstrap. Where there are several processes these
are resampled, whole, and Student's t allows for how few they are: a process's own median already
carries the noise of its samples, and resampling those again would count it twice (Davison & Hinkley
1997, section 3.8). Of one process its samples are resampled, and the interval holds for that
process only.

All raise `TooFewPointsError` under four lengths (`local_exponents` and `departures`: two), and
ValueError for lengths that do not increase, or a length or value that is not positive and finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.laws import FEWEST, Array, Growth
from harness.points import Exponent, Points

REACH = 8.0  # how far beyond the longest length laws are drawn on to look for a crossing
# Intervals by which two curves must differ on both sides of a crossing: a curve against itself, at
# eight lengths, must not cross.
CLEAR = 1.5
ROUNDING = 1e-9  # least noise, in log: exact counts may touch
CLIFF = 0.1  # least distance from the neighbours' law, in log, that is called a cliff
DEPARTURE = 0.15  # least difference of local exponents that is called a departure


@dataclass(frozen=True)
class Crossover:
    """Where the smaller of two curves becomes the larger.

    Attributes:
        verdict: "in range": the curves differ beyond noise on both sides; "extrapolated": their
            laws, drawn on, meet; "none in range": one is smaller throughout; "cannot separate":
            noise hides whether they cross.
        length: of the last crossing, None where there is none.
        low: of its 95 % interval.
        high: likewise.
        smaller_after: 0 or 1, the curve that is smaller beyond the crossing, or throughout, or
            where the curves can be separated; None where by the longest length they have met again.
        crossings: how often the curves cross, beyond noise.
    """

    verdict: str
    length: float | None = None
    low: float | None = None
    high: float | None = None
    smaller_after: int | None = None
    crossings: int = 0


@dataclass(frozen=True)
class Cliff:
    """A point off the law of its neighbours, beyond noise."""

    length: float
    factor: float  # its value over what the neighbours let expect


@dataclass(frozen=True)
class Departure:
    """Neighbouring lengths over which the measured exponent is not the counted one."""

    first: float
    last: float
    measured: float  # exponents between these two lengths
    counted: float


def local_exponents(lengths: Sequence[float], samples: Sequence[Any]) -> list[Exponent]:
    """The exponent between each pair of neighbouring lengths."""
    points = Points(lengths, samples, fewest=2)
    return [points.exponent(slice(i, i + 2)) for i in range(len(lengths) - 1)]


def tail_exponent(lengths: Sequence[float], samples: Sequence[Any]) -> Exponent:
    """The least-squares exponent over the longer half of the lengths, at least three of them."""
    points = Points(lengths, samples)
    return points.exponent(points.tail)


def classify(lengths: Sequence[float], samples: Sequence[Any]) -> Growth:
    """Which of constant, n, n log n, n² and their sums in pairs the points allow."""
    return Points(lengths, samples).growth()


def crossover(lengths: Sequence[float], a: Sequence[Any], b: Sequence[Any]) -> Crossover:
    """The last length at which curves `a` and `b`, sampled at the same lengths, cross.

    Its interval holds the lengths around it at which the difference of the curves is within noise.
    """
    first, second = Points(lengths, a, seed=1), Points(lengths, b, seed=2)
    grid, inside = _grid(first.x)
    (one, variance), (other, another) = first.curve(grid), second.curve(grid)
    difference = one - other
    wider = max(first, second, key=lambda points: points.factor)
    noise = np.maximum(wider.scaled(np.sqrt(variance + another)), ROUNDING)
    clear = np.where(np.abs(difference) > CLEAR * noise, np.sign(difference), 0)
    changes = _changes(clear[:inside])
    verdict = "in range" if changes else "extrapolated"
    changes = changes or _changes(clear)[:1]
    if not changes:
        seen = clear[:inside][clear[:inside] != 0]
        if not seen.size or np.sign(difference[inside - 1]) == -seen[-1]:
            return Crossover("cannot separate")
        reversed_ = seen[-1] * difference[:inside] < -ROUNDING  # somewhere, within noise
        verdict = "cannot separate" if reversed_.any() else "none in range"
        return Crossover(verdict, smaller_after=_smaller(seen[-1]))
    left, right = changes[-1]
    end = np.sign(difference[right])
    shifted = [end * difference + shift for shift in (0, noise, -noise)]
    length, low, high = (_last_zero(grid, values, left, right) for values in shifted)
    if verdict == "extrapolated" and length <= first.x[-1]:
        return Crossover("cannot separate")
    met_again = verdict == "in range" and np.sign(difference[inside - 1]) != end
    after = None if met_again else _smaller(end)
    return Crossover(verdict, math.exp(length), math.exp(low), math.exp(high), after, len(changes))


def cliffs(lengths: Sequence[float], samples: Sequence[Any]) -> list[Cliff]:
    """The points that are off the law of their neighbours beyond noise.

    That law is the cubic in log space through the two lengths on each side: the two lengths at each
    end are not judged. The farthest off is taken out first, so that it does not blame its
    neighbours.
    """
    points, found = Points(lengths, samples), []
    left = list(range(len(lengths)))
    while True:
        worst: tuple[float, int] | None = None
        for at in range(2, len(left) - 2):
            i, near = left[at], [left[at + k] for k in (-2, -1, 1, 2)]
            weights = _lagrange(points.x[near], points.x[i])
            off = points.draws[:, i] - points.draws[:, near] @ weights
            beyond = abs(off[0]) > max(CLIFF, points.noise(off))
            if beyond and (worst is None or abs(off[0]) > abs(worst[0])):
                worst = float(off[0]), i
        if worst is None:
            return sorted(found, key=lambda cliff: cliff.length)
        found.append(Cliff(float(lengths[worst[1]]), math.exp(worst[0])))
        left.remove(worst[1])


def departures(
    lengths: Sequence[float], samples: Sequence[Any], counted: Sequence[float]
) -> list[Departure]:
    """Runs of lengths where the measured exponent differs from the counted one beyond noise.

    Neighbouring lengths are judged, and the tail as a whole where its last pair is not among them.
    `counted` is the quantity that should decide, at each length: FLOPs or bytes.
    """
    points, exact = Points(lengths, samples, fewest=2), Points(lengths, counted, fewest=2)

    def departs(part: slice) -> int:
        off = points.slopes(part) - exact.slopes(part)[0]
        known = abs(off[0]) > max(DEPARTURE, points.noise(off))
        return int(np.sign(off[0])) if known else 0

    signs = [departs(slice(i, i + 2)) for i in range(len(lengths) - 1)]
    bounds = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(signs)) if a != b), len(signs)]
    parts = [slice(a, b + 1) for a, b in pairwise(bounds) if signs[a]]
    if not signs[-1] and len(lengths) >= FEWEST and departs(points.tail):
        parts.append(points.tail)
    runs = [(points.exponent(part), exact.exponent(part)) for part in parts]
    return [Departure(run.first, run.last, run.value, law.value) for run, law in runs]


def _grid(x: Array) -> tuple[Array, int]:
    """Log lengths at which to look for a crossing, and how many of them are in range."""
    steps = 32
    between = [np.linspace(a, b, steps, endpoint=False) for a, b in pairwise(x)]
    beyond = np.linspace(x[-1], x[-1] + np.log(REACH), 2 * steps)
    return np.concatenate([*between, beyond]), steps * (len(x) - 1) + 1


def _changes(clear: NDArray[Any]) -> list[tuple[int, int]]:
    """Pairs of indices between which a sign changes to its opposite, with only zeros between."""
    known = np.flatnonzero(clear)
    turns = np.flatnonzero(np.diff(clear[known]))
    return [(int(known[i]), int(known[i + 1])) for i in turns]


def _last_zero(grid: Array, values: Array, left: int, right: int) -> float:
    """The place between two indices from which on `values` have the sign of the right one."""
    other = np.sign(values[left : right + 1]) != np.sign(values[right])
    i = left + int(np.flatnonzero(other)[-1])
    share = values[i] / (values[i] - values[i + 1])
    return float(grid[i] + share * (grid[i + 1] - grid[i]))


def _lagrange(x: Array, at: float) -> NDArray[Any]:
    """Weights of the values at `x` in the polynomial through them, at `at`."""
    return np.array([math.prod((at - b) / (a - b) for b in x if b != a) for a in x])


def _smaller(sign: float) -> int:
    """Which of two curves is smaller where the first minus the second has this sign."""
    return 0 if sign < 0 else 1
