"""The power that is said of the sign-flip test is the one that it has."""

import numpy as np
import pytest

from analysis.stats.power import minimal_detectable_dz, t_test_power
from analysis.stats.sign_flip import sign_flip_test
from analysis.stats.sign_flip_power import detectable_dz, level_power, sign_flip_pairs_needed


@pytest.mark.parametrize(("num_pairs", "power"), [(6, 0.63), (7, 0.77), (8, 0.78), (10, 0.79)])
def test_what_t_detects_with_four_fifths_the_sign_flip_test_detects_less_often(num_pairs, power):
    # Simulated before with other draws (the numbers of `minimal_detectable_dz`'s first note).
    found = level_power(minimal_detectable_dz(num_pairs), 1.0, num_pairs, asked=0.0).test
    assert found == pytest.approx(power, abs=0.025)


@pytest.mark.parametrize("num_pairs", [6, 8])
def test_the_power_is_that_of_the_test_itself(num_pairs):
    rng = np.random.default_rng(3)
    p_values = [sign_flip_test(rng.normal(-1.2, 1.0, num_pairs)).p_value for _ in range(800)]
    assert level_power(1.2, 1.0, num_pairs, asked=0.0).test == pytest.approx(
        np.mean(np.array(p_values) < 0.05), abs=0.055
    )


def test_with_the_asked_improvement_as_the_truth_the_level_is_reached_half_of_the_time_at_most():
    for num_pairs in (6, 8, 10, 30):
        power = level_power(0.03, 0.01, num_pairs, asked=0.03)
        assert power.level <= 0.5
        assert power.level <= power.test
    assert level_power(0.03, 0.01, 30, asked=0.03).test > 0.99


def test_no_power_below_the_floor():
    assert level_power(5.0, 1.0, 5, asked=0.0).test == 0.0
    assert detectable_dz(5) is None


@pytest.mark.parametrize("num_pairs", [6, 8, 10])
def test_what_is_called_detectable_has_the_power(num_pairs):
    dz = detectable_dz(num_pairs)
    assert dz >= minimal_detectable_dz(num_pairs) * 0.99
    assert level_power(dz, 1.0, num_pairs, asked=0.0).test == pytest.approx(0.8, abs=0.01)


def test_many_pairs_are_those_of_the_t_test():
    assert detectable_dz(40) == minimal_detectable_dz(40)
    assert level_power(0.4, 1.0, 40, asked=0.0).test == pytest.approx(t_test_power(0.4, 40), abs=0.03)


@pytest.mark.parametrize(("dz", "pairs"), [(0.5, 34), (5.0, 6), (1e-9, None)])
def test_pairs_that_are_needed(dz, pairs):
    assert sign_flip_pairs_needed(dz) == pairs


def test_at_few_pairs_more_are_needed_than_for_t():
    # t finds 1.435 with six pairs; the exact test has a power of .63 there, and of .8 with seven or eight.
    assert sign_flip_pairs_needed(1.44) in (7, 8)


@pytest.mark.parametrize(
    ("arguments", "name"), [((0.1, 0.0, 8), "sd"), ((np.nan, 1.0, 8), "effect"), ((0.1, 1.0, 1), "num_pairs")]
)
def test_power_refuses(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        level_power(*arguments, asked=0.03)
