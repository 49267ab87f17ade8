import itertools
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from harness import verdicts
from harness.verdicts import Change, Verdict


def times(ratio=1.0, count=12, noise=0.01, seed=0, ms=10.0):
    generator = np.random.default_rng(seed)
    return list(ms * ratio * np.exp(noise * generator.standard_normal(count)))


def judge(old, new, floor=None, device="cpu"):
    return verdicts.verdict(verdicts.change(old, new), verdicts.limit(10.0, floor, device))


# Estimates and bounds


@pytest.mark.parametrize("estimate", [verdicts.change, verdicts.shift])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.2])
def test_a_ratio_is_estimated_and_bounded(estimate, ratio):
    found = estimate(times(seed=1), times(ratio, seed=2))
    assert found.ratio == pytest.approx(ratio, rel=0.01)
    assert found.low < ratio < found.high
    assert found.low == pytest.approx(ratio, rel=0.03)
    assert found.high == pytest.approx(ratio, rel=0.03)
    assert found.processes == 12


def test_the_estimate_of_pairs_is_the_median_of_means_of_pairs():
    """Of 28 means, 7 with the outlier; the 14th and 15th of the others are 3."""
    old, new = [1.0] * 7, [math.exp(x) for x in (0, 1, 2, 3, 4, 5, 20)]
    found = verdicts.change(old, new)
    assert found.ratio == pytest.approx(math.exp(3))
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(math.exp(20)))


@pytest.mark.parametrize("estimate", [verdicts.change, verdicts.shift])
def test_a_bound_fails_one_time_in_a_hundred(estimate):
    """With noise of heavy tails; paired differences are symmetric whatever the noise."""
    generator = np.random.default_rng(5)
    drawn = np.exp(0.05 * generator.standard_t(2, (3000, 2, 9)))
    above = sum(estimate(old, new).low > 1 for old, new in drawn)
    below = sum(estimate(old, new).high < 1 for old, new in drawn)
    # Binomial: mean at most 30, deviation 5.5.
    assert above <= 47
    assert below <= 47
    assert above + below >= 10  # and not for want of any power


@pytest.mark.parametrize(("m", "n"), [(7, 7), (7, 12), (12, 12), (24, 12)])
def test_bounds_of_days_are_those_of_mann_and_whitney(m, n):
    outside = verdicts._excluded_differences(m, n)

    def chance_of_at_most(u):
        # A sample of ranks whose statistic is u, without ties.
        ranks = list(range(n))
        for i in range(n):
            room = min(m, u - sum(r - j for j, r in enumerate(ranks)))
            ranks[n - 1 - i] += room
            if sum(r - j for j, r in enumerate(ranks)) == u:
                break
        old = [r for r in range(m + n) if r not in ranks]
        return mannwhitneyu(ranks, old, alternative="less", method="exact").pvalue

    assert chance_of_at_most(outside) <= 0.01 < chance_of_at_most(outside + 1)


def test_fewer_than_seven_processes_give_no_verdict():
    for estimate in (verdicts.change, verdicts.shift):
        with pytest.raises(ValueError, match="6 processes: a verdict needs 7 on each side"):
            estimate(times(count=6), times(count=6))
    with pytest.raises(ValueError, match="7 processes are no pairs with 8"):
        verdicts.change(times(count=7), times(count=8))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, 0.0, -1.0, None, "1", True])
def test_what_no_time_can_be_is_refused(value):
    assert verdicts.invalid(value)
    if isinstance(value, float):
        for old, new in ((times(), [*times()[1:], value]), ([*times()[1:], value], times())):
            for estimate in (verdicts.change, verdicts.shift):
                with pytest.raises(ValueError, match="is no time"):
                    estimate(old, new)


def test_a_time_is_a_time():
    assert verdicts.invalid(0.001) is None
    assert verdicts.invalid(3) is None


# Verdicts


