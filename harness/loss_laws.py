"""How loss falls with context length, parameters, tokens or compute: laws with a floor, isoFLOP.

`loss_law` fits L = E + A·x^-alpha (Kaplan et al. 2020, arXiv 2001.08361, with a floor), `joint_law`
fits L = E + A·N^-alpha + B·D^-beta (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3), and
`isoflop` finds the best size of each compute budget by a parabola (section 3.2 there).

**Fit.** Huber loss of log residuals, each seed's own shift of the whole curve taken out, bounded
Levenberg-Marquardt from a grid of starts, to convergence: the published fit stopped short
(Besiroglu et al. 2024, arXiv 2404.10102). Huber's threshold there is 1e-3; here that is the least,
and otherwise 1.345 times the noise, estimated with the law ("proposal 2", Huber 1964): 1e-3 against
noise of 1 % is least absolute deviation, which has 64 % of the efficiency where noise is normal.

**Intervals** are 95 % and their unit is the seed. Three seeds have ten distinct resamples, and
percentiles of fits to these cover the true exponent 73 % of the time (6 lengths, noise of 1 %). So
the bootstrap of seeds is applied to what is linear in the seeds: for a supposed value of one
parameter the others are fitted, and each seed's residuals are projected on what a change of that
parameter would do and the others could not make up for. The supposed value is in the interval where
the mean of these scores over seeds is not told from 0. The standard error that a bootstrap over
seeds has for a mean, corrected for few seeds by n/(n-1), is s/√n, so that no draws are needed;
Student's t with n-1 degrees of freedom is the rule of `harness.points`, too. These are Neyman's
orthogonal scores (1959) and Rao's test (1948) with the seeds as clusters. Nothing is assumed of how
the errors of one seed are correlated along its curve, and an interval may be lopsided, or end at a
bound. Pooling the errors of all points would nearly halve the intervals of three seeds, but holds
only where the points of a seed have nothing in common.

Under three seeds there is no interval. What runs cannot determine at all is refused, what they
determine badly is flagged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from harness.laws import Array
from harness.points import CONFIDENCE, TooFewPointsError

EXPONENTS = (0.01, 4.0)  # bounds; beyond 4 a law that doubles x is its first point and a floor
FEWEST_SEEDS = 3  # of an interval
RISES = "does not fall with"  # begins a flag
LEAST_THRESHOLD = 1e-3  # of Huber's loss, in log; Hoffmann et al. 2022, section 3.3
EFFICIENT = 1.345  # Huber's threshold over the noise: 95 % efficient for normal noise
CLIPPED = 0.7102  # mean of min(z², EFFICIENT²) for normal z
ROUNDING = 1e-9  # least noise of a seed, in log
WIDE = 3.0  # high over low from which an exponent counts as not determined
FLOORS = (0.0, 0.5, 0.9)  # starts of E, of the least loss
STARTS = (0.05, 0.2, 0.5, 1.0, 2.0)  # of each exponent
KEPT = 4  # of the starts, after a few steps
ROUNDS = 4  # of fit and noise
CONVERGED = 1e-10  # largest step
REACH = (0.05, 1000.0)  # how near and far an end is looked for, in linear half intervals
STEPS = 20  # values tried on a side of an interval, twice
TINY = 1e-30  # instead of 0 in a denominator
LARGEST = 100.0  # log of a term in a step that goes astray
LARGEST_LOG = 700.0  # of a float
FEWEST_SIZES = 3  # of a parabola
FEWEST_BUDGETS = 3  # of a power law of optima


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; `low` and `high` are None where that is not available."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class LossLaw:
    """L = E + A·x^-alpha.

    Attributes:
        floor: E, in the unit of the losses, from 0.
        scale: A, likewise; the fall at x = 1, mostly far outside the points.
        exponent: alpha, within `EXPONENTS`.
        residuals: (points, seeds) log of loss over law.
        flags: in plain words, what the points do not determine; empty for a sound fit.
        seeds: of each point.
    """

    floor: Interval
    scale: Interval
    exponent: Interval
    residuals: Array
    flags: tuple[str, ...]
    seeds: int

    @property
    def falls(self) -> bool:
        """Whether the losses fall with x: where they do not, the law describes nothing."""
        return not any(flag.startswith(RISES) for flag in self.flags)

    def __call__(self, x: Any) -> Array:
        """The law's loss at each x."""
        x = np.asarray(x, dtype=float)
        return self.floor.value + self.scale.value * x**-self.exponent.value


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class JointLaw:
    """L = E + A·N^-alpha + B·D^-beta, with N parameters and D tokens.

    Attributes:
        floor: E, in the unit of the losses, from 0.
        params_scale: A.
        params_exponent: alpha, within `EXPONENTS`.
        tokens_scale: B.
        tokens_exponent: beta, within `EXPONENTS`.
        residuals: (runs, seeds) log of loss over law.
        flags: in plain words, what the runs do not determine; empty for a sound fit.
        seeds: of each run.
    """

    floor: Interval
    params_scale: Interval
    params_exponent: Interval
    tokens_scale: Interval
    tokens_exponent: Interval
    residuals: Array
    flags: tuple[str, ...]
    seeds: int

    def __call__(self, params: Any, tokens: Any) -> Array:
        """The law's loss at each pair of parameters and tokens."""
        params, tokens = np.asarray(params, dtype=float), np.asarray(tokens, dtype=float)
        return (
            self.floor.value
            + self.params_scale.value * params**-self.params_exponent.value
            + self.tokens_scale.value * tokens**-self.tokens_exponent.value
        )

    @property
    def optimal_exponent(self) -> float:
        """The power of compute with which the best size grows, where C is proportional to N·D."""
        alpha, beta = self.params_exponent.value, self.tokens_exponent.value
        return beta / (alpha + beta)


