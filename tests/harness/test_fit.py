import math

import pytest

from harness.fit import local_exponents


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_power_law_has_its_power_everywhere(power):
    lengths = [256, 512, 2048, 16384]
    got = local_exponents(lengths, [3.0 * n**power for n in lengths])
    assert got == pytest.approx([power] * 3)


def test_a_mixture_climbs_from_one_law_to_the_other():
    lengths = [2**k for k in range(8, 18)]
    got = local_exponents(lengths, [n + n**2 / 8192 for n in lengths])
    assert got == sorted(got)
    assert got[0] < 1.1
    assert got[-1] > 1.9


def test_n_log_n_is_just_above_one():
    (got,) = local_exponents([8192, 16384], [n * math.log(n) for n in (8192, 16384)])
    assert got == pytest.approx(1 + 1 / math.log(16384), abs=0.01)


@pytest.mark.parametrize(
    ("lengths", "values"),
    [([1, 2], [1.0]), ([2, 1], [1.0, 2.0]), ([1, 2], [0.0, 1.0]), ([1, 2], [1.0, math.nan])],
)
def test_unusable_input_is_refused(lengths, values):
    with pytest.raises(ValueError, match="must"):
        local_exponents(lengths, values)
