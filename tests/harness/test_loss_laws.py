"""Loss laws on data of known law: 6 lengths, 3 seeds, noise of 1 % where nothing else is said."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, ttest_1samp

from harness.loss_laws import (
    CLIPPED,
    EFFICIENT,
    EXPONENTS,
    Interval,
    isoflop,
    joint_law,
    loss_law,
)
from harness.points import TooFewPointsError

LENGTHS = 128.0 * 2 ** np.arange(6)
DRAWS = 200
CHINCHILLA = (1.69, 406.4, 0.34, 410.7, 0.28)  # Hoffmann et al. 2022, equation 10
PARAMS, TOKENS = (
    sizes.ravel() for sizes in np.meshgrid(np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 5))
)


def curve(law, x=LENGTHS):
    floor, scale, exponent = law
    return floor + scale * np.asarray(x) ** -exponent


def surface(law, params, tokens):
    floor, a, alpha, b, beta = law
    return floor + a * params**-alpha + b * tokens**-beta


def noisy(losses, generator, seeds=3, noise=0.01, shift=0.0):
    """Losses of several seeds; each seed may shift all of its losses."""
    error = noise * generator.standard_normal((len(losses), seeds))
    return losses[:, None] * np.exp(error + shift * generator.standard_normal(seeds))


def covers(interval, truth):
    return interval.low <= truth <= interval.high


def width(interval):
    return interval.high - interval.low


def law_of(fit):
    return fit.floor.value, fit.scale.value, fit.exponent.value


laws = st.tuples(st.floats(0, 3), st.floats(1, 20), st.floats(0.1, 1.2))


# What is fitted.


@given(laws)
@settings(max_examples=60, deadline=None)
def test_a_law_without_noise_is_recovered(law):
    fit = loss_law(LENGTHS, curve(law)[:, None])
    assert law_of(fit) == pytest.approx(law, rel=1e-3, abs=1e-3)
    assert np.abs(fit.residuals).max() < 1e-6
    assert fit(LENGTHS) == pytest.approx(curve(law), rel=1e-6)


@pytest.mark.parametrize("x", [np.geomspace(1e17, 1e23, 6), np.geomspace(1e-3, 1e3, 7)])
def test_a_law_of_compute_is_recovered_in_any_unit(x):
    law = (1.7, 0.4 * np.median(x) ** 0.2, 0.2)
    fit = loss_law(x, noisy(curve(law, x), np.random.default_rng(0), noise=0))
    assert law_of(fit) == pytest.approx(law, rel=1e-6)
    assert covers(fit.scale, law[1])
    assert width(fit.scale) < 1e-4 * law[1]


@given(laws, st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_the_unit_of_the_losses_scales_floor_and_scale_only(law, unit):
    losses = noisy(curve(law), np.random.default_rng(0))
    one, other = loss_law(LENGTHS, losses), loss_law(LENGTHS, unit * losses)
    for factor, name in ((unit, "floor"), (unit, "scale"), (1, "exponent")):
        a, b = getattr(one, name), getattr(other, name)
        for end in ("value", "low", "high"):
            assert factor * getattr(a, end) == pytest.approx(
                getattr(b, end), rel=1e-3, abs=1e-5 * factor
            )
    assert one.flags == other.flags


@given(st.permutations(range(6)), st.permutations(range(3)))
@settings(max_examples=15, deadline=None)
def test_the_order_of_points_and_seeds_does_not_matter(points, seeds):
    losses = noisy(curve((0.5, 4, 0.5)), np.random.default_rng(0))
    one, other = (
        loss_law(LENGTHS, losses),
        loss_law(LENGTHS[points], losses[points][:, seeds]),
    )
    for name in ("floor", "scale", "exponent"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), rel=1e-5)
    assert other.residuals == pytest.approx(one.residuals[points][:, seeds], abs=1e-6)


def test_residuals_are_of_every_run():
    losses = noisy(curve((0.5, 4, 0.5)), np.random.default_rng(0), shift=0.1)
    fit = loss_law(LENGTHS, losses)
    assert fit.residuals == pytest.approx(np.log(losses / fit(LENGTHS)[:, None]))
    assert fit.seeds == 3


@pytest.mark.parametrize("law", [(1.0, 3.0, 0.3), (0.5, 4.0, 0.5)])
def test_one_outlying_run_leaves_the_exponent_in_its_interval(law):
    generator, kept, held = np.random.default_rng(5), 0, 0
    for draw in range(36):
        losses = noisy(curve(law), generator)
        clean = loss_law(LENGTHS, losses).exponent
        losses[draw % 6, draw % 3] *= 1.2
        spoiled = loss_law(LENGTHS, losses).exponent
        kept += covers(clean, spoiled.value)
        held += covers(spoiled, law[2])
    assert kept >= 34
    assert held >= 31


def test_an_outlying_run_hardly_moves_the_law():
    losses = noisy(curve((0.5, 4, 0.5)), np.random.default_rng(0), noise=1e-4)
    losses[2, 1] *= 1.2
    assert law_of(loss_law(LENGTHS, losses)) == pytest.approx((0.5, 4, 0.5), rel=0.005)


# What the seeds say of it.


@pytest.mark.parametrize(
    ("law", "shift", "widest"),
    [
        ((1.0, 3.0, 0.3), 0.05, 0.35),
        ((0.5, 4.0, 0.5), 0.0, 0.27),
        ((1.8, 8.0, 0.7), 0.0, 1.0),
        ((0.05, 3.0, 0.3), 0.05, 0.1),
    ],
)
def test_intervals_cover_the_true_law(law, shift, widest):
    generator = np.random.default_rng(round(1000 * sum(law)))
    fits = [loss_law(LENGTHS, noisy(curve(law), generator, shift=shift)) for _ in range(DRAWS)]
    for truth, name in zip(law, ("floor", "scale", "exponent"), strict=True):
        covered = np.mean([covers(getattr(fit, name), truth) for fit in fits])
        assert 0.90 <= covered <= 0.995, name
    assert np.median([width(fit.exponent) for fit in fits]) < widest


def test_errors_that_a_seed_carries_from_length_to_length_are_allowed_for():
    law, generator = (0.5, 4.0, 0.5), np.random.default_rng(2)
    alike = 0.7 ** np.abs(np.subtract.outer(range(6), range(6)))
    root, covered = np.linalg.cholesky(alike), 0
    for _ in range(100):
        error = 0.01 * root @ generator.standard_normal((6, 3))
        covered += covers(loss_law(LENGTHS, curve(law)[:, None] * np.exp(error)).exponent, law[2])
    assert covered >= 90


def test_an_exponent_that_cannot_be_determined_is_flagged_and_its_interval_wide():
    law, generator = (1.5, 0.3, 0.05), np.random.default_rng(0)
    fits = [loss_law(LENGTHS, noisy(curve(law), generator)) for _ in range(20)]
    assert all(fit.flags for fit in fits)
    assert sum(any("ill-conditioned" in flag for flag in fit.flags) for fit in fits) >= 18
    assert np.median([width(fit.exponent) for fit in fits]) > 1


def test_a_shift_of_a_whole_seed_is_no_noise_of_the_exponent():
    fit = loss_law(LENGTHS, curve((1, 3, 0.3))[:, None] * [0.9, 1.0, 1.1])
    assert width(fit.exponent) < 1e-5
    assert width(fit.floor) > 0.2
    assert fit.flags == ()


def test_where_noise_is_small_intervals_are_those_of_a_linear_fit_to_each_seed():
    _, scale, exponent = law = (0.5, 4.0, 0.5)
    losses = noisy(curve(law), np.random.default_rng(4), noise=1e-4)
    fit = loss_law(LENGTHS, losses)
    fall = scale * LENGTHS**-exponent
    slopes = np.column_stack([np.ones(6), fall / scale, -np.log(LENGTHS) * fall])
    slopes /= curve(law)[:, None]
    by_seed = np.array(law)[:, None] + np.linalg.pinv(slopes) @ np.log(losses / curve(law)[:, None])
    for interval, values in zip((fit.floor, fit.scale, fit.exponent), by_seed, strict=True):
        linear = ttest_1samp(values, 0).confidence_interval()
        assert interval.value == pytest.approx(values.mean(), rel=1e-3)
        assert width(interval) == pytest.approx(linear.high - linear.low, rel=0.04)


def test_that_a_floor_is_not_negative_narrows_the_interval_of_the_exponent():
    law, generator = (0.0, 3.0, 0.3), np.random.default_rng(0)
    fits = [loss_law(LENGTHS, noisy(curve(law), generator)) for _ in range(40)]
    bounded = [width(fit.exponent) for fit in fits if "floor at its bound 0" in fit.flags]
    assert 10 < len(bounded) < 30
    assert np.median(bounded) < 0.04
    assert np.mean([covers(fit.exponent, law[2]) for fit in fits]) >= 0.9


def test_the_noise_of_normal_residuals_is_their_deviation():
    truth = norm.expect(lambda z: np.minimum(z**2, EFFICIENT**2))
    assert pytest.approx(truth, rel=1e-4) == CLIPPED


def test_more_seeds_make_narrower_intervals():
    generator, law = np.random.default_rng(0), (0.5, 4.0, 0.5)
    widths = {
        seeds: np.median(
            [
                width(loss_law(LENGTHS, noisy(curve(law), generator, seeds)).exponent)
                for _ in range(15)
            ]
        )
        for seeds in (3, 12)
    }
    assert widths[12] < widths[3] / 2


@pytest.mark.parametrize("seeds", [1, 2])
def test_under_three_seeds_there_is_no_interval(seeds):
    fit = loss_law(LENGTHS, noisy(curve((1, 3, 0.3)), np.random.default_rng(0), seeds, 1e-4))
    assert [(i.low, i.high) for i in (fit.floor, fit.scale, fit.exponent)] == [(None, None)] * 3
    assert fit.flags == ()


def test_one_noisy_seed_is_flagged_by_its_residuals():
    fit = loss_law(LENGTHS, noisy(curve((1.8, 8, 0.7)), np.random.default_rng(0), 1))
    assert any("ill-conditioned" in flag for flag in fit.flags)


# What is flagged.


def test_a_law_without_a_floor_is_flagged():
    fit = loss_law(LENGTHS, noisy(curve((-0.05, 3, 0.3)), np.random.default_rng(0), noise=1e-3))
    assert fit.floor.value == 0
    assert fit.flags == ("floor at its bound 0",)


def test_an_exponent_at_its_bound_is_flagged():
    fit = loss_law(LENGTHS, np.repeat([[3.0], [1], [1], [1], [1], [1]], 3, axis=1))
    assert fit.exponent.value == EXPONENTS[1]
    assert "alpha at its bound 4" in fit.flags


@pytest.mark.parametrize("rise", [0.0, 0.1])
def test_a_loss_that_does_not_fall_is_flagged(rise):
    fit = loss_law(LENGTHS, np.repeat(1 + LENGTHS[:, None] ** rise, 3, axis=1))
    assert "does not fall with x" in fit.flags
    assert fit.scale == Interval(0.0)
    assert fit.exponent.low is None


def test_a_fall_within_noise_is_flagged():
    fall = 1 - 1e-4 * np.arange(6)
    fit = loss_law(LENGTHS, noisy(fall, np.random.default_rng(1)))
    assert "falls with x by no more than the seeds' noise" in fit.flags
    assert fit.scale.low == 0


# What is refused.


@pytest.mark.parametrize("x", [[128, 256, 512], [128, 128, 256, 512]])
def test_three_distinct_lengths_are_too_few(x):
    with pytest.raises(TooFewPointsError, match="at least 4 distinct x, got 3"):
        loss_law(x, [[2.0, 2.1, 2.2]] * len(x))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_losses_and_lengths_must_be_positive_and_finite(bad):
    losses = np.full((6, 3), 2.0)
    with pytest.raises(ValueError, match="positive and finite"):
        loss_law([bad, *LENGTHS[1:]], losses)
    losses[3, 1] = bad
    with pytest.raises(ValueError, match="leave out runs that diverged"):
        loss_law(LENGTHS, losses)


@pytest.mark.parametrize("losses", [[[2, 2]] * 5 + [[2]], [[2, 2]] * 5, [], [[]] * 6])
def test_every_point_needs_the_same_seeds(losses):
    with pytest.raises(ValueError, match="leave out"):
        loss_law(LENGTHS, losses)


# Parameters and tokens.


@given(
    st.tuples(
        st.floats(0.5, 3),
        st.floats(100, 1000),
        st.floats(0.2, 0.6),
        st.floats(100, 3000),
        st.floats(0.2, 0.6),
    )
)
@settings(max_examples=25, deadline=None)
def test_a_joint_law_without_noise_is_recovered(law):
    fit = joint_law(PARAMS, TOKENS, surface(law, PARAMS, TOKENS)[:, None])
    found = (fit.floor, fit.params_scale, fit.params_exponent, fit.tokens_scale)
    found = [interval.value for interval in (*found, fit.tokens_exponent)]
    assert found == pytest.approx(law, rel=1e-3)
    assert fit.optimal_exponent == pytest.approx(law[4] / (law[2] + law[4]), rel=1e-3)
    assert fit(PARAMS, TOKENS) == pytest.approx(surface(law, PARAMS, TOKENS), rel=1e-6)


def test_intervals_cover_the_true_joint_law():
    generator, covered = np.random.default_rng(7), np.zeros(5)
    for _ in range(20):
        fit = joint_law(PARAMS, TOKENS, noisy(surface(CHINCHILLA, PARAMS, TOKENS), generator))
        found = (fit.floor, fit.params_scale, fit.params_exponent, fit.tokens_scale)
        found = (*found, fit.tokens_exponent)
        covered += [covers(i, truth) for i, truth in zip(found, CHINCHILLA, strict=True)]
    assert covered.min() >= 17
    assert fit.residuals.shape == (25, 3)
    assert width(fit.params_exponent) < 0.2


def test_a_loss_that_does_not_fall_with_tokens_is_flagged():
    losses = surface((1.69, 406.4, 0.34, 0, 1), PARAMS, TOKENS)
    fit = joint_law(PARAMS, TOKENS, losses[:, None])
    assert "does not fall with tokens" in fit.flags
    assert not any("parameters" in flag for flag in fit.flags)
    assert fit.params_exponent.value == pytest.approx(0.34, rel=1e-3)


@pytest.mark.parametrize(
    ("params", "tokens", "missing"),
    [
        ([1e7, 1e8] * 3, [1e9, 1e9, 1e10, 1e10, 1e11, 1e11], "3 distinct parameter counts, got 2"),
        ([1e7, 1e8, 1e9] * 2, [1e9] * 3 + [1e10] * 3, "3 distinct token counts, got 2"),
        ([1e7, 1e8, 1e9] * 2, [1e9, 1e10, 1e11] * 2, "6 distinct pairs.*got 3"),
    ],
)
def test_a_joint_law_needs_both_varied(params, tokens, missing):
    with pytest.raises(TooFewPointsError, match=missing):
        joint_law(params, tokens, [[2.0]] * 6)


# Compute budgets.


def best_size(law, compute):
    """Closed form of equation 4 of Hoffmann et al. 2022, at 6 FLOPs a parameter and token."""
    _, a, alpha, b, beta = law
    return (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (compute / 6) ** (
        beta / (alpha + beta)
    )


def isoflop_runs(law, span=8.0, sizes=7, budgets=5, centre=1.0):
    """Compute, parameters and losses; sizes lie around the best one of each budget."""
    compute = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    around = np.tile(np.geomspace(1 / span, span, sizes), budgets)
    params = centre * best_size(law, compute) * around
    return compute, params, surface(law, params, compute / (6 * params))


def test_the_exponent_of_the_best_size_is_recovered_within_its_interval():
    law, generator, fits = (1.82, 482, 0.35, 2085, 0.37), np.random.default_rng(3), []
    compute, params, losses = isoflop_runs(law)
    for _ in range(DRAWS):
        fits.append(isoflop(compute, params, noisy(losses, generator)))
    known = [fit for fit in fits if fit.exponent is not None]
    assert len(known) >= 0.95 * DRAWS
    truth = law[4] / (law[2] + law[4])
    assert np.mean([covers(fit.exponent, truth) for fit in known]) >= 0.9
    assert np.median([width(fit.exponent) for fit in known]) < 0.1
    optima = [budget for fit in fits for budget in fit.budgets if budget.params.low is not None]
    hit = [covers(budget.params, best_size(law, budget.compute)) for budget in optima]
    assert len(optima) >= 0.95 * 5 * DRAWS
    assert np.mean(hit) >= 0.9


def test_budgets_have_their_optimum_and_their_parabola():
    law = (1.5, 100.0, 0.3, 100.0, 0.3)
    compute, params, losses = isoflop_runs(law)
    order = np.random.default_rng(0).permutation(len(compute))
    fit = isoflop(compute[order], params[order], np.repeat(losses[order][:, None], 3, axis=1))
    assert [budget.compute for budget in fit.budgets] == sorted(set(compute))
    assert fit.exponent.value == pytest.approx(0.5, rel=1e-6)
    assert fit.scale.value == pytest.approx(6**-0.5, rel=1e-5)
    assert fit.flags == ()
    for budget in fit.budgets:
        best = best_size(law, budget.compute)
        assert budget.params.value == pytest.approx(best, rel=1e-6)
        shown = np.polynomial.Polynomial(budget.coefficients)(np.log(best))
        assert shown == pytest.approx(surface(law, best, budget.compute / 6 / best), rel=0.02)


def test_an_optimum_outside_the_sizes_tried_is_flagged_and_left_out():
    compute, params, losses = isoflop_runs(CHINCHILLA)
    last = compute == compute.max()
    params[last] *= 30
    losses[last] = surface(CHINCHILLA, params[last], compute[last] / (6 * params[last]))
    with_it = isoflop(compute, params, losses[:, None])
    without = isoflop(compute[~last], params[~last], losses[~last][:, None])
    assert with_it.budgets[-1].flags == ("at the edge of the sizes tried",)
    assert with_it.budgets[-1].params is None
    assert with_it.flags == ("1e+21 FLOPs: at the edge of the sizes tried",)
    assert with_it.exponent == without.exponent


def test_a_loss_that_bends_downwards_has_no_optimum():
    compute, params, losses = isoflop_runs(CHINCHILLA)
    fit = isoflop(compute, params, 5 - losses[:, None])
    assert all(budget.flags == ("the loss does not bend upwards",) for budget in fit.budgets)
    assert fit.exponent is fit.scale is None
    assert fit.flags[-1] == "no power law: 0 sound optima, it takes 3"


def test_a_bend_within_noise_is_flagged():
    compute, params, losses = isoflop_runs(CHINCHILLA, span=1.2)
    fit = isoflop(compute, params, noisy(losses, np.random.default_rng(1)))
    bent = [budget for budget in fit.budgets if budget.params is not None]
    assert bent
    assert all(budget.flags == ("the bend is within the seeds' noise",) for budget in bent)
    assert all(budget.params.low is None for budget in bent)
    assert fit.exponent is None


def test_a_lopsided_curve_is_flagged():
    compute, params, losses = isoflop_runs((1.5, 100, 0.25, 3000, 0.6))
    fit = isoflop(compute, params, noisy(losses, np.random.default_rng(0), noise=1e-4))
    assert all("lopsided" in budget.flags[0] for budget in fit.budgets)
    assert fit.exponent is not None
    assert len(fit.flags) == 5


def test_two_budgets_make_no_power_law_and_two_sizes_no_budget():
    compute, params, losses = isoflop_runs(CHINCHILLA, budgets=2)
    fit = isoflop(compute, params, losses[:, None])
    assert fit.exponent is None
    assert fit.flags == ("no power law: 2 sound optima, it takes 3",)
    assert fit.budgets[0].params.low is None
    compute, params, losses = isoflop_runs(CHINCHILLA, sizes=2)
    with pytest.raises(TooFewPointsError, match=r"1e\+18 FLOPs needs at least 3 sizes, got 2"):
        isoflop(compute, params, losses[:, None])