@dataclass(frozen=True)
class Budget:
    """The best size of one compute budget, at the vertex of a parabola in log N.

    Attributes:
        compute: in FLOPs.
        params: the best size, None where the parabola has no vertex within the sizes tried.
        coefficients: of the parabola loss = c₀ + c₁·log N + c₂·log² N.
        flags: in plain words, what is wrong with the optimum; empty for a sound one.
    """

    compute: float
    params: Interval | None
    coefficients: tuple[float, float, float]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class IsoFlop:
    """The best size of each compute budget, and its power law N = k·C^a.

    Attributes:
        budgets: by rising compute.
        scale: k, None where under `FEWEST_BUDGETS` budgets have a sound optimum.
        exponent: a, likewise.
        flags: those of the budgets, and why there is no power law.
        seeds: of each run.
    """

    budgets: tuple[Budget, ...]
    scale: Interval | None
    exponent: Interval | None
    flags: tuple[str, ...]
    seeds: int


def loss_law(x: Sequence[float], losses: Sequence[Sequence[float]]) -> LossLaw:
    """Fits L = E + A·x^-alpha.

    Args:
        x: context length, parameters, tokens or compute of each point, in any order.
        losses: of each point, the loss of each seed; seeds in the same order at every point.

    Raises:
        TooFewPointsError: under four distinct x.
        ValueError: an x or a loss that is not positive and finite, or points whose seeds differ.
    """
    runs = _Runs([x], losses)
    _refuse(len(set(np.asarray(x, dtype=float))), 4, "distinct x", "a law with a floor")
    fit = _Fit(runs)
    (floor, scale, exponent), flags = fit.intervals, fit.flags([("alpha", "x")])
    return LossLaw(floor, scale, exponent, fit.residuals, flags, runs.seeds)


def joint_law(
    params: Sequence[float], tokens: Sequence[float], losses: Sequence[Sequence[float]]
) -> JointLaw:
    """Fits L = E + A·N^-alpha + B·D^-beta.

    Args:
        params: N of each run.
        tokens: D of each run.
        losses: of each run, the loss of each seed; seeds in the same order at every run.

    Raises:
        TooFewPointsError: under six distinct pairs (N, D), or under three values of N or of D.
        ValueError: a number that is not positive and finite, or runs whose seeds differ.
    """
    runs = _Runs([params, tokens], losses)
    for values, name in ((params, "parameter counts"), (tokens, "token counts")):
        _refuse(len(set(np.asarray(values, dtype=float))), 3, f"distinct {name}", "a joint law")
    pairs = set(zip(params, tokens, strict=True))
    _refuse(len(pairs), 6, "distinct pairs of parameters and tokens", "a joint law")
    fit = _Fit(runs)
    floor, a, b, alpha, beta = fit.intervals
    flags = fit.flags([("alpha", "parameters"), ("beta", "tokens")])
    return JointLaw(floor, a, alpha, b, beta, fit.residuals, flags, runs.seeds)


