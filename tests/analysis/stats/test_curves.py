"""Curves as numbers: areas by hand, thresholds that are never reached, medians under censoring, pointwise bands."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from analysis.stats.curves import area_under_curve, pointwise_band, steps_to_threshold, summarise_steps

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
STEPS = np.array([0, 10, 30, 60, 100])
numbers = st.integers(-1000, 1000).map(lambda number: number / 64)
curves = arrays(np.float64, st.tuples(st.integers(1, 5), st.just(5)), elements=numbers)


def test_area_by_hand():
    loss = [[4.0, 2.0, 2.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0, 5.0]]
    # Trapezoids 30 + 40 + 45 + 40 over 100 steps.
    assert area_under_curve(STEPS, loss, window=(0, 100)) == pytest.approx([1.55, 5.0])
    # From 5 to 45: 12.5 down to step 10, 40 up to step 30, then from 2 to 1.5 over 15 steps.
    assert area_under_curve(STEPS, loss, window=(5, 45)) == pytest.approx([(12.5 + 40 + 26.25) / 40, 5.0])
    # Between two logged steps.
    assert area_under_curve(STEPS, loss, window=(2, 4)) == pytest.approx([3.4, 5.0])


@PROPERTY
@given(curves, numbers, st.floats(0.01, 100))
def test_area_is_linear_in_the_loss_and_independent_of_the_unit_of_steps(values, offset, scale):
    area = area_under_curve(STEPS, values, window=(5, 80))
    assert area_under_curve(STEPS, scale * values + offset, window=(5, 80)) == pytest.approx(
        scale * area + offset, rel=1e-9, abs=1e-9
    )
    assert area_under_curve(STEPS * 8, values, window=(40, 640)) == pytest.approx(area, abs=1e-9)
    assert (values.min(axis=1) - 1e-9 <= area).all()
    assert (area <= values.max(axis=1) + 1e-9).all()


@PROPERTY
@given(curves)
def test_areas_of_two_windows_add_up(values):
    first, second = (area_under_curve(STEPS, values, window=window) for window in ((0, 40), (40, 100)))
    assert area_under_curve(STEPS, values, window=(0, 100)) == pytest.approx(0.4 * first + 0.6 * second, abs=1e-9)


@pytest.mark.parametrize("window", [(-1, 50), (0, 101), (50, 50), (60, 40), (np.nan, 50)])
def test_area_refuses_a_window_the_steps_do_not_cover(window):
    with pytest.raises(ValueError, match=r"^window must lie inside steps 0 to 100, got"):
        area_under_curve(STEPS, np.ones((2, 5)), window=window)


def test_threshold_by_hand():
    loss = [[4.0, 2.0, 1.0, 2.0, 1.0], [4.0, 3.0, 3.0, 3.0, 1.5], [4.0, 3.0, 3.0, 3.0, 3.0], [1.0, 9.0, 9.0, 9.0, 9.0]]
    result = steps_to_threshold(STEPS, loss, 1.5)
    assert result.steps.tolist() == [30, 100, 100, 0]
    assert result.censored.tolist() == [False, False, True, False]
    mirrored = steps_to_threshold(STEPS, -np.array(loss), -1.5, lower_is_better=False)
    assert mirrored.steps.tolist() == result.steps.tolist()
    assert mirrored.censored.tolist() == result.censored.tolist()


def test_a_diverged_run_is_censored_at_the_end_unless_it_got_there_first():
    loss = [[4.0, 3.0, np.inf, np.inf, np.inf], [4.0, 1.0, np.inf, np.inf, np.inf]]
    result = steps_to_threshold(STEPS, loss, 1.5)
    assert result.steps.tolist() == [100, 10]
    assert result.censored.tolist() == [True, False]


@PROPERTY
@given(curves, numbers, numbers)
def test_no_run_is_dropped_and_a_harder_threshold_is_not_reached_earlier(values, first, second):
    hard, easy = (steps_to_threshold(STEPS, values, threshold) for threshold in sorted((first, second)))
    assert easy.steps.shape == easy.censored.shape == (len(values),)
    assert (easy.steps <= hard.steps).all()
    assert (easy.censored <= hard.censored).all()
    assert (easy.steps[easy.censored] == 100).all()


@pytest.mark.parametrize(
    ("steps", "values", "threshold", "message"),
    [
        (STEPS, [[1, 2, 3, 4, np.nan]], 1.0, r"^values must not be NaN"),
        (STEPS, [[1, 2, 3, 4, 5]], np.nan, r"^threshold must be finite"),
        (STEPS, [[1, 2, 3]], 1.0, r"^values must have the shape \(num_runs, 5\), got \(1, 3\)"),
        (STEPS, np.zeros((0, 5)), 1.0, r"^values must have the shape"),
        ([0, 10, 10], [[1, 2, 3]], 1.0, r"^steps must increase strictly"),
        ([0, np.nan, 10], [[1, 2, 3]], 1.0, r"^steps must be finite"),
    ],
)
def test_threshold_refuses(steps, values, threshold, message):
    with pytest.raises(ValueError, match=message):
        steps_to_threshold(steps, values, threshold)


@pytest.mark.parametrize(
    ("steps", "censored", "median"),
    [
        ([10, 20, 30], [False] * 3, 20.0),
        ([10, 20, 30, 100, 100], [False, False, False, True, True], 30.0),
        ([10, 20, 100, 100], [False, False, True, True], None),  # half is not more than half
        ([100, 100], [True, True], None),
        ([70], [False], 70.0),
        # A run lost at step 15 leaves three at risk: 3/4, then a third of that less at 20 and again at 30.
        ([10, 15, 20, 30, 40], [False, True, False, False, False], 30.0),
    ],
)
def test_kaplan_meier_median(steps, censored, median):
    summary = summarise_steps(steps, censored)
    assert summary.median == median
    assert (summary.num_runs, summary.num_reached) == (len(steps), len(steps) - sum(censored))
    assert (summary.reason is None) == (median is not None)


def test_dropping_censored_runs_would_give_another_median():
    steps, censored = [10, 20, 100, 100, 100], [False, False, True, True, True]
    assert summarise_steps(steps, censored).median is None
    assert summarise_steps(steps[:2], censored[:2]).median == 20


@pytest.mark.parametrize(
    ("steps", "censored", "name"),
    [
        ([], [], "steps"),
        ([1.0, np.nan], [True, False], "steps"),
        ([1.0], [0], "censored"),
        ([1.0], [True] * 2, "censored"),
    ],
)
def test_summary_of_steps_refuses(steps, censored, name):
    with pytest.raises(ValueError, match=rf"^{name} must [^\n]*\.$"):
        summarise_steps(steps, np.array(censored, dtype=bool) if steps == [] else censored)


def test_band_is_the_t_interval_of_each_step():
    values = np.random.default_rng(61).normal(size=(6, 4))
    band = pointwise_band(values, confidence=0.9)
    for step in range(4):
        interval = stats.ttest_1samp(values[:, step], 0).confidence_interval(0.9)
        assert (band.low[step], band.high[step]) == pytest.approx((interval.low, interval.high))
    assert band.mean == pytest.approx(values.mean(axis=0))


def test_band_of_one_run_is_missing_and_of_equal_runs_has_no_width():
    alone = pointwise_band([[1.0, 2.0]])
    assert (alone.mean.tolist(), alone.low, alone.high) == ([1.0, 2.0], None, None)
    assert alone.reason == "one run has no spread, so there is no band"
    equal = pointwise_band([[1.0, 2.0], [1.0, 4.0]])
    assert equal.low[0] == equal.high[0] == 1.0
    assert equal.low[1] < 3.0 < equal.high[1]


def test_band_covers_each_step_but_not_the_whole_curve():
    rng, num_simulations = np.random.default_rng(62), 1200
    inside = np.array(
        [
            (band.low <= 0) & (band.high >= 0)
            for band in (pointwise_band(values) for values in rng.normal(size=(num_simulations, 5, 10)))
        ]
    )
    low, high = stats.binom.interval(0.9999, num_simulations, 0.95)
    assert ((low <= inside.sum(axis=0)) & (inside.sum(axis=0) <= high)).all()
    assert inside.all(axis=1).mean() < 0.75


@pytest.mark.parametrize("bad", [[1.0, 2.0], np.zeros((0, 3)), [[1.0, np.nan]], [[np.inf, 1.0]]])
def test_band_and_area_refuse_nan_and_other_shapes(bad):
    with pytest.raises(ValueError, match=r"^values must [^\n]*\.$"):
        pointwise_band(bad)
    with pytest.raises(ValueError, match=r"^values must [^\n]*\.$"):
        area_under_curve([0, 1], bad, window=(0, 1))
