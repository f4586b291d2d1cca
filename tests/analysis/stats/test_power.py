"""Power and planning: reference answers, statsmodels where it gives one, and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestPower

from analysis.stats.power import minimal_detectable_dz, pairs_needed, t_test_power

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    # Declared to two decimals; the six are statsmodels' own.
    ("num_pairs", "declared", "exact"),
    [(5, 1.68, 1.681997), (8, 1.16, 1.156035), (10, 1.00, 0.996001), (2, 11.55, 11.549888)],
)
def test_minimal_detectable_effect_reference(num_pairs, declared, exact):
    dz = minimal_detectable_dz(num_pairs)
    assert dz == pytest.approx(declared, abs=5e-3)
    assert dz == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(("dz", "num_pairs"), [(0.5, 34), (-0.5, 34), (0.2, 199), (1.0, 10), (0.01, 78491)])
def test_pairs_needed_reference(dz, num_pairs):
    assert pairs_needed(dz) == num_pairs


@pytest.mark.parametrize("dz", [3.6, 5.0, 20.0, 1e12])
def test_large_effects_need_what_the_sign_flip_test_needs(dz):
    assert pairs_needed(dz) == 6
    assert pairs_needed(dz, alpha=0.01) == 8


@pytest.mark.parametrize("dz", [0.0, 1e-9, 1e-300])
def test_no_practical_number_of_pairs_is_none(dz):
    assert pairs_needed(dz) is None


@PROPERTY
@given(st.floats(0.05, 2.0), st.integers(2, 60), st.sampled_from([0.01, 0.05, 0.1]))
def test_power_agrees_with_statsmodels_where_it_has_an_answer(dz, num_pairs, alpha):
    theirs = float(TTestPower().power(dz, num_pairs, alpha))
    if math.isfinite(theirs):
        assert t_test_power(dz, num_pairs, alpha=alpha) == pytest.approx(theirs, abs=1e-8)


def test_power_where_statsmodels_has_none():
    # Probability over the chi distribution of the standard deviation, on a fine grid.
    assert math.isnan(float(TTestPower().power(4.0, 4, 0.05)))
    u, du = np.linspace(1e-6, 40, 400_001, retstep=True)
    critical_U = stats.t.isf(0.025, 3) * np.sqrt(u / 3)
    reached_U = stats.norm.sf(critical_U - 4.0 * 2) + stats.norm.cdf(-critical_U - 4.0 * 2)
    expected = (stats.chi2.pdf(u, 3) * reached_U).sum() * du
    assert t_test_power(4.0, 4) == pytest.approx(expected, abs=1e-6)


def test_power_of_no_effect_is_alpha():
    assert t_test_power(0.0, 8, alpha=0.05) == 0.05
    assert t_test_power(1e-6, 8, alpha=0.05) == pytest.approx(0.05, abs=1e-9)


def test_power_by_simulation():
    rng, num_simulations = np.random.default_rng(51), 20_000
    d = rng.normal(minimal_detectable_dz(8), 1.0, size=(num_simulations, 8))
    t = d.mean(axis=1) / d.std(axis=1, ddof=1) * np.sqrt(8)
    detected = np.count_nonzero(np.abs(t) > stats.t.isf(0.025, 7))
    low, high = stats.binom.interval(0.9999, num_simulations, 0.8)
    assert low <= detected <= high


@PROPERTY
@given(st.floats(0.1, 4.0), st.sampled_from([0.5, 0.8, 0.9]), st.sampled_from([0.01, 0.05, 0.1]))
def test_pairs_needed_is_the_smallest_number_with_the_power(dz, power, alpha):
    num_pairs = pairs_needed(dz, alpha=alpha, power=power)
    assert num_pairs is not None
    assert t_test_power(dz, num_pairs, alpha=alpha) >= power
    fewer = num_pairs - 1
    assert 2 / 2**fewer >= alpha or t_test_power(dz, fewer, alpha=alpha) < power


@PROPERTY
@given(st.integers(2, 100), st.sampled_from([0.5, 0.8, 0.95]))
def test_minimal_detectable_effect_has_its_power_and_shrinks(num_pairs, power):
    dz = minimal_detectable_dz(num_pairs, power=power)
    assert t_test_power(dz, num_pairs) == pytest.approx(power, abs=1e-8)
    assert minimal_detectable_dz(num_pairs + 1, power=power) < dz


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: minimal_detectable_dz(1), "num_pairs"),
        (lambda: minimal_detectable_dz(8, power=1.0), "power"),
        (lambda: minimal_detectable_dz(8, power=0.04), "power"),
        (lambda: minimal_detectable_dz(8, alpha=5), "alpha"),
        (lambda: minimal_detectable_dz(2, alpha=1e-12), "num_pairs"),
        (lambda: pairs_needed(math.nan), "dz"),
        (lambda: pairs_needed(math.inf), "dz"),
        (lambda: pairs_needed(0.5, power=0.0), "power"),
        (lambda: pairs_needed(0.5, alpha=0.0), "alpha"),
        (lambda: t_test_power(0.5, 2.5), "num_pairs"),
    ],
)
def test_planning_refuses(call, name):
    with pytest.raises(ValueError, match=rf"^{name} [^\n]*\.$"):
        call()