def isoflop(
    compute: Sequence[float], params: Sequence[float], losses: Sequence[Sequence[float]]
) -> IsoFlop:
    """The best size of each compute budget, and how it grows with compute.

    Parabolas are fitted by least squares, and their vertices have Fieller's interval over seeds.
    The power law leaves out budgets that have no vertex within the sizes tried, or whose bend is
    within noise. A vertex is off where the curve is lopsided, which is flagged and which no
    interval shows: the exponent is spared only where the sizes tried lie around the optimum alike
    in all budgets.

    Args:
        compute: FLOPs of each run; runs of equal compute form a budget.
        params: N of each run.
        losses: of each run, the loss of each seed; seeds in the same order at every run.

    Raises:
        TooFewPointsError: a budget with under three sizes.
        ValueError: a number that is not positive and finite, or runs whose seeds differ.
    """
    runs = _Runs([compute, params], losses)
    budgets, optima, flags = [], [], []
    for budget in sorted(set(np.asarray(compute, dtype=float))):
        members = np.asarray(compute, dtype=float) == budget
        found, optimum = _best_size(budget, runs.logs[members, 1], np.exp(runs.y[members]))
        budgets.append(found)
        flags += [f"{budget:.3g} FLOPs: {flag}" for flag in found.flags]
        if optimum is not None:
            optima.append((math.log(budget), optimum))
    if len(optima) < FEWEST_BUDGETS:
        reason = f"no power law: {len(optima)} sound optima, it takes {FEWEST_BUDGETS}"
        return IsoFlop(tuple(budgets), None, None, (*flags, reason), runs.seeds)
    x = np.array([at for at, _ in optima])
    design = np.column_stack([np.ones_like(x), x])
    by_seed = np.linalg.lstsq(design, np.array([optimum for _, optimum in optima]), rcond=None)[0]
    scale, exponent = _of_mean(by_seed[0]), _of_mean(by_seed[1])
    return IsoFlop(tuple(budgets), _mapped(scale, _exp), exponent, tuple(flags), runs.seeds)


def _best_size(compute: float, log_params: Array, losses: Array) -> tuple[Budget, Array | None]:
    """A budget's optimum, and the log optimum of each seed, None where there is none to be trusted.

    The mean of the latter is the former: a seed's own parabola may have no vertex, so its optimum
    is that of all seeds moved by what its slope there says.
    """
    sizes, seeds = len(set(log_params)), losses.shape[1]
    _refuse(sizes, FEWEST_SIZES, "sizes", f"a parabola at {compute:.3g} FLOPs")
    centre = float(log_params.mean())
    design = np.vander(log_params - centre, 4, increasing=True)
    by_seed = np.linalg.lstsq(design[:, :3], losses, rcond=None)[0]  # (3, seeds)
    c0, c1, c2 = map(float, by_seed.mean(axis=1))
    coefficients = (c0 - c1 * centre + c2 * centre**2, c1 - 2 * c2 * centre, c2)
    if c2 <= ROUNDING * c0:
        return Budget(compute, None, coefficients, ("the loss does not bend upwards",)), None
    vertex = -c1 / (2 * c2)
    if not log_params.min() < centre + vertex < log_params.max():
        return Budget(compute, None, coefficients, ("at the edge of the sizes tried",)), None
    params = Interval(math.exp(centre + vertex))
    optimum = centre + vertex - (by_seed[1] + 2 * by_seed[2] * vertex) / (2 * c2)
    if seeds < FEWEST_SEEDS:
        return Budget(compute, params, coefficients, ()), optimum
    ends = _fieller(by_seed[1], 2 * by_seed[2])
    if ends is None:
        flags = ("the bend is within the seeds' noise",)
        return Budget(compute, params, coefficients, flags), None
    params = _mapped(Interval(vertex, *ends), lambda end: _exp(centre + end))
    cubic = np.linalg.lstsq(design, losses, rcond=None)[0][3] / c0
    lopsided = sizes > FEWEST_SIZES and _told_from_zero(cubic, ROUNDING)
    flags = ("lopsided: the vertex is off the least loss",) if lopsided else ()
    return Budget(compute, params, coefficients, flags), optimum


