"""Fits on data whose growth is known: 3 % noise, 8 lengths, 20 samples, 500 draws each."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import ttest_1samp

from harness import fit
from harness.laws import simplest
from harness.points import TooFewPointsError

LENGTHS = [float(1 << k) for k in range(8, 16)]
DRAWS = 500
TRUTHS = {
    "c": lambda n: 1.0 + 0 * n,
    "n": lambda n: n / 2048,
    "n log n": lambda n: n * np.log(n) / 16384,
    "n²": lambda n: (n / 2048) ** 2,
    "c + n": lambda n: 1 + n / 2048,
    "n + n²": lambda n: n / 2048 + (n / 2048) ** 2,
}


def noisy(law, generator, count=20, noise=0.03):
    """Samples of one process at every length."""
    return [law(n) * np.exp(noise * generator.standard_normal(count)) for n in LENGTHS]


def several(law, generator, processes, spread, noise=0.03, count=20):
    """Samples of several processes, each with an error of its own at every length."""
    return [
        [
            law(n)
            * np.exp(
                spread * generator.standard_normal() + noise * generator.standard_normal(count)
            )
            for _ in range(processes)
        ]
        for n in LENGTHS
    ]


def covered(interval, truth):
    return interval.low <= truth <= interval.high


def slope(law, lengths):
    return np.polyfit(np.log(lengths), np.log([law(n) for n in lengths]), 1)[0]


def seed(name):
    return sum(map(ord, name))


@pytest.mark.parametrize("name", TRUTHS)
def test_the_tail_interval_covers_the_true_exponent(name):
    law, generator = TRUTHS[name], np.random.default_rng(seed(name))
    truth = fit.tail_exponent(LENGTHS, [law(n) for n in LENGTHS]).value
    assert truth == pytest.approx(slope(law, LENGTHS[4:]))
    hits = sum(
        covered(fit.tail_exponent(LENGTHS, noisy(law, generator)), truth) for _ in range(DRAWS)
    )
    assert 0.92 <= hits / DRAWS <= 0.98


@pytest.mark.parametrize(("processes", "spread"), [(3, 0.0), (3, 0.05), (5, 0.05)])
def test_over_processes_too(processes, spread):
    law, generator = TRUTHS["c + n"], np.random.default_rng(100 * processes)
    truth = fit.tail_exponent(LENGTHS, [law(n) for n in LENGTHS]).value
    hits = sum(
        covered(fit.tail_exponent(LENGTHS, several(law, generator, processes, spread)), truth)
        for _ in range(DRAWS)
    )
    assert 0.92 <= hits / DRAWS <= 0.98


@pytest.mark.parametrize("processes", [3, 5, 10])
def test_the_interval_is_that_of_students_t_over_processes(processes):
    generator = np.random.default_rng(processes)
    samples = several(TRUTHS["n"], generator, processes, 0.05)
    slopes = [
        fit.tail_exponent(LENGTHS, [float(np.median(s[i])) for s in samples]).value
        for i in range(processes)
    ]
    expected = ttest_1samp(slopes, 1).confidence_interval()
    found = fit.tail_exponent(LENGTHS, samples)
    assert found.value == pytest.approx(np.mean(slopes))
    half = (expected.high - expected.low) / 2
    assert found.high - found.value == pytest.approx(half, rel=0.08)
    assert found.value - found.low == pytest.approx(half, rel=0.08)


def test_samples_of_one_process_do_not_stand_for_processes():
    """With an error a process, the interval of one process is far too narrow; that of 5 is not."""
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        samples = several(TRUTHS["n"], generator, 5, 0.05)
        hits += covered(fit.tail_exponent(LENGTHS, [s[0] for s in samples]), 1.0)
    assert hits < 60


@pytest.mark.parametrize("name", TRUTHS)
def test_the_class_is_right_or_not_separated(name):
    law, generator = TRUTHS[name], np.random.default_rng(seed(name))
    found = [fit.classify(LENGTHS, noisy(law, generator)) for _ in range(DRAWS)]
    open_ = sum(len(g.leading) > 1 for g in found)
    wrong = sum(len(g.leading) == 1 and name not in g.name.split(" or ") for g in found)
    vague = sum(" or " in g.name for g in found)
    assert wrong / DRAWS <= 0.05
    assert open_ / DRAWS <= 0.6
    assert vague / DRAWS <= 0.2


@pytest.mark.parametrize("share", [0.1, 0.3, 3.0, 10.0])
def test_a_plateau_or_a_linear_part_of_any_size_is_not_mistaken(share):
    generator = np.random.default_rng(7)
    for leading, law in (
        ("n", lambda n: share + n / 2048),
        ("n²", lambda n: share * n / 2048 + (n / 2048) ** 2),
    ):
        found = [fit.classify(LENGTHS, noisy(law, generator)).leading for _ in range(100)]
        assert sum(len(terms) == 1 and terms != (leading,) for terms in found) <= 5
        assert found.count((leading,)) >= 60


def test_few_noisy_lengths_seldom_tell_n_from_n_log_n_and_seldom_lie():
    lengths = [8192.0, 16384.0, 32768.0, 65536.0]
    generator = np.random.default_rng(3)
    found = []
    for _ in range(200):
        noise = [np.exp(0.3 * generator.standard_normal(5)) for _ in lengths]
        samples = [n * np.log(n) * e for n, e in zip(lengths, noise, strict=True)]
        found.append(fit.classify(lengths, samples))
    separated = [g for g in found if len(g.leading) == 1]
    assert len(separated) < 100
    assert sum(g.name != "n log n" for g in separated) <= 20
    unsure = next(g for g in found if len(g.leading) > 1)
    assert unsure.name.startswith("cannot separate ")
    assert 1 <= unsure.evidence_ratio < 10


def test_the_tail_is_the_longer_half_and_at_least_three():
    for count, first in ((4, 512), (5, 1024), (6, 2048), (7, 2048), (8, 4096)):
        found = fit.tail_exponent(LENGTHS[:count], [float(n) for n in LENGTHS[:count]])
        assert (found.first, found.last) == (first, LENGTHS[count - 1])


def test_few_points_do_not_make_one_term_of_what_is_none():
    """AICc alone takes a constant for a curve that climbs eightfold at the last of five points."""
    growth = fit.classify([256, 1024, 4096, 16384, 65536], [1.83, 2.53, 2.67, 5.23, 14.2])
    assert "1" not in growth.leading


def test_coefficients_are_those_of_the_data():
    growth = fit.classify(LENGTHS, [3.0 + 0.002 * n for n in LENGTHS])
    assert growth.law.terms == ("1", "n")
    assert growth.law.coefficients == pytest.approx((3.0, 0.002), rel=0.03)
    assert growth.law(LENGTHS) == pytest.approx([3.0 + 0.002 * n for n in LENGTHS], rel=0.01)


@pytest.mark.parametrize(
    ("name", "law"),
    [*TRUTHS.items(), ("n²", lambda n: n**2 + n), ("n + n log n", lambda n: n * (np.log(n) + 4))],
)
def test_exact_counts_have_the_simplest_law(name, law):
    for lengths in (LENGTHS, LENGTHS[::2]):
        assert simplest(tuple(lengths), [law(n) for n in lengths]).name == name


CROSSING = [("n", "n²", 1.1), ("c", "n", 1.2), ("n log n", "n²", 0.8), ("c + n", "n + n²", 1.2)]


@pytest.mark.parametrize(("a", "b", "factor"), CROSSING)
def test_the_crossover_is_covered(a, b, factor):
    first, second = (lambda n: factor * TRUTHS[a](n)), TRUTHS[b]
    truth = brentq(lambda n: first(n) - second(n), 400, 20000)
    generator = np.random.default_rng(seed(a + b))
    hits = 0
    for _ in range(DRAWS):
        found = fit.crossover(LENGTHS, noisy(first, generator), noisy(second, generator))
        assert found.verdict == "in range"
        assert found.low <= found.length <= found.high
        assert found.crossings == 1
        assert found.smaller_after == 0
        hits += covered(found, truth)
    assert 0.92 <= hits / DRAWS <= 0.98


@pytest.mark.parametrize(
    ("a", "b", "factor"), [("n", "n", 1.0), ("n", "n", 1.2), ("c + n", "n", 1.0), ("n", "n²", 5e3)]
)
def test_what_does_not_cross_is_not_said_to(a, b, factor):
    generator = np.random.default_rng(11)
    wrong = 0
    for _ in range(200):
        first = noisy(lambda n: factor * TRUTHS[a](n), generator)
        wrong += fit.crossover(LENGTHS, first, noisy(TRUTHS[b], generator)).length is not None
    assert wrong <= 10


def test_none_in_range_names_the_smaller():
    generator = np.random.default_rng(2)
    slow = noisy(lambda n: 2 * n, generator)
    fast = noisy(lambda n: n, generator)
    for samples, smaller in (((slow, fast), 1), ((fast, slow), 0)):
        found = fit.crossover(LENGTHS, *samples)
        assert (found.verdict, found.smaller_after) == ("none in range", smaller)


def test_a_crossing_beyond_the_range_is_called_extrapolated():
    generator = np.random.default_rng(5)
    truth = 2048 * 40.0  # beyond 32,768
    found = fit.crossover(
        LENGTHS, noisy(lambda n: 40 * n / 2048, generator), noisy(TRUTHS["n²"], generator)
    )
    assert found.verdict == "extrapolated"
    assert found.length == pytest.approx(truth, rel=0.1)
    assert covered(found, truth)


def test_two_crossings_give_the_last_and_say_so():
    bow = [2.0, 1.3, 0.8, 0.6, 0.6, 0.8, 1.3, 2.0]
    found = fit.crossover(
        LENGTHS,
        [np.array([0.99, 1.0, 1.01]) * b for b in bow],
        [np.array([0.99, 1.0, 1.01]) for _ in bow],
    )
    assert found.crossings == 2
    assert found.verdict == "in range"
    assert 8192 < found.length < 16384
    assert found.smaller_after == 1


def test_what_noise_hides_at_one_end_is_not_called_none():
    noise = np.exp([-0.3, 0.0, 0.3])
    apart = [-0.05, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8]
    found = fit.crossover(LENGTHS, [np.exp(d) * noise for d in apart], [noise for _ in apart])
    assert (found.verdict, found.smaller_after) == ("cannot separate", 1)


def test_curves_that_meet_again_at_the_end_name_nobody_faster_beyond():
    apart = [-0.5, -0.4, -0.2, 0.2, 0.4, 0.3, 0.2, -0.001]
    noise = np.exp([-0.03, 0.0, 0.03])
    found = fit.crossover(LENGTHS, [np.exp(d) * noise for d in apart], [noise for _ in apart])
    assert (found.verdict, found.crossings, found.smaller_after) == ("in range", 1, None)


@pytest.mark.parametrize("factor", [2.0, 3.0, 10.0])
@pytest.mark.parametrize("touch", range(7))
def test_exact_curves_that_touch_do_not_cross(touch, factor):
    a = [1 + n / 2048 for n in LENGTHS]
    b = [value / (1 if i == touch else factor) for i, value in enumerate(a)]
    assert fit.crossover(LENGTHS, a, b).crossings == 0


def test_a_length_of_unknown_noise_makes_nothing_sure():
    generator = np.random.default_rng(13)
    for _ in range(20):
        a, b = (several(TRUTHS["n"], generator, 5, 0.05) for _ in range(2))
        a[-1] = a[-1][:1]
        assert fit.crossover(LENGTHS, a, b).verdict == "cannot separate"
        assert fit.cliffs(LENGTHS, a) == []
        tail = fit.tail_exponent(LENGTHS, a)
        assert (tail.low, tail.high) == (None, None)
        assert fit.departures(LENGTHS, a, [n**2 for n in LENGTHS]) == []


def test_a_sum_that_is_likelier_than_its_terms_alone_is_not_left_out():
    generator = np.random.default_rng(14)
    for count in (5, 6, 8):
        for _ in range(100):
            samples = noisy(lambda n: n / 2048 + (n / 12000) ** 2, generator)[:count]
            growth = fit.classify(LENGTHS[:count], samples)
            nearest = min(law.spread for law in growth.laws)
            assert growth.law == next(law for law in growth.laws if law.spread <= 4 * nearest)
            if len(growth.leading) == 1 and growth.evidence_ratio is not None:
                assert growth.evidence_ratio > 1


def test_a_length_of_one_token_has_laws_too():
    growth = fit.classify([1, 2, 4, 8, 16, 32], [3.0 * n for n in (1, 2, 4, 8, 16, 32)])
    assert growth.name == "n"


def test_a_cliff_is_found_where_it_is():
    generator = np.random.default_rng(4)
    smooth = noisy(TRUTHS["n + n²"], generator)
    assert fit.cliffs(LENGTHS, smooth) == []
    smooth[4] = 1.5 * smooth[4]
    (cliff,) = fit.cliffs(LENGTHS, smooth)  # and its neighbours are not blamed
    assert cliff.length == LENGTHS[4]
    assert cliff.factor == pytest.approx(1.5, rel=0.1)


def test_noise_is_no_cliff():
    generator = np.random.default_rng(6)
    found = [bool(fit.cliffs(LENGTHS, noisy(TRUTHS["n"], generator, 5, 0.2))) for _ in range(100)]
    assert sum(found) < 30  # four points are judged, each with 5 % of false alarms


def test_a_departure_is_said_with_its_lengths_and_exponents():
    generator = np.random.default_rng(8)
    measured = noisy(lambda n: 1 + n / 256 + (n / 8192) ** 3, generator)
    runs = fit.departures(LENGTHS, measured, [n / 256 for n in LENGTHS])
    head, tail = runs
    assert (head.first, tail.last) == (LENGTHS[0], LENGTHS[-1])
    assert head.measured < head.counted - 0.15
    assert tail.measured > tail.counted + 0.15
    assert tail.counted == pytest.approx(1)
    # A tail that departs by too little between neighbours to be told from their noise.
    noise = np.exp(0.3 * np.linspace(-1, 1, 9))
    bent = [n**1.3 * noise for n in LENGTHS]
    (run,) = fit.departures(LENGTHS, bent, LENGTHS)
    assert (run.first, run.last) == (LENGTHS[4], LENGTHS[-1])
    same = noisy(lambda n: n / 256, generator)
    assert fit.departures(LENGTHS, same, [n / 256 for n in LENGTHS]) == []


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_power_law_has_its_power_everywhere(power):
    lengths = [256, 512, 2048, 16384]
    got = fit.local_exponents(lengths, [3.0 * n**power for n in lengths])
    assert [e.value for e in got] == pytest.approx([power] * 3)
    assert [(e.low, e.high) for e in got] == [(None, None)] * 3
    assert [(e.first, e.last) for e in got] == [(256, 512), (512, 2048), (2048, 16384)]


def test_the_same_samples_give_the_same_answers():
    samples = noisy(TRUTHS["n"], np.random.default_rng(9))
    assert fit.tail_exponent(LENGTHS, samples) == fit.tail_exponent(LENGTHS, samples)
    other = noisy(TRUTHS["n²"], np.random.default_rng(9))
    assert fit.crossover(LENGTHS, samples, other) == fit.crossover(LENGTHS, samples, other)


FITS = {
    "tail_exponent": lambda n, s: fit.tail_exponent(n, s),
    "classify": lambda n, s: fit.classify(n, s),
    "crossover": lambda n, s: fit.crossover(n, s, s),
    "cliffs": lambda n, s: fit.cliffs(n, s),
}


@pytest.mark.parametrize("name", FITS)
def test_under_four_points_there_is_no_fit(name):
    with pytest.raises(TooFewPointsError, match="at least 4 lengths, got 3"):
        FITS[name]([1, 2, 4], [1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("lengths", "samples"),
    [
        ([1, 2], [1.0]),
        ([2, 1], [1.0, 2.0]),
        ([0, 1], [1.0, 2.0]),
        ([1, 2], [0.0, 1.0]),
        ([1, 2], [1.0, math.nan]),
        ([1, 2], [1.0, math.inf]),
        ([1, 2], [[1.0], []]),
        ([1, 2], [[[1.0], [-1.0]], [[1.0], [1.0]]]),
    ],
)
def test_unusable_input_is_refused(lengths, samples):
    with pytest.raises(ValueError, match="must"):
        fit.local_exponents(lengths, samples)


def test_a_cell_missing_from_one_process_still_fits():
    generator = np.random.default_rng(12)
    samples = several(TRUTHS["n"], generator, 4, 0.02)
    samples[3] = samples[3][:3]
    assert covered(fit.tail_exponent(LENGTHS, samples), 1.0)
