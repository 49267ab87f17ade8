"""Laws of growth: constant, n, n log n, n² and their sums in pairs, fitted to points in log space.

Sums need positive coefficients. Laws are weighed by Akaike's criterion, corrected for few points,
with the variance counted as a parameter (Burnham & Anderson 2002, section 2.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EVIDENCE = 10.0  # ratio of Akaike weights from which one law counts as better than another
FEWEST = 4  # points of a fit: two more than the parameters of one term
# No law is trusted to come nearer to the points than this: no clock sees such a term.
CLOSEST = 5e-3
FARTHEST = 4.0  # times the least misfit: a law farther from the points is not plausible

LAWS = {
    "1": lambda n: np.ones_like(n),
    "n": lambda n: n,
    "n log n": lambda n: n * np.log(n),
    "n²": lambda n: n**2,
}  # slower growth first


@dataclass(frozen=True)
class Law:
    """A sum of at most two terms with positive coefficients."""

    terms: tuple[str, ...]  # of `LAWS`, slower growth first
    coefficients: tuple[float, ...]
    misfit: float  # root mean square of the log residuals
    aicc: float  # Akaike's information criterion, corrected for few points

    @property
    def spread(self) -> float:
        """Its misfit, no better than `CLOSEST`."""
        return math.hypot(self.misfit, CLOSEST)

    @property
    def name(self) -> str:
        """In words, as "c + n"."""
        return " + ".join(map(_shown, self.terms))

    def __call__(self, lengths: Any) -> Array:
        """The law's value at each length."""
        n = np.asarray(lengths, dtype=float)
        parts = [c * LAWS[t](n) for c, t in zip(self.coefficients, self.terms, strict=True)]
        return np.sum(parts, axis=0)


@dataclass(frozen=True)
class Growth:
    """Which laws some points allow.

    Attributes:
        laws: all that were fitted, best first.
    """

    laws: tuple[Law, ...]

    @cached_property
    def _near(self) -> list[Law]:
        """Those within `FARTHEST` of the nearest: few points favour one term beyond reason."""
        least = min(law.spread for law in self.laws)
        return [law for law in self.laws if law.spread <= FARTHEST * least]

    @cached_property
    def plausible(self) -> tuple[Law, ...]:
        """The laws within `EVIDENCE` of the best, best first, but none far off the points.

        A sum is left out where one of its terms alone is as likely or more.
        """
        kept: list[Law] = []
        for law in self._near:
            alone = {other.terms[0] for other in kept if len(other.terms) == 1}
            if _evidence(self._near[0], law) < EVIDENCE and not alone & {*law.terms}:
                kept.append(law)
        return tuple(kept)

    @property
    def law(self) -> Law:
        """The best of the plausible laws."""
        return self.plausible[0]

    @property
    def leading(self) -> tuple[str, ...]:
        """The leading terms that are plausible; several: they cannot be separated."""
        found = {law.terms[-1] for law in self.plausible}
        return tuple(term for term in LAWS if term in found)

    @property
    def evidence_ratio(self) -> float | None:
        """Akaike weight of `law` over that of the best law with another leading term, if any."""
        rivals = [law for law in self._near if law.terms[-1] != self.law.terms[-1]]
        return _evidence(self.law, rivals[0]) if rivals else None

    @property
    def name(self) -> str:
        """In words: "n", "c + n² or n + n²", or "cannot separate n, n log n"."""
        if len(self.leading) > 1:
            return f"cannot separate {', '.join(map(_shown, self.leading))}"
        return " or ".join(law.name for law in self.plausible)


def fitted(lengths: tuple[float, ...], logs: Array) -> Growth:
    """Every law that the number of points allows: sums need five.

    Args:
        lengths: at least `FEWEST`, increasing.
        logs: logarithm of the value at each.
    """
    laws = _alone(lengths, logs)
    if len(lengths) > FEWEST:
        laws += _in_pairs(lengths, logs)
    return Growth(tuple(sorted(laws, key=lambda law: law.aicc)))


def simplest(lengths: tuple[float, ...], counts: Sequence[float]) -> Law:
    """The law of exact counts: the nearest one term within 2 x `CLOSEST`, else the nearest sum."""
    logs = np.log(np.asarray(counts, dtype=float))
    best = min(_alone(lengths, logs), key=lambda law: law.misfit)
    if best.misfit <= 2 * CLOSEST:
        return best
    return min(_in_pairs(lengths, logs), key=lambda law: law.misfit)


def _alone(lengths: tuple[float, ...], logs: Array) -> list[Law]:
    return [_law((term,), (1.0,), np.array(lengths), logs) for term in positive_terms(lengths)]


def positive_terms(lengths: Sequence[float]) -> list[str]:
    """The terms that are positive at every length."""
    return [term for term in LAWS if term != "n log n" or lengths[0] > 1]


def _in_pairs(lengths: tuple[float, ...], logs: Array) -> list[Law]:
    centred = logs - logs.mean()
    laws = []
    for terms, (ratios, curves) in _sums(lengths).items():
        ratio = ratios[np.argmin(np.sum((curves - centred) ** 2, axis=1))]
        laws.append(_law(terms, (1.0, float(ratio)), np.array(lengths), logs))
    return laws


@cache
def _sums(lengths: tuple[float, ...]) -> dict[tuple[str, str], tuple[Array, Array]]:
    """For each pair of terms: ratios of their coefficients, and the centred log curves of these."""
    n = np.array(lengths)
    found = {}
    for low, high in combinations(positive_terms(lengths), 2):
        a, b = LAWS[low](n), LAWS[high](n)
        span = np.log(a / b)
        # From the one term being a thousandth of the other everywhere to the reverse.
        ratios = np.exp(np.linspace(span.min() - 7, span.max() + 7, 1500))
        curves = np.log(a + ratios[:, None] * b)
        found[low, high] = ratios, curves - curves.mean(axis=1, keepdims=True)
    return found


def _law(terms: tuple[str, ...], ratios: tuple[float, ...], n: Array, logs: Array) -> Law:
    """The law of terms in given ratios, its scale by least squares."""
    residuals = logs - np.log(Law(terms, ratios, 0, 0)(n))
    scale, variance = float(np.exp(residuals.mean())), float(residuals.var())
    m, k = len(n), len(terms) + 1
    correction = 2 * k * (k + 1) / (m - k - 1) if m > k + 1 else math.inf
    aicc = m * math.log(variance + CLOSEST**2) + 2 * k + correction
    return Law(terms, tuple(scale * r for r in ratios), variance**0.5, aicc)


def _evidence(better: Law, worse: Law) -> float:
    """The ratio of their Akaike weights."""
    return float(np.exp(np.clip((worse.aicc - better.aicc) / 2, -700, 700)))


def _shown(term: str) -> str:
    return "c" if term == "1" else term