def _fieller(intercepts: Array, slopes: Array) -> tuple[float, float] | None:
    """The interval of -mean(intercepts)/mean(slopes), None where it has no end (Fieller 1954)."""
    n = len(slopes)
    covariance = np.cov(intercepts, slopes) * _quantile(n - 1) ** 2 / n
    a = slopes.mean() ** 2 - covariance[1, 1]
    b = intercepts.mean() * slopes.mean() - covariance[0, 1]
    c = intercepts.mean() ** 2 - covariance[0, 0]
    if a <= 0:
        return None
    half = math.sqrt(max(b * b - a * c, 0.0)) / a
    return -b / a - half, -b / a + half


class _Runs:
    """Checked runs in log space.

    Attributes:
        logs: (points, terms) of what the loss falls with.
        y: (points, seeds) log losses.
        shift: (seeds,) what each seed adds to its whole curve, robustly; 0 on average.
        seeds: of each point.
    """

    def __init__(self, terms: list[Any], losses: Sequence[Sequence[float]]) -> None:
        columns = [np.asarray(term, dtype=float) for term in terms]
        if len({np.size(of_point) for of_point in losses}) != 1 or any(
            column.shape != (len(losses),) for column in columns
        ):
            raise ValueError(
                "every point needs its losses, of the same seeds at each:"
                " leave out a seed, or a point, that is not complete"
            )
        values = np.array([np.ravel(of_point) for of_point in losses], dtype=float)
        if not all(v.size and np.all(np.isfinite(v)) and np.all(v > 0) for v in (values, *columns)):
            raise ValueError(
                "losses, and what they fall with, must be positive and finite:"
                " leave out runs that diverged"
            )
        self.logs = np.log(np.column_stack(columns))
        self.y = np.log(values)
        self.seeds = values.shape[1]
        shift = np.median(self.y - np.median(self.y, axis=1, keepdims=True), axis=0)
        self.shift = shift - shift.mean()


