"""What each arm cost: time, tokens, parameters, and an estimate of the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.design.cells import Grid

FLOPS_NOTE = (
    "Floating-point operations are an estimate: 6 per token and trained parameter (student and aligner), 2 per token "
    "and parameter of a teacher that is read; attention is left out (Kaplan et al. 2020)."
)


@dataclass(frozen=True)
class ArmCost:
    """Means over the runs of an arm that ended; None where it was not recorded.

    Attributes
    ----------
    arm, group
        Which.
    num_runs
        Runs that the means are of.
    hours
        Time spent in optimizer steps, all runs together, in hours of one device: of runs that did not finish what they
        logged.
    tokens
        Student tokens seen by a run.
    student, aligner, teacher
        Trained parameters of student and aligner, parameters of the teacher.
    flops
        Of one run; see `FLOPS_NOTE`.
    step_s
        Median seconds per optimizer step.
    """

    arm: str
    group: str
    num_runs: int
    hours: float | None
    tokens: float | None
    student: float | None
    aligner: float | None
    teacher: float | None
    flops: float | None
    step_s: float | None


def costs(grid: Grid, runs: pd.DataFrame, metrics: pd.DataFrame) -> list[ArmCost]:
    """Return the cost of every arm, in the order of the sweep.

    Parameters
    ----------
    grid
        Whose arms.
    runs, metrics
        Of `analysis.read.collect`; of the metrics `run` and `elapsed_s`.
    """
    logged = metrics.groupby("run", observed=True)["elapsed_s"].max()
    logged.index = logged.index.astype(str)
    by_arm = []
    for arm, group, _ in grid.arms:
        cells = grid.cells[(grid.cells["arm"] == arm) & (grid.cells["group"] == group)]
        own = runs.loc[[run for run in cells["run"] if run in runs.index]]
        spent = logged.reindex(own.index).astype(float)
        if "elapsed_s" in own.columns:
            spent = own["elapsed_s"].astype(float).fillna(spent)
        tokens, student, aligner, teacher = (
            _mean(own, name) for name in ("tokens", "parameters_student", "parameters_aligner", "parameters_teacher")
        )
        flops = None
        if tokens is not None and student is not None and aligner is not None and teacher is not None:
            reads_teacher = (grid.configs.get((arm, group), {}).get("loss") or {}).get("name") != "ce"
            flops = tokens * (6 * (student + aligner) + (2 * teacher if reads_teacher else 0))
        step_s = _mean(own, "step_time_s_median")
        hours = float(spent.sum()) / 3600 if spent.notna().any() else None
        by_arm.append(ArmCost(arm, group, len(own), hours, tokens, student, aligner, teacher, flops, step_s))
    return by_arm


def _mean(runs: pd.DataFrame, column: str) -> float | None:
    values = _values(runs, column)
    return float(values.mean()) if values.size else None


def _values(runs: pd.DataFrame, column: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if column not in runs.columns:
        return np.array([], dtype=np.float64)
    values: np.ndarray[tuple[int], np.dtype[np.float64]] = runs[column].dropna().to_numpy(dtype=np.float64)
    return values
