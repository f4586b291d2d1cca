"""Paired summaries, effect sizes and Holm against published answers and against what must not change them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from analysis.stats.paired import Interval, hedges_correction, holm, paired_summary, relative_percent

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
# Student (1908), extra hours of sleep under two drugs.
SLEEP = np.subtract(
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0, 2], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
)
differences = arrays(
    np.float64, st.integers(3, 12), elements=st.integers(-1000, 1000).map(lambda number: number / 64)
).filter(lambda d: np.ptp(d) > 0)


def test_sleep_data_give_the_reference_answers():
    summary = paired_summary(SLEEP)
    assert summary.t == pytest.approx(-4.062128, abs=5e-7)
    assert summary.p_value == pytest.approx(0.00283289, abs=5e-9)
    assert summary.interval == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert summary.dz == pytest.approx(-1.284558, abs=5e-7)
    assert summary.hedges_g == pytest.approx(-1.173925, abs=5e-7)
    assert summary.mean == pytest.approx(-1.58)
    assert summary.sd == pytest.approx(np.std(SLEEP, ddof=1))
    assert (summary.num_pairs, summary.wins, summary.ties, summary.losses) == (10, 9, 1, 0)
    assert summary.reason is None


def test_higher_is_better_swaps_wins_and_losses_only():
    lower, higher = paired_summary(SLEEP), paired_summary(SLEEP, lower_is_better=False)
    assert (higher.wins, higher.ties, higher.losses) == (0, 1, 9)
    assert (higher.mean, higher.interval, higher.dz) == (lower.mean, lower.interval, lower.dz)


@pytest.mark.parametrize("constant", [0.0, -0.05, 0.1 + 0.2, 1e-320])
def test_differences_without_variance_have_no_t_and_say_so(constant):
    summary = paired_summary([constant] * 5)
    assert summary.mean == pytest.approx(constant)
    assert summary.t is summary.p_value is summary.interval is summary.dz is summary.hedges_g is None
    assert summary.reason == "the differences do not vary, so there is no t statistic"


def test_differences_that_vary_by_rounding_alone_have_no_t():
    assert paired_summary([0.3, 0.1 + 0.2, 0.3]).reason is not None


def test_one_pair_has_a_mean_and_nothing_else():
    summary = paired_summary([-0.2])
    assert (summary.mean, summary.wins, summary.sd, summary.t, summary.interval) == (-0.2, 1, None, None, None)
    assert summary.reason == "one pair has no spread, so there is no t statistic"


def test_two_pairs_have_a_t_but_no_hedges_g():
    summary = paired_summary([1.0, 2.0])
    assert summary.t == pytest.approx(3.0)
    assert summary.hedges_g is None


@pytest.mark.parametrize(
    # Closed forms of the gamma functions.
    ("freedom", "expected"),
    [(2, 1 / math.sqrt(math.pi)), (3, math.sqrt(math.pi / 6)), (4, math.sqrt(2 / math.pi)), (9, 1.173925 / 1.284558)],
)
def test_hedges_correction(freedom, expected):
    assert hedges_correction(freedom) == pytest.approx(expected, abs=1e-6)


def test_hedges_g_is_unbiased():
    rng = np.random.default_rng(3)
    d = rng.normal(0.8, 1.0, size=(200_000, 5))
    g = hedges_correction(4) * d.mean(axis=1) / d.std(axis=1, ddof=1)
    assert g.mean() == pytest.approx(0.8, abs=4 * g.std() / math.sqrt(len(g)))


def test_interval_covers_at_its_level():
    rng = np.random.default_rng(4)
    covered = 0
    for d in rng.normal(0.3, 1.0, size=(1500, 5)):
        interval = paired_summary(d, confidence=0.9).interval
        assert interval is not None
        covered += interval.low <= 0.3 <= interval.high
    low, high = stats.binom.interval(0.9999, 1500, 0.9)
    assert low <= covered <= high


@PROPERTY
@given(differences, st.floats(0.01, 100))
def test_scale_changes_units_and_nothing_else(d, scale):
    summary, scaled = paired_summary(d), paired_summary(d * scale)
    assert scaled.t == pytest.approx(summary.t, rel=1e-9, abs=1e-12)
    assert scaled.hedges_g == pytest.approx(summary.hedges_g, rel=1e-9, abs=1e-12)
    assert scaled.mean == pytest.approx(summary.mean * scale, rel=1e-9, abs=1e-12)
    assert (scaled.wins, scaled.losses) == (summary.wins, summary.losses)


@PROPERTY
@given(differences)
def test_swapping_arm_and_baseline_mirrors_the_summary(d):
    summary, swapped = paired_summary(d), paired_summary(-d)
    assert summary.interval is not None
    assert swapped.p_value == pytest.approx(summary.p_value)
    assert swapped.interval == pytest.approx((-summary.interval.high, -summary.interval.low))
    assert (swapped.wins, swapped.losses) == (summary.losses, summary.wins)


@PROPERTY
@given(differences)
def test_interval_excludes_zero_exactly_when_p_is_below_alpha(d):
    summary = paired_summary(d)
    assert isinstance(summary.interval, Interval)
    assert (summary.p_value < 0.05) == (summary.interval.low > 0 or summary.interval.high < 0)


def test_relative_percent_of_logarithms_and_of_a_baseline():
    assert relative_percent(math.log(0.97)) == pytest.approx(-3.0)
    assert relative_percent(-0.6, baseline=20.0) == pytest.approx(-3.0)
    with pytest.raises(ValueError, match=r"baseline must be a finite number above 0, got 0"):
        relative_percent(0.1, baseline=0)


def test_holm_reference():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-12)
    assert holm([]).shape == (0,)


@settings(PROPERTY, max_examples=25)  # the library collects garbage in every call
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_between_raw_and_bonferroni(p_values):
    raw, adjusted = np.array(p_values), holm(p_values)
    order = np.argsort(raw, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    assert (adjusted >= raw - 1e-15).all()
    assert (adjusted <= np.minimum(1, raw * raw.size) + 1e-12).all()
    assert adjusted.min() == pytest.approx(min(1, raw.size * raw.min()))


@pytest.mark.parametrize("bad", [[0.1, np.nan], [0.1, None], [-0.01], [1.01], [[0.1]]])
def test_holm_refuses_what_is_no_p_value(bad):
    with pytest.raises(ValueError, match=r"^p_values must"):
        holm(bad)


@pytest.mark.parametrize(
    "bad", [[1.0, np.nan], [np.inf, 1.0], [], [[1.0, 2.0]], ["a", "b"], [1.0, None], [[1], [1, 2]]]
)
def test_summary_refuses_nan_and_other_shapes(bad):
    with pytest.raises(ValueError, match=r"^differences must [^\n]*\.$"):
        paired_summary(bad)


def test_summary_refuses_a_confidence_in_percent():
    with pytest.raises(ValueError, match=r"confidence must lie strictly between 0 and 1, got 95"):
        paired_summary(SLEEP, confidence=95)
