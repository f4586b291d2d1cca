"""Per-example outcomes: reference answers, the crossed variance from its definition, and its level."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from analysis.stats.outcomes import crossed_mean, mcnemar
from analysis.stats.paired import paired_summary

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
outcomes = arrays(
    np.float64, st.tuples(st.integers(2, 7), st.integers(2, 12)), elements=st.sampled_from([-1.0, 0, 1.0])
)


def test_mcnemar_reference_is_the_one_without_continuity_correction():
    test = mcnemar([[794, 86], [150, 570]])
    assert test.statistic == pytest.approx(17.35593, abs=5e-6)
    assert test.p_value == pytest.approx(3.0993e-5, abs=5e-10)
    assert test.exact_p_value == pytest.approx(stats.binomtest(86, 236).pvalue)
    assert (test.num_discordant, test.scope) == (236, "these checkpoints, not the method")


def test_mcnemar_without_discordant_examples_says_so():
    test = mcnemar([[10, 0], [0, 7]])
    assert (test.statistic, test.p_value, test.exact_p_value) == (None, None, 1.0)
    assert test.reason == "the checkpoints agree on every example, so there is no statistic"


def test_mcnemar_exact_p_is_no_more_than_one():
    assert mcnemar([[3, 2], [2, 5]]).exact_p_value == 1.0


@pytest.mark.parametrize("bad", [[[1, 2]], [[1, 2], [3, -1]], [[1.5, 2], [3, 4]], [[1, np.nan], [3, 4]], [1, 2, 3, 4]])
def test_mcnemar_refuses_what_is_no_table(bad):
    with pytest.raises(ValueError, match=r"^table must"):
        mcnemar(bad)


@PROPERTY
@given(outcomes)
def test_crossed_variance_equals_two_way_analysis_of_variance(d_SI):
    num_seeds, num_items = d_SI.shape
    grand = d_SI.mean()
    square_seed = num_items * sum((row.mean() - grand) ** 2 for row in d_SI)
    square_item = num_seeds * sum((column.mean() - grand) ** 2 for column in d_SI.T)
    square_rest = ((d_SI - grand) ** 2).sum() - square_seed - square_item
    result = crossed_mean(d_SI)
    cells = d_SI.size
    assert result.variance_seed == pytest.approx(square_seed / (num_seeds - 1) / cells, abs=1e-12)
    assert result.variance_item == pytest.approx(square_item / (num_items - 1) / cells, abs=1e-12)
    freedom = (num_seeds - 1) * (num_items - 1)
    assert result.variance_residual == pytest.approx(square_rest / freedom / cells, abs=1e-12)
    total = result.variance_seed + result.variance_item - result.variance_residual
    assert result.standard_error**2 == pytest.approx(max(total, result.variance_seed), abs=1e-12)


@PROPERTY
@given(outcomes)
def test_crossed_test_is_never_bolder_than_the_t_test_over_seeds(d_SI):
    result, seeds = crossed_mean(d_SI), paired_summary(d_SI.mean(axis=1))
    assert result.mean == pytest.approx(seeds.mean, abs=1e-12)
    if seeds.t is not None and result.t is not None:
        assert result.p_value >= seeds.p_value - 1e-9
        assert (result.p_value < 0.05) == (result.interval.low > 0 or result.interval.high < 0)


def test_without_item_effects_it_is_the_t_test_over_seeds():
    d_SI = np.array([[1.0, -1.0, 0.0], [-1.0, 2.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    result, seeds = crossed_mean(d_SI), paired_summary(d_SI.mean(axis=1))
    assert result.variance_item < result.variance_residual
    assert result.p_value == pytest.approx(seeds.p_value)
    assert result.interval == pytest.approx(seeds.interval)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_outcomes_that_do_not_vary_have_no_t(value):
    result = crossed_mean(np.full((4, 9), value))
    assert result.mean == value
    assert result.t is result.p_value is result.interval is None
    assert result.reason == "the differences do not vary over seeds or items, so there is no t statistic"


@pytest.mark.parametrize(
    ("num_seeds", "seed_sd", "item_sd"), [(3, 0.0, 0.0), (5, 0.1, 0.0), (5, 0.1, 0.3), (8, 0.05, 0.8)]
)
def test_crossed_test_keeps_its_level(num_seeds, seed_sd, item_sd):
    rng, num_simulations, num_items = np.random.default_rng(31), 800, 60
    rejections = 0
    for _ in range(num_simulations):
        seed_S1 = rng.normal(0, seed_sd, (num_seeds, 1))
        item_1I = rng.normal(0, item_sd, (1, num_items))
        result = crossed_mean(seed_S1 + item_1I + rng.normal(size=(num_seeds, num_items)))
        rejections += result.p_value < 0.05
    assert rejections <= stats.binom.ppf(0.9999, num_simulations, 0.05)


def test_standard_error_is_the_true_one_and_taking_items_as_fixed_is_not():
    rng, num_simulations = np.random.default_rng(32), 1500
    shape = (8, 50)
    results = [
        crossed_mean(rng.normal(0, 0.3, (8, 1)) + rng.normal(0, 0.9, (1, 50)) + rng.normal(size=shape))
        for _ in range(num_simulations)
    ]
    true_variance = 0.09 / 8 + 0.81 / 50 + 1 / 400
    squared = np.array([result.standard_error**2 for result in results])
    assert squared.mean() == pytest.approx(true_variance, abs=4 * squared.std() / np.sqrt(num_simulations))
    # The seed-level t asks about these 50 items only, and is too bold about new ones.
    bold = np.mean([abs(r.mean) / np.sqrt(r.variance_seed) > stats.t.ppf(0.975, 7) for r in results])
    assert bold > 0.12


def test_pooled_mcnemar_is_too_bold_about_the_method():
    # The case of the declared analysis: 5 seeds, 1,319 items, 1.5 points between runs of one and the same method.
    rng, num_simulations, num_seeds, num_items = np.random.default_rng(33), 400, 5, 1319
    pooled = crossed = 0
    for _ in range(num_simulations):
        difficulty_I = np.clip(rng.beta(1.0, 1.6, num_items), 0.03, 0.97)
        shift = rng.normal(0, 0.015, (2, num_seeds, 1))
        arm, baseline = rng.random((2, num_seeds, num_items)) < np.clip(difficulty_I + shift, 0, 1)
        b, c = np.count_nonzero(arm & ~baseline), np.count_nonzero(baseline & ~arm)
        pooled += mcnemar([[0, b], [c, 0]]).p_value < 0.05
        crossed += crossed_mean(arm.astype(float) - baseline.astype(float)).p_value < 0.05
    assert pooled > 0.15 * num_simulations
    assert crossed <= stats.binom.ppf(0.9999, num_simulations, 0.05)


@pytest.mark.parametrize("bad", [np.zeros((1, 5)), np.zeros((5, 1)), np.zeros(5), [[1.0, np.nan], [0.0, 1.0]]])
def test_crossed_mean_refuses_one_seed_and_nan(bad):
    with pytest.raises(ValueError, match=r"^differences must [^\n]*\.$"):
        crossed_mean(bad)
