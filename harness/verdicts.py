"""Whether code has become slower: the one rule by which every check judges.

A cell is measured in pairs of processes, an old and a new one side by side; each process gives one
number, its median, since samples of one process are not independent. The ratio new / old is
estimated by Hodges and Lehmann from the paired log-ratios, its bounds by Wilcoxon's signed ranks
(Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3rd edition, section 3.3), 99 %
on each side by itself: exact for any noise that is as likely to meet either process of a pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import accumulate, zip_longest

import numpy as np

from harness.laws import Array
from harness.timing import excluded_means, means_of_pairs
from harness.worker import one_line

CONFIDENCE = 0.99  # of each bound by itself
FEWEST = 7  # processes a side; 2^-7 < 1 - CONFIDENCE: under seven pairs there is no such bound
LEAST_CHANGE = 0.05  # of the time: below it no change counts
FLOORS = 3  # times the noise of the cell against itself that a change must exceed
LEAST_MS = {"cpu": 0.05, "cuda": 0.002}  # a change below it does not count
# Cells whose time or noise is beyond these are watched: they stop somebody only by their bounds.
SHORTEST_MS = 0.01
NOISIEST = 0.05
TIMES_MS = (1e-9, 1e9)  # what can be a time, or a ratio of two
DRAWS = 2000  # of signs or halves, for the noise of a cell against itself


class Verdict(StrEnum):
    """What became of a cell; the worst first."""

    REGRESSION = "REGRESSION"
    FAILED = "FAILED"
    MISSING = "MISSING"
    INCONCLUSIVE = "INCONCLUSIVE"
    TRACK_ONLY = "TRACK-ONLY"
    NEW = "NEW"
    IMPROVEMENT = "IMPROVEMENT"
    SAME = "SAME"


RED = frozenset({Verdict.REGRESSION, Verdict.FAILED, Verdict.MISSING})
# Verdicts that say something about a cell's speed.
GATING = frozenset({Verdict.REGRESSION, Verdict.IMPROVEMENT, Verdict.SAME, Verdict.INCONCLUSIVE})


@dataclass(frozen=True, kw_only=True)
class Change:
    """The ratio new / old of a cell's time.

    Attributes:
        ratio: its estimate; 1.1 is ten per cent slower.
        low: it lies above this with `CONFIDENCE`.
        high: and below this.
        processes: on each side.
    """

    ratio: float
    low: float
    high: float
    processes: int


def change(old: Sequence[float], new: Sequence[float]) -> Change:
    """The change from paired medians of processes, in milliseconds.

    Raises:
        ValueError: fewer than `FEWEST` pairs, not as many on both sides, or a number that no time
            can be.
    """
    if len(old) != len(new):
        raise ValueError(f"{len(old)} processes are no pairs with {len(new)}")
    before, after = _logs(old), _logs(new)
    return _between(
        means_of_pairs(after - before), excluded_means(len(old), 1 - CONFIDENCE), len(old)
    )


def shift(old: Sequence[float], new: Sequence[float]) -> Change:
    """The change from processes of different days: their differences, bounded by rank sums.

    Hollander, Wolfe and Chicken, as above, section 4.3.

    Raises:
        ValueError: as `change`, but for the pairs.
    """
    differences = np.subtract.outer(_logs(new), _logs(old)).ravel()
    return _between(differences, _excluded_differences(len(old), len(new)), min(len(old), len(new)))


def _logs(values: Sequence[float]) -> Array:
    if len(values) < FEWEST:
        raise ValueError(f"{len(values)} processes: a verdict needs {FEWEST} on each side")
    for value in values:
        if (why := invalid(value)) is not None:
            raise ValueError(why)
    return np.log(np.asarray(values, float))


def _between(logs: Array, outside: int, processes: int) -> Change:
    """The middle of some log-ratios, and those that so many lie outside of."""
    found = np.sort(logs)
    estimate, low, high = (
        math.exp(x) for x in (np.median(found), found[outside], found[-1 - outside])
    )
    return Change(ratio=estimate, low=low, high=high, processes=processes)


@cache
def _excluded_differences(m: int, n: int) -> int:
    """How many of the sorted differences lie outside the bound on each side.

    The largest c with P(Mann and Whitney's U <= c) <= 1 - CONFIDENCE, counting arrangements.
    """
    # ways[j][u]: arrangements of i old and j new with so many inversions u
    ways = [[1] for _ in range(n + 1)]
    for i in range(1, m + 1):
        grown = [[1]]
        for j in range(1, n + 1):
            longer = [0] * i + grown[j - 1]
            grown.append([a + b for a, b in zip_longest(ways[j], longer, fillvalue=0)])
        ways = grown
    allowed = (1 - CONFIDENCE) * math.comb(m + n, m)
    return sum(total <= allowed for total in accumulate(ways[n])) - 1


def invalid(value: object) -> str | None:
    """Why a value can be no time in milliseconds; None where it can."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{value!r} is no time"
    if not TIMES_MS[0] <= value <= TIMES_MS[1]:  # NaN is not either
        return f"{one_line(repr(value), 40)} ms is no time"
    return None


def limit(ms: float, floor: float | None, device: str) -> float:
    """The ratio that a change of a cell of so many milliseconds must exceed to count.

    Args:
        ms: the old time.
        floor: the noise of the cell against itself, as a share of its time; None: not known.
        device: "cpu" or "cuda".
    """
    return 1 + max(LEAST_CHANGE, FLOORS * (floor or 0.0), LEAST_MS[device] / ms)


def tracked_only(ms: float, floor: float | None, device: str) -> str | None:
    """Why a cell of this time and noise is watched only; None where its ratio is enough."""
    if ms < SHORTEST_MS:
        return f"under {1e3 * SHORTEST_MS:g} µs"
    if floor is not None and floor > NOISIEST:
        return f"noise {floor:.1%} against itself"
    return None


def verdict(found: Change, limit: float, *, watched: bool = False) -> Verdict:
    """What a change means, where only ratios beyond `limit` count.

    Args:
        found: the change.
        limit: as of the function of that name.
        watched: whether the cell is short or noisy: its lower bound must exceed `limit` too.
    """
    if watched and not found.low > limit:
        return Verdict.TRACK_ONLY
    if found.low > 1 and found.ratio > limit:
        return Verdict.REGRESSION
    if found.high < 1 and found.ratio < 1 / limit:
        return Verdict.IMPROVEMENT
    # A change that counts is not excluded.
    if found.high > limit or found.low < 1 / limit:
        return Verdict.INCONCLUSIVE
    return Verdict.SAME


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """0: nothing is slower; 1: something is, or is not there; 3: nothing could be compared."""
    found = set(verdicts)
    if found <= {Verdict.NEW, Verdict.MISSING}:  # no cell in common, or none at all
        return 3
    if found & RED:
        return 1
    return 0 if found & GATING - {Verdict.INCONCLUSIVE} else 3


def pair_noise(old: Sequence[float], new: Sequence[float]) -> float:
    """How far `change` of such pairs strays, 95 times in 100, for code against itself, a share.

    It is estimated in two ways, and the smaller one counts: from the pairs, about their own change,
    where new code that is erratic adds to it; and from the old processes alone, neighbours as
    pairs, where drift from one pair to the next adds to it. Where neither does, the smaller of two
    is a fifth too small in the middle of many draws (12 pairs, normal noise).

    Args:
        old: times of processes in order.
        new: times of the processes beside them.
    """
    before, after = _logs(old), _logs(new)
    differences = after - before
    about = differences - np.median(means_of_pairs(differences))
    alone = before[1::2] - before[: len(before) // 2 * 2 : 2]  # half as many: sqrt(2) as far
    strayed = (_strayed(about), _strayed(alone) * math.sqrt(len(alone) / len(before)))
    return math.expm1(min(strayed))


def _strayed(differences: Array) -> float:
    """How far the estimate strays, 95 times in 100, if each may have either sign."""
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (DRAWS, len(differences)))
    found = np.median(means_of_pairs(signs * differences), axis=1)  # (draws,)
    return float(np.quantile(np.abs(found), 0.95))


def shift_noise(values: Sequence[float]) -> float:
    """How far `shift` strays, 95 times in 100, between random halves of the processes."""
    logs, generator = _logs(values), np.random.default_rng(0)
    half = len(logs) // 2
    found = []
    for _ in range(DRAWS):
        drawn = generator.permutation(logs)
        found.append(np.median(np.subtract.outer(drawn[half:], drawn[:half])))
    return math.expm1(float(np.quantile(np.abs(found), 0.95)))