class _Surface:
    """Huber's loss of log residuals, as a function of the parameters of a law of some terms.

    A parameter vector is (E, A of each term, alpha of each term). A term is A·exp(-alpha·logs); or,
    where `logged`, exp(A - alpha·logs), so that the first of its parameters is a logarithm.

    Args:
        y: (points, seeds) log losses, of level 0, without the seeds' shifts.
        shift: (seeds,) of the seeds.
        logs: (points, terms) of x; where centred, parameters are told apart best.
        logged: which terms' A are logarithms.
    """

    def __init__(self, y: Array, shift: Array, logs: Array, logged: Sequence[bool]) -> None:
        self.y, self._shift, self._logs = y, shift, logs
        self._logged = np.array(logged)
        self.threshold = math.inf
        below = [-math.inf if log else 0.0 for log in logged]
        low, high = EXPONENTS
        self._lower = np.array([0.0, *below, *(low for _ in logged)])
        self._upper = np.array([math.inf, *(math.inf for _ in logged), *(high for _ in logged)])

    def law(self, theta: Array) -> tuple[Array, Array]:
        """The law (…, points) and the derivatives of its logarithm (…, points, parameters)."""
        last = 1 + len(self._logged)
        scales, exponents = theta[..., None, 1:last], theta[..., None, last:]
        powers = np.where(self._logged, scales, 0.0) - exponents * self._logs
        powers = np.exp(np.minimum(powers, LARGEST))
        terms = np.where(self._logged, 1.0, scales) * powers
        law = np.maximum(theta[..., :1] + terms.sum(axis=-1), TINY)
        by = np.concatenate([np.ones_like(terms[..., :1]), powers, -self._logs * terms], axis=-1)
        return law, by / law[..., None]

    def off(self, theta: Array) -> Array:
        """(…, points, seeds) log residuals."""
        return self.y - np.log(self.law(theta)[0])[..., None]

    def descend(
        self, theta: Array, fixed: int | None = None, steps: int = 100
    ) -> tuple[Array, Array]:
        """Levenberg-Marquardt steps from each parameter vector: where they end, and their loss."""
        kept = np.arange(theta.shape[1]) == fixed
        damping = np.full((len(theta), 1), 1e-3)
        value, descent, curvature = self._normal(theta)
        for _ in range(steps):
            free = ~(kept | self._held(theta, descent))
            system = curvature * (free[:, :, None] & free[:, None, :])
            diagonal = np.einsum("gkk->gk", system)
            diagonal += np.where(free, damping * diagonal + TINY, 1.0)
            step = np.linalg.solve(system, (descent * free)[..., None])[..., 0]
            trial = np.clip(theta + np.clip(step, -3, 3), self._lower, self._upper)
            tried = self._normal(trial)
            better = tried[0] <= value
            moved = np.abs(trial - theta).max()
            theta = np.where(better[:, None], trial, theta)
            value = np.where(better, tried[0], value)
            descent = np.where(better[:, None], tried[1], descent)
            curvature = np.where(better[:, None, None], tried[2], curvature)
            damping = np.clip(damping * np.where(better, 0.2, 5.0)[:, None], 1e-12, 1e12)
            if moved < CONVERGED:
                break
        return theta, value

    def scores(self, theta: Array, k: int) -> tuple[Array, Array, Array]:
        """What the residuals say of parameter `k` that the others cannot account for.

        A parameter at a bound that it would cross accounts for nothing.
        Returns the (vectors, seeds) scores, their least standard error, and how much the mean score
        falls as the parameter grows.
        """
        by = self.law(theta)[1]
        off = self.off(theta)
        clipped = np.clip(off, -self.threshold, self.threshold)
        weights = self._weights(np.abs(off)).mean(axis=-1)
        across = np.swapaxes(by, -1, -2)
        held = self._held(theta, (across @ clipped.sum(axis=-1)[..., None])[..., 0])
        held[:, k] = True
        curvature = (across * weights[..., None, :]) @ by
        target = np.where(held, 0.0, curvature[..., k])
        system = curvature * (~held[:, :, None] & ~held[:, None, :])
        np.einsum("gkk->gk", system)[...] += np.where(held, 1.0, TINY)
        others = np.linalg.solve(system, target[..., None])
        direction = by[..., k] - (by @ others)[..., 0]  # (vectors, points)
        common = (direction * weights).sum(axis=-1)[:, None] * self._shift
        scores = (direction[:, None, :] @ clipped)[:, 0] + common
        information = (direction * weights * by[..., k]).sum(axis=-1)
        return scores, ROUNDING * np.linalg.norm(direction, axis=-1), information

    def interval(self, k: int, theta: Array) -> Interval:
        """Of parameter `k` of a fit: where the seeds' scores are not told from 0."""
        value, seeds = float(theta[k]), self.y.shape[1]
        if seeds < FEWEST_SEEDS:
            return Interval(value)
        scores, least, information = self.scores(theta[None], k)
        if information[0] < TINY:
            return Interval(value)
        half = _quantile(seeds - 1) * float(_error(scores, least)[0] / information[0])
        out = np.concatenate([[0.0], half * np.geomspace(*REACH, STEPS - 1)])
        values = np.clip(value + np.concatenate([-out, out]), self._lower[k], self._upper[k])
        starts = np.repeat(theta[None], len(values), axis=0)
        starts[:, k] = values
        term, terms = k - 1, len(self._logged)
        if 0 <= term < terms and self._logged[term]:
            # The term stays as it is at the x that is farthest from 1.
            logs = self._logs[:, term]
            starts[:, k + terms] += (values - value) / logs[np.abs(logs).argmax()]
            starts = np.clip(starts, self._lower, self._upper)
        # First which two values hold an end, then where between them it is.
        sides, found = self._first_told(starts, k, steps=40)
        between = [np.linspace(side[0], side[-1], STEPS) for side in sides]
        sides, _ = self._first_told(np.concatenate(between), k, steps=15)
        low, high = (float(side[:, k].mean()) for side in sides)
        if not found[0]:
            low = float(self._lower[k])
        if not found[1]:
            high = float(self._upper[k])
        return Interval(value, low, high)

    def _first_told(self, starts: Array, k: int, steps: int) -> tuple[list[Array], list[bool]]:
        """Which values of parameter `k`, on two sides from within outwards, hold an end.

        An end is where the scores first tell the value from the true one. Returns, for each side,
        the fits at the two values around it, or the first two, and whether there is an end.
        """
        ends, _ = self.descend(starts, fixed=k, steps=steps)
        scores, least, _ = self.scores(ends, k)
        told = _told_from_zero(scores, least)
        sides, found = [], []
        for fits, beyond in zip(np.split(ends, 2), np.split(told, 2), strict=True):
            first = max(int(np.argmax(beyond)), 1)
            sides.append(fits[first - 1 : first + 1])
            found.append(bool(beyond.any()))
        return sides, found

    def _normal(self, theta: Array) -> tuple[Array, Array, Array]:
        """Huber's loss, its descent direction and its curvature, for each parameter vector."""
        law, by = self.law(theta)
        off = self.y - np.log(law)[..., None]
        size = np.abs(off)
        clipped = np.minimum(size, self.threshold)
        value = (clipped * (size - clipped / 2)).sum(axis=(-2, -1))
        weights = self._weights(size).sum(axis=-1)
        scores = np.copysign(clipped, off).sum(axis=-1)
        across = np.swapaxes(by, -1, -2)
        descent = (across @ scores[..., None])[..., 0]
        return value, descent, (across * weights[..., None, :]) @ by

    def _weights(self, size: Array) -> Array:
        """Of residuals of some size in the least-squares problem that has the same solution."""
        return np.minimum(1.0, self.threshold / np.maximum(size, TINY))

    def _held(self, theta: Array, descent: Array) -> NDArray[Any]:
        """Which parameters are at a bound that they would cross."""
        low = (theta <= self._lower) & (descent < 0)
        return low | ((theta >= self._upper) & (descent > 0))


