"""Training curves out of the metrics table: the area of each run, curves of an arm on common steps, thresholds.

The mathematics is in `analysis.stats.curves`; this module finds which steps the runs have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import pandas as pd

from analysis.stats.checks import FloatArray
from analysis.stats.curves import CensoredSummary, area_under_curve, steps_to_threshold, summarise_steps


@dataclass(frozen=True)
class Areas:
    """Average training loss of each run over the same window.

    Attributes
    ----------
    by_run
        In nats per token; a run whose loss is not finite in the window is not in it.
    window
        First and last step, or None where the runs share no window.
    """

    by_run: dict[str, float]
    window: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of some runs on the steps that all of them have.

    Attributes
    ----------
    runs
        In the order of the rows.
    steps
        (T,), strictly increasing.
    values
        (R, T), finite.
    """

    runs: tuple[str, ...]
    steps: FloatArray
    values: FloatArray


def areas(metrics: pd.DataFrame, runs: list[str], window: tuple[int, int]) -> Areas:
    """Average the task loss of runs over the declared window, cut to what all of them logged.

    Parameters
    ----------
    metrics
        `run`, `step`, `task_loss`.
    runs
        Those that are compared.
    window
        First and last step as declared.
    """
    series = {run: curve for run, curve in _series(metrics, runs, "task_loss").items() if len(curve[0]) > 1}
    if not series:
        return Areas({}, None)
    start = max(float(window[0]), max(float(steps[0]) for steps, _ in series.values()))
    end = min(float(window[1]), min(float(steps[-1]) for steps, _ in series.values()))
    if not start < end:
        return Areas({}, None)
    sound = {
        run: (steps, values)
        for run, (steps, values) in series.items()
        if np.isfinite(values[(steps >= start) & (steps <= end)]).all() and np.isfinite(values).all()
    }
    by_run = {
        run: float(area_under_curve(steps, values[None, :], window=(start, end))[0])
        for run, (steps, values) in sound.items()
    }
    return Areas(by_run, (start, end))


def curves(table: pd.DataFrame, runs: list[str], column: str, *, until: float = np.inf) -> Curves | None:
    """Return the curves of those runs that have finite values, on their common steps; None if there is nothing.

    Parameters
    ----------
    table
        `run`, `step` and `column`.
    until
        Last step of interest.
    """
    if column not in table.columns:
        return None
    series = _series(table, runs, column)
    kept = {}
    for run, (steps, values) in series.items():
        sound = np.isfinite(values) & (steps <= until)
        if sound.any():
            kept[run] = (steps[sound], values[sound])
    if not kept:
        return None
    common = reduce(partial(np.intersect1d, assume_unique=True), (steps for steps, _ in kept.values()))
    if len(common) == 0:
        return None
    values = np.stack([curve[np.searchsorted(steps, common)] for steps, curve in kept.values()])
    return Curves(tuple(kept), common.astype(np.float64), values)


def thresholds(
    metrics: pd.DataFrame,
    runs_by_arm: dict[str, list[str]],
    baseline: str,
    *,
    share: float,
    window: tuple[float, float],
) -> tuple[float, dict[str, CensoredSummary]] | None:
    """Steps until a run's task loss has fallen by a share of the baseline's mean fall over the window.

    Parameters
    ----------
    metrics
        `run`, `step`, `task_loss`.
    runs_by_arm
        Runs that finished or diverged.
    baseline, share, window
        Whose fall over which steps; the window is one that all finished runs have.

    Returns
    -------
    The threshold in nats, and the censored summary of each arm; None where the baseline has no curve that falls.
    """
    start, end = window
    whole = [
        run
        for run, (steps, values) in _series(metrics, runs_by_arm.get(baseline, []), "task_loss").items()
        if steps[-1] >= end and np.isfinite(values).all()
    ]
    reference = curves(metrics, whole, "task_loss", until=end)
    if reference is None or len(reference.steps) < 2:
        return None
    mean_T = reference.values.mean(axis=0)
    first, last = float(np.interp(start, reference.steps, mean_T)), float(np.interp(end, reference.steps, mean_T))
    if not last < first:
        return None
    threshold = first - share * (first - last)
    by_arm = {}
    for arm, runs in runs_by_arm.items():
        reached = [
            _reached(steps, values, threshold, end) for steps, values in _series(metrics, runs, "task_loss").values()
        ]
        if reached:
            by_arm[arm] = summarise_steps([step for step, _ in reached], [censored for _, censored in reached])
    return threshold, by_arm


def _reached(steps: FloatArray, values: FloatArray, threshold: float, end: float) -> tuple[float, bool]:
    """Step at which one run reached the threshold, and whether it never did; a run that diverged never does later."""
    inside = steps <= end
    finite = np.where(np.isfinite(values[inside]), values[inside], np.inf)
    steps, values = steps[inside], np.where(np.maximum.accumulate(np.isinf(finite)), np.inf, finite)
    if len(steps) == 0 or steps[-1] < end:
        steps, values = np.append(steps, end), np.append(values, np.inf)
    first = steps_to_threshold(steps, values[None, :], threshold)
    return float(first.steps[0]), bool(first.censored[0])


def _series(table: pd.DataFrame, runs: list[str], column: str) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Steps and values of each run, in the order of `runs`."""
    wanted = table[table["run"].isin(runs)]
    names = wanted["run"].astype(str).to_numpy()
    steps = wanted["step"].to_numpy(dtype=np.float64)
    values = wanted[column].to_numpy(dtype=np.float64)
    edges = np.flatnonzero(names[1:] != names[:-1]) + 1 if len(names) else np.array([], dtype=int)
    by_run = {
        str(names[start]): (steps[start:stop], values[start:stop])
        for start, stop in zip([0, *edges], [*edges, len(names)], strict=True)
        if stop > start
    }
    return {run: by_run[run] for run in runs if run in by_run}
