"""Diverged and missing runs: the worst-rank test against the Wilcoxon test and by hand, and the bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from analysis.stats.divergence import mean_difference_bounds, worst_rank_scores, worst_rank_test

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
NEVER = np.zeros(8, dtype=bool)
numbers = st.integers(-1000, 1000).map(lambda number: number / 64)


def flags(*positions, length=8):
    return np.isin(np.arange(length), positions)


def test_scores_by_hand():
    d = [-0.3, 0.1, np.nan, np.inf, 0.0, np.nan, -0.2, np.nan]
    scores = worst_rank_scores(d, flags(2, 3, 5), flags(5, 7))
    # Sizes .1 < .2 < .3 < three divergences of one run, which share ranks 4 to 6; a zero and a double divergence tie.
    assert scores.tolist() == [-3, 1, 5, 5, 0, 0, -2, -5]
    higher_is_better = worst_rank_scores(d, flags(2, 3, 5), flags(5, 7), lower_is_better=False)
    assert higher_is_better.tolist() == [-3, 1, -5, -5, 0, 0, -2, 5]


@PROPERTY
@given(st.permutations([0.5, 1.25, -2.0, 3.5, -0.75, 4.0, 6.5, -9.0, 11.0]), st.integers(3, 9))
def test_without_divergence_it_is_the_exact_wilcoxon_test(values, num_pairs):
    d = np.array(values[:num_pairs])
    never = np.zeros(num_pairs, dtype=bool)
    assert worst_rank_test(d, never, never).p_value == pytest.approx(stats.wilcoxon(d, method="exact").pvalue)


def test_divergence_of_the_arm_undoes_its_wins():
    d = np.array([-0.5, -0.4, -0.6, -0.3, -0.7, -0.2, -0.8, -0.1])
    clean, once = worst_rank_test(d, NEVER, NEVER), worst_rank_test(d, flags(3), NEVER)
    most = worst_rank_test(d, flags(0, 1, 2, 3, 4), NEVER)
    assert clean.p_value == 2 / 256
    assert clean.statistic < 0
    assert once.p_value > 0.05  # the one loss has the highest rank of all
    assert most.statistic > 0


def test_divergence_of_the_baseline_is_a_win_of_the_arm():
    d = np.array([-0.5, -0.4, -0.6, np.nan, -0.7, np.nan, -0.8, -0.1])
    test = worst_rank_test(d, NEVER, flags(3, 5))
    assert test.p_value == 2 / 256
    assert test.statistic < 0
    assert worst_rank_test(-d, NEVER, flags(3, 5), lower_is_better=False).statistic > 0


@PROPERTY
@given(arrays(np.float64, 8, elements=numbers), arrays(np.bool_, 8), arrays(np.bool_, 8))
def test_swapping_arm_and_baseline_mirrors_the_scores(d, arm, baseline):
    scores = worst_rank_scores(d, arm, baseline)
    assert worst_rank_scores(-d, baseline, arm).tolist() == (-scores).tolist()
    assert np.abs(scores).sum() == pytest.approx(np.arange(np.count_nonzero(scores) + 1).sum())


@PROPERTY
@given(arrays(np.float64, 8, elements=numbers), st.floats(1, 1000))
def test_a_diverged_run_is_worse_than_any_number(d, worst):
    numbers_only = d.copy()
    numbers_only[0] = np.abs(d).max() + worst
    assert worst_rank_scores(d, flags(0), NEVER).tolist() == worst_rank_scores(numbers_only, NEVER, NEVER).tolist()


def test_worst_rank_keeps_its_level_when_runs_diverge():
    rng, num_simulations = np.random.default_rng(21), 2500
    runs, diverged = rng.normal(size=(num_simulations, 8, 2)), rng.random((num_simulations, 8, 2)) < 0.15
    rejections = sum(
        worst_rank_test(run[:, 0] - run[:, 1], bad[:, 0], bad[:, 1]).p_value < 0.05
        for run, bad in zip(runs, diverged, strict=True)
    )
    assert 0.02 * num_simulations < rejections <= stats.binom.ppf(0.9999, num_simulations, 0.05)


def test_bounds_by_hand():
    bounds = mean_difference_bounds([-0.2, -0.4], [[-1.0, 1.0], [0.0, 2.0]])
    assert bounds == pytest.approx(((-0.6 - 1.0) / 4, (-0.6 + 3.0) / 4))
    assert mean_difference_bounds([-0.2, -0.4], []) == pytest.approx((-0.3, -0.3))
    assert mean_difference_bounds([], [[-1, 2]]) == (-1, 2)


@PROPERTY
@given(arrays(np.float64, 9, elements=numbers), st.integers(0, 9))
def test_bounds_contain_whatever_the_missing_pairs_were(d, num_missing):
    bounds = mean_difference_bounds(d[num_missing:], np.stack([d[:num_missing] - 1, d[:num_missing] + 2], axis=1))
    assert bounds.low - 1e-9 <= d.mean() <= bounds.high + 1e-9
    assert bounds.high - bounds.low == pytest.approx(3 * num_missing / 9)


@pytest.mark.parametrize(
    ("observed", "limits", "message"),
    [
        ([], [], r"differences and unobserved_limits are both empty"),
        ([1.0, np.nan], [], r"^differences must be finite, got 1 NaN or infinite of 2 values"),
        ([1.0], [[1.0, 0.0]], r"^unobserved_limits must be \(lowest, highest\) per pair"),
        ([1.0], [[0.0, 1.0, 2.0]], r"^unobserved_limits must be \(lowest, highest\) per pair"),
        ([1.0], [0.0, 1.0], r"^unobserved_limits must have 2 axis"),
        ([1.0], [[0.0, np.inf]], r"^unobserved_limits must be finite"),
    ],
)
def test_bounds_refuse(observed, limits, message):
    with pytest.raises(ValueError, match=message):
        mean_difference_bounds(observed, limits)


def test_worst_rank_refuses_a_nan_that_no_flag_explains():
    with pytest.raises(ValueError, match=r"^differences of finished pairs must be finite, got 1 NaN"):
        worst_rank_test([0.1, np.nan, 0.2], flags(0, length=3), flags(length=3))


@pytest.mark.parametrize("bad", [[0, 1, 0], [True, False], [[True, False, True]]])
def test_worst_rank_refuses_flags_that_are_none(bad):
    with pytest.raises(ValueError, match=r"^arm_diverged must hold 3 booleans"):
        worst_rank_test([0.1, 0.3, 0.2], bad, flags(length=3))