class _Fit:
    """The law E + sum of A·x^-alpha over terms, fitted to runs.

    Attributes:
        theta: (E, A of each term at the geometric mean of its x, alpha of each term), where E and A
            are shares of the losses' level.
        residuals: (points, seeds) log of loss over law.
    """

    def __init__(self, runs: _Runs) -> None:
        self._runs = runs
        self._terms = runs.logs.shape[1]
        self._level = float(runs.y.mean())
        self._centre = runs.logs.mean(axis=0)
        self._surface = self._seen()
        # Degrees of freedom: all losses less the law's parameters and the seeds' shifts.
        self._freedom = runs.y.size - (1 + 2 * self._terms) - (runs.seeds - 1)
        self._noise = math.inf
        self.theta = self._best()
        self.residuals = self._surface.off(self.theta) + runs.shift

    def _seen(self, raw: int | None = None) -> _Surface:
        """The surface over centred logs; of term `raw` as they are, with the logarithm of A."""
        logged = np.arange(self._terms) == raw
        y = self._runs.y - self._runs.shift - self._level
        logs = self._runs.logs - np.where(logged, 0.0, self._centre)
        return _Surface(y, self._runs.shift, logs, logged.tolist())

    @cached_property
    def intervals(self) -> list[Interval]:
        """Of E, of each A at x = 1, and of each alpha, in the unit of the losses."""
        floor = self._surface.interval(0, self.theta)
        scales = [self._scale(term) for term in range(self._terms)]
        exponents = range(1 + self._terms, len(self.theta))
        level = math.exp(self._level)
        return [
            _mapped(floor, lambda value: level * value),
            *(_mapped(scale, lambda log: level * _exp(log)) for scale in scales),
            *(self._surface.interval(k, self.theta) for k in exponents),
        ]

    def _scale(self, term: int) -> Interval:
        """The logarithm of a term's A at x = 1, over the level."""
        share, exponent = self.theta[1 + term], self.theta[1 + self._terms + term]
        if share == 0:
            return Interval(-math.inf)
        theta, surface = self.theta.copy(), self._seen(raw=term)
        theta[1 + term] = math.log(share) + exponent * self._centre[term]
        surface.threshold = self._surface.threshold
        return surface.interval(1 + term, theta)

    def flags(self, names: list[tuple[str, str]]) -> tuple[str, ...]:
        """What the runs do not determine, in words; `names` are of each term's exponent and x."""
        found = ["floor at its bound 0"] if self.theta[0] == 0 else []
        design = np.column_stack([np.ones(len(self._runs.y)), self._runs.logs - self._centre])
        slopes = np.linalg.lstsq(design, self._runs.y, rcond=None)[0][1:]
        for term, (exponent, x) in enumerate(names):
            k = 1 + self._terms + term
            if slopes[term].mean() >= -ROUNDING:
                found.append(f"{RISES} {x}")
            elif self._runs.seeds >= FEWEST_SEEDS and not _told_from_zero(slopes[term]):
                found.append(f"falls with {x} by no more than the seeds' noise")
            bounded = self.theta[k] in EXPONENTS
            if bounded:
                found.append(f"{exponent} at its bound {self.theta[k]:g}")
            low, high = self._range(k)
            if high > WIDE * low or (not bounded and {low, high} & set(EXPONENTS)):
                found.append(
                    f"ill-conditioned: E and {exponent} cannot be told apart"
                    f" ({exponent} from {low:.2g} to {high:.2g})"
                )
        return tuple(found)

    def _range(self, k: int) -> tuple[float, float]:
        """The exponent's interval; under three seeds, what the residuals say it is at least."""
        found = self.intervals[k]
        if found.low is not None and found.high is not None:
            return found.low, found.high
        information = self._surface.scores(self.theta[None], k)[2][0]
        error = self._noise / math.sqrt(max(information * self._runs.seeds, TINY))
        half = _quantile(self._freedom) * error
        low, high = np.clip([found.value - half, found.value + half], *EXPONENTS)
        return float(low), float(high)

    def _best(self) -> Array:
        """The best of many starts, with the noise estimated beside it."""
        losses = np.exp(self._surface.y.mean(axis=1))
        starts = [
            [floor, *[(losses.mean() - floor) / self._terms] * self._terms, *exponents]
            for floor in np.array(FLOORS) * losses.min()
            for exponents in product(STARTS, repeat=self._terms)
        ]
        theta, value = self._surface.descend(np.array(starts), steps=20)
        theta = theta[np.argsort(value)[:KEPT]]
        for _ in range(ROUNDS):
            theta, value = self._surface.descend(theta)
            self._noise = self._spread(theta[np.argmin(value)])
            self._surface.threshold = max(LEAST_THRESHOLD, EFFICIENT * self._noise)
        theta, value = self._surface.descend(theta)
        return theta[np.argmin(value)]

    def _spread(self, theta: Array) -> float:
        """The noise whose clipped residuals would have the variance that these have (Huber)."""
        squares = self._surface.off(theta) ** 2
        variance = squares.sum() / self._freedom
        for _ in range(50):
            clipped = np.minimum(squares, EFFICIENT**2 * variance).sum()
            variance = clipped / (self._freedom * CLIPPED)
        return math.sqrt(variance)


