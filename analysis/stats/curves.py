"""Training curves as numbers: area over a window, steps to a threshold, pointwise bands.

Curves of one arm are an array of shape (num_runs, num_steps) over common steps. A declared scalar per seed can be
tested like any other outcome; a band is for the eye: it covers each step by itself, not the curve as a whole.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate, stats
from statsmodels.duration.survfunc import SurvfuncRight

from analysis.stats.checks import BoolArray, FloatArray, finite_array, flag_array, number_array, open_probability


@dataclass(frozen=True, eq=False)
class StepsToThreshold:
    """When each run first reached a threshold, right-censored.

    Attributes
    ----------
    steps : ndarray, shape (num_runs,)
        Step at which the run was first seen at or beyond the threshold, or the last step if it never was.
    censored : ndarray of bool, shape (num_runs,)
        Whether the run never reached it, so that `steps` is only a lower bound.
    """

    steps: FloatArray
    censored: BoolArray


@dataclass(frozen=True)
class CensoredSummary:
    """Steps to a threshold over the runs of one arm.

    Attributes
    ----------
    num_runs, num_reached : int
        Runs, and those that reached the threshold.
    median : float or None
        Kaplan-Meier median in steps.
    reason : str or None
        Why there is no median.
    """

    num_runs: int
    num_reached: int
    median: float | None
    reason: str | None


@dataclass(frozen=True, eq=False)
class PointwiseBand:
    """Mean curve and the t interval of each step by itself.

    Attributes
    ----------
    mean : ndarray, shape (num_steps,)
        Mean over runs.
    low, high : ndarray, shape (num_steps,), or None
        Ends of the intervals.
    reason : str or None
        Why there is no band.
    """

    mean: FloatArray
    low: FloatArray | None
    high: FloatArray | None
    reason: str | None


def area_under_curve(steps: ArrayLike, values: ArrayLike, *, window: tuple[float, float]) -> FloatArray:
    """Average each curve over a declared window of steps.

    Parameters
    ----------
    steps : array_like, shape (num_steps,)
        Strictly increasing.
    values : array_like, shape (num_runs, num_steps)
        One curve per run, in the units of the loss.
    window : tuple of float
        First and last step of the window, inside the range of `steps`.

    Returns
    -------
    ndarray, shape (num_runs,)
        Trapezoid area over the window divided by its length, in the units of the loss; the curve is interpolated
        linearly at the ends of the window.

    Raises
    ------
    ValueError
        If a value is NaN or infinite (a diverged run has no area), the steps do not increase, or the window is empty
        or not covered by the steps.
    """
    steps_T, values_RT = _curves(steps, finite_array("values", values, ndim=2, at_least=(1, 2)))
    start, end = (float(edge) for edge in window)
    if not steps_T[0] <= start < end <= steps_T[-1]:
        raise ValueError(f"window must lie inside steps {steps_T[0]:g} to {steps_T[-1]:g}, got {window!r}.")
    inside_T = (steps_T > start) & (steps_T < end)
    grid_G = np.concatenate(([start], steps_T[inside_T], [end]))
    curves_RG = np.stack([np.interp(grid_G, steps_T, values_T) for values_T in values_RT])
    return np.asarray(integrate.trapezoid(curves_RG, grid_G, axis=1) / (end - start))


def steps_to_threshold(
    steps: ArrayLike, values: ArrayLike, threshold: float, *, lower_is_better: bool = True
) -> StepsToThreshold:
    """Find when each run first reaches a threshold; a run that never does is censored, not dropped.

    Parameters
    ----------
    steps : array_like, shape (num_steps,)
        Strictly increasing.
    values : array_like, shape (num_runs, num_steps)
        One curve per run. From the step on at which a run diverged it is given as infinity on the worse side, and
        so counts as not reaching the threshold within the last step.
    threshold : float
        Reached at a value equal to it or better.
    lower_is_better : bool
        Direction of the metric.

    Returns
    -------
    StepsToThreshold
        Steps and flags, one per run, in the order given.

    Raises
    ------
    ValueError
        If a value is NaN, the steps do not increase, or `threshold` is not finite.
    """
    steps_T, values_RT = _curves(steps, number_array("values", values, ndim=2))
    if np.isnan(values_RT).any():
        raise ValueError(
            "values must not be NaN: give infinity on the worse side from the step on where a run diverged."
        )
    limit = float(finite_array("threshold", threshold, ndim=0))
    reached_RT = values_RT <= limit if lower_is_better else values_RT >= limit
    censored_R = np.asarray(~reached_RT.any(axis=1))
    return StepsToThreshold(np.where(censored_R, steps_T[-1], steps_T[reached_RT.argmax(axis=1)]), censored_R)


def summarise_steps(steps: ArrayLike, censored: ArrayLike) -> CensoredSummary:
    """Summarise right-censored steps to a threshold by their Kaplan-Meier median.

    Parameters
    ----------
    steps : array_like, shape (num_runs,)
        Step reached, or last step seen.
    censored : array_like of bool, shape (num_runs,)
        Whether the threshold was not reached.

    Returns
    -------
    CensoredSummary
        Without a median, and with the reason, unless more than half of the runs are estimated to reach the threshold.

    Raises
    ------
    ValueError
        If there is no run, a step is NaN or infinite, or the flags do not match.

    Notes
    -----
    Kaplan and Meier (1958). The median is the first step at which less than half of the runs are still on their way.
    """
    steps_R = finite_array("steps", steps, ndim=1, at_least=(1,))
    reached_R = ~flag_array("censored", censored, length=steps_R.size)
    # With no event at all the estimator has no table to read a median from.
    median = float(SurvfuncRight(steps_R, reached_R.astype(int)).quantile(0.5)) if reached_R.any() else np.nan
    exists = bool(np.isfinite(median))
    return CensoredSummary(
        num_runs=steps_R.size,
        num_reached=int(reached_R.sum()),
        median=median if exists else None,
        reason=None if exists else "not more than half of the runs reached the threshold, so there is no median",
    )


def pointwise_band(values: ArrayLike, *, confidence: float = 0.95) -> PointwiseBand:
    """Average curves and give each step its own t interval.

    Parameters
    ----------
    values : array_like, shape (num_runs, num_steps)
        One curve per run.
    confidence : float
        Coverage at each single step; that of the whole curve is lower.

    Returns
    -------
    PointwiseBand
        With one run it has a mean, no band, and the reason. Where all runs agree the band has no width.

    Raises
    ------
    ValueError
        If there is no run or a value is NaN or infinite.
    """
    values_RT = finite_array("values", values, ndim=2, at_least=(1, 1))
    open_probability("confidence", confidence)
    num_runs, mean_T = len(values_RT), values_RT.mean(axis=0)
    if num_runs < 2:
        return PointwiseBand(mean_T, None, None, "one run has no spread, so there is no band")
    quantile = float(stats.t.ppf((1 + confidence) / 2, num_runs - 1))
    half_T = quantile * values_RT.std(axis=0, ddof=1) / np.sqrt(num_runs)
    return PointwiseBand(mean_T, mean_T - half_T, mean_T + half_T, None)


def _curves(steps: ArrayLike, values_RT: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Check that the steps increase and that every curve has one value per step."""
    steps_T = finite_array("steps", steps, ndim=1, at_least=(1,))
    if (np.diff(steps_T) <= 0).any():
        raise ValueError("steps must increase strictly.")
    if values_RT.shape[1] != steps_T.size or len(values_RT) == 0:
        raise ValueError(f"values must have the shape (num_runs, {steps_T.size}), got {values_RT.shape}.")
    return steps_T, values_RT