@pytest.mark.parametrize(
    ("ratio", "noise", "floor", "verdict"),
    [
        (1.2, 0.01, None, Verdict.REGRESSION),
        (0.8, 0.01, None, Verdict.IMPROVEMENT),
        (1.0, 0.01, None, Verdict.SAME),
        (1.02, 0.01, None, Verdict.SAME),
        (1.2, 0.01, 0.08, Verdict.SAME),  # under three times the noise
        (1.2, 0.01, 0.05, Verdict.REGRESSION),
        (1.0, 0.2, None, Verdict.INCONCLUSIVE),  # it could be slower by more than counts
        (1.04, 0.03, None, Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts_of_a_change(ratio, noise, floor, verdict):
    assert judge(times(noise=noise), times(ratio, noise=noise, seed=1), floor) == verdict


def test_a_change_whose_bound_does_not_leave_one_is_none():
    found = Change(ratio=1.2, low=0.99, high=1.5, processes=12)
    assert verdicts.verdict(found, 1.05) == Verdict.INCONCLUSIVE
    found = Change(ratio=0.8, low=0.6, high=1.01, processes=12)
    assert verdicts.verdict(found, 1.05) == Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("ms", "floor", "device", "limit"),
    [
        (10, None, "cpu", 1.05),
        (10, 0.01, "cpu", 1.05),
        (10, 0.04, "cpu", 1.12),
        (0.5, None, "cpu", 1.1),  # 50 µs
        (0.5, None, "cuda", 1.05),
        (0.02, None, "cuda", 1.1),  # 2 µs
    ],
)
def test_what_counts_follows_from_noise_and_time(ms, floor, device, limit):
    assert verdicts.limit(ms, floor, device) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("ms", "floor", "device", "why"),
    [
        (10, None, "cpu", None),
        (10, 0.049, "cpu", None),
        (10, 0.051, "cpu", "noise 5.1% against itself"),
        (0.009, None, "cuda", "under 10 µs"),
        (0.02, None, "cpu", None),
    ],
)
def test_cells_that_tell_nothing_are_watched_only(ms, floor, device, why):
    assert verdicts.tracked_only(ms, floor, device) == why


@pytest.mark.parametrize(
    ("low", "limit", "verdict"),
    [
        (1.1, 1.15, Verdict.TRACK_ONLY),
        (1.2, 1.15, Verdict.REGRESSION),
        (2.1, 2.5, Verdict.TRACK_ONLY),  # of noise 50 %
        (2.6, 2.5, Verdict.REGRESSION),
    ],
)
def test_a_cell_that_is_watched_stops_somebody_where_its_bound_is_beyond_what_counts(
    low, limit, verdict
):
    found = Change(ratio=3, low=low, high=4, processes=12)
    assert verdicts.verdict(found, limit, watched=True) == verdict
    faster = Change(ratio=0.2, low=0.1, high=0.3, processes=12)
    assert verdicts.verdict(faster, limit, watched=True) == Verdict.TRACK_ONLY


# Noise against itself


def pairs(noise, seed):
    return times(noise=noise, seed=seed), times(noise=noise, seed=seed + 1000)


def test_noise_is_how_far_the_estimate_strays():
    for noise in (0.01, 0.05):
        strayed = [abs(math.log(verdicts.change(*pairs(noise, s)).ratio)) for s in range(500)]
        expected = np.quantile(strayed, 0.95)
        found = [verdicts.pair_noise(*pairs(noise, s)) for s in range(500)]
        # The smaller of two estimates is below the truth.
        assert 0.65 * expected < np.median(found) < expected


def test_neither_drift_nor_erratic_new_code_nor_a_change_is_noise():
    quiet, still = pairs(0.01, 0)
    usual = verdicts.pair_noise(quiet, still)
    assert verdicts.pair_noise(quiet, [1.3 * ms for ms in still]) == pytest.approx(usual)
    drift = np.exp(0.2 * np.random.default_rng(1).standard_normal(12))
    drifting = [list(np.array(side) * drift) for side in (quiet, still)]
    assert verdicts.pair_noise(*drifting) < 0.015
    assert verdicts.pair_noise(drifting[0], [1.3 * ms for ms in drifting[1]]) < 0.015
    erratic = [ms * (1.5 if i % 3 else 1.0) for i, ms in enumerate(still)]
    assert verdicts.pair_noise(quiet, erratic) < 0.015
    assert verdicts.pair_noise(drifting[0], erratic) > 0.05


def test_drift_is_noise_between_days():
    assert verdicts.shift_noise([10 * 1.02**i for i in range(24)]) > 0.1


# Exit codes


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([], 3),
        ([Verdict.SAME], 0),
        ([Verdict.SAME, Verdict.IMPROVEMENT, Verdict.NEW, Verdict.TRACK_ONLY], 0),
        ([Verdict.SAME, Verdict.INCONCLUSIVE], 0),
        ([Verdict.SAME, Verdict.REGRESSION], 1),
        ([Verdict.SAME, Verdict.MISSING], 1),
        ([Verdict.SAME, Verdict.FAILED], 1),
        ([Verdict.FAILED], 1),
        ([Verdict.NEW], 3),
        ([Verdict.NEW, Verdict.MISSING], 3),  # no cell in common
        ([Verdict.TRACK_ONLY], 3),
        ([Verdict.INCONCLUSIVE, Verdict.TRACK_ONLY], 3),
    ],
)
def test_exit_codes(found, code):
    assert verdicts.exit_code(found) == code


def test_no_combination_with_a_red_cell_ends_with_zero():
    for count in (1, 2, 3):
        for found in itertools.combinations(Verdict, count):
            if verdicts.RED & set(found):
                assert verdicts.exit_code(found) in (1, 3)