def _error(scores: Array, least: Array | float = 0.0) -> Array:
    """The standard error of the mean over seeds, the last axis."""
    return np.hypot(scores.std(axis=-1, ddof=1) / math.sqrt(scores.shape[-1]), least + TINY)


def _told_from_zero(by_seed: Array, least: Array | float = 0.0) -> NDArray[Any]:
    """Whether the 95 % interval of the mean over seeds, the last axis, leaves 0 out."""
    bound = _quantile(by_seed.shape[-1] - 1) * _error(by_seed, least)
    return np.abs(by_seed.mean(axis=-1)) > bound


def _of_mean(by_seed: Array) -> Interval:
    """The mean over seeds, with Student's interval."""
    value = float(by_seed.mean())
    if len(by_seed) < FEWEST_SEEDS:
        return Interval(value)
    half = _quantile(len(by_seed) - 1) * float(_error(by_seed))
    return Interval(value, value - half, value + half)


def _exp(log: float) -> float:
    return math.exp(log) if log < LARGEST_LOG else math.inf


def _mapped(interval: Interval, function: Callable[[float], float]) -> Interval:
    """A rising function of an interval; an infinite end is not available."""
    ends = [None if end is None else function(end) for end in (interval.low, interval.high)]
    finite = (end if end is not None and math.isfinite(end) else None for end in ends)
    return Interval(function(interval.value), *finite)


@cache
def _quantile(freedom: int) -> float:
    """Student's t, of both sides of a 95 % interval."""
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def _refuse(found: int, fewest: int, what: str, fit: str) -> None:
    if found < fewest:
        raise TooFewPointsError(f"{fit} needs at least {fewest} {what}, got {found}")
