"""Measured points in log space, and what their noise allows to be said: the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import norm, t

from harness.laws import FEWEST, Array, Growth, fitted

DRAWS = 1000  # of the bootstrap
CONFIDENCE = 0.95
# Of the samples of one process: a bootstrap's error of a median is too large for few of them by
# just what Student's t would add (coverage 94.5 to 95.5 % for 5 to 40 samples).
NORMAL = float(norm.ppf((1 + CONFIDENCE) / 2))
SHORTEST_TAIL = 3  # points


class TooFewPointsError(ValueError):
    """There are too few lengths for a fit; the message says how many it takes."""


@dataclass(frozen=True)
class Exponent:
    """The slope of log(value) over log(length) between two lengths, with its 95 % interval."""

    value: float
    low: float | None  # None: where a length was not repeated there is no interval
    high: float | None
    first: float  # the lengths it holds between
    last: float


class Points:
    """Checked points in log space, and bootstrap draws of them.

    Args:
        lengths: increasing strictly.
        samples: of each length: a number, an array, or a list of arrays, one a process.
        fewest: lengths that are needed.
        seed: of the draws; curves that are compared need seeds of their own.

    Attributes:
        lengths: as given.
        x: their logarithms.
        centre: log value at each: the mean over processes of the log of their median.
        processes: the least number of processes of a length.
        factor: standard errors in half an interval; 0 for exact counts, one number a length;
            infinite where some length was not repeated, so that its noise is unknown.

    Raises:
        TooFewPointsError: too few lengths.
        ValueError: lengths not increasing, or a length or value not positive and finite.
    """

    def __init__(
        self, lengths: Sequence[float], samples: Sequence[Any], fewest: int = FEWEST, seed: int = 0
    ) -> None:
        n = np.asarray(lengths, dtype=float)
        if n.ndim != 1 or len(n) != len(samples) or np.any(np.diff(n) <= 0):
            raise ValueError("lengths must increase strictly and match the samples one to one")
        self._samples = [_processes(of_length) for of_length in samples]
        values = [n, *(values for of_length in self._samples for values in of_length)]
        if not all(v.size and np.all(np.isfinite(v)) and np.all(v > 0) for v in values):
            raise ValueError("lengths and values must be positive and finite, at least one each")
        if len(n) < fewest:
            raise TooFewPointsError(f"a fit needs at least {fewest} lengths, got {len(n)}")
        self.lengths = tuple(n.tolist())
        self.x = np.log(n)
        medians = [[np.log(np.median(v)) for v in of_length] for of_length in self._samples]
        self.centre = np.array([float(np.mean(m)) for m in medians])
        self._counts = [len(of_length) for of_length in self._samples]
        self.processes = min(self._counts)
        self.factor = self._factor(several=max(self._counts) > 1)
        self._seed = seed

    def _factor(self, several: bool) -> float:
        sizes = [of_length[0].size for of_length in self._samples]
        units = self.processes if several else min(sizes)
        if units == 1:
            return math.inf if several or max(sizes) > 1 else 0.0
        if not several:
            return NORMAL
        # Student's t, and a bootstrap's error of few units is too small.
        return float(t.ppf((1 + CONFIDENCE) / 2, units - 1)) * (units / (units - 1)) ** 0.5

    @cached_property
    def draws(self) -> Array:
        """(1 + DRAWS, points) log values: the points themselves, then one row a draw."""
        generator = np.random.default_rng(self._seed)
        alike = len(set(self._counts)) == 1
        # One choice for all lengths: what a process does to all of them is no noise of a slope.
        chosen = generator.integers(self.processes, size=(DRAWS, self.processes))
        columns = []
        for of_length in self._samples:
            if len(of_length) == 1:
                values = of_length[0]
                picks = generator.integers(values.size, size=(DRAWS, values.size))
                columns.append(np.log(np.median(values[picks], axis=1)))
                continue
            logs = np.array([np.log(np.median(values)) for values in of_length])
            if not alike:
                chosen = generator.integers(len(logs), size=(DRAWS, len(logs)))
            columns.append(logs[chosen].mean(axis=1))
        return np.vstack([self.centre, np.column_stack(columns)])

    @property
    def tail(self) -> slice:
        """The longer half of the lengths, at least `SHORTEST_TAIL`."""
        return slice(-max(SHORTEST_TAIL, (len(self.x) + 1) // 2), None)

    def growth(self) -> Growth:
        """The laws fitted to the points."""
        return fitted(self.lengths, self.centre)

    def slopes(self, part: slice) -> Array:
        """The least-squares slope over some of the points: theirs, then one a draw."""
        x = self.x[part] - self.x[part].mean()
        return self.draws[:, part] @ (x / (x @ x))

    def exponent(self, part: slice) -> Exponent:
        """The slope over some of the points, with its interval."""
        slopes = self.slopes(part)
        value, ends = float(slopes[0]), self.lengths[part]
        if self.factor in (0, math.inf):
            return Exponent(value, None, None, ends[0], ends[-1])
        half = self.noise(slopes)
        return Exponent(value, value - half, value + half, ends[0], ends[-1])

    def noise(self, statistic: Array) -> float:
        """Half the interval of a statistic: its value at the points, then one a draw."""
        return self.scaled(float(statistic[1:].std(ddof=1)))

    def scaled(self, error: Any) -> Any:
        """Half an interval, of standard errors."""
        return error * self.factor if self.factor < math.inf else error + math.inf

    def curve(self, grid: Array) -> tuple[Array, Array]:
        """The points as a curve on a grid of log lengths, and the variance of that.

        Between two lengths it runs through its points with the bend of the best law; beyond the
        longest along that law, as uncertain as the tail.
        """
        law = self.growth().law
        values = np.log(law(np.exp(grid)))
        values += np.interp(grid, self.x, self.centre - np.log(law(self.lengths)))
        weights = np.column_stack([np.interp(grid, self.x, unit) for unit in np.eye(len(self.x))])
        tail = self.x[self.tail] - self.x[self.tail].mean()
        weights[:, self.tail] += np.outer(np.maximum(grid - self.x[-1], 0), tail / (tail @ tail))
        covariance = np.cov(self.draws[1:], rowvar=False)
        return values, np.einsum("gi,ij,gj->g", weights, covariance, weights)


def _processes(samples: Any) -> list[Array]:
    """The samples of one length as a list of arrays, one a process."""
    several = isinstance(samples, list | tuple | np.ndarray) and np.ndim(samples[:1]) > 1
    return [
        np.atleast_1d(np.asarray(values, dtype=float))
        for values in (samples if several else [samples])
    ]
