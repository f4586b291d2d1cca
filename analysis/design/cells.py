"""The expected grid of a sweep, each cell with what was found of it. One row per planned run, whatever became of it.

The columns that later steps read are `COLUMNS`; a simulation makes the same table without any file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.design.criteria import Criteria
from analysis.design.expected import differing_choices, expected_runs
from analysis.design.training import areas
from analysis.read.collect import Collected
from analysis.read.records import UNREADABLE
from kv_align.runs.errors import ConfigError
from kv_align.runs.program import program

IDENTITY = ("arm", "group", "control", "seed")
HASHES = ("data_order_sha256", "initial_weights_sha256")
METRICS = (
    "validation_loss",
    "exact_match",
    "probe_r2",
    "cosine",
    "training_area",
    "variance_share_min",
    "untrained_validation_loss",
)
COLUMNS = (*IDENTITY, "run", "state", "reason", *HASHES, "inputs", *METRICS)

FINISHED, DIVERGED, MISSING, DAMAGED = "finished", "diverged", "missing", "damaged"
"""States that later steps tell apart; every other one (failed, interrupted, running, damaged) is a run not ended."""


@dataclass(frozen=True, eq=False)
class Grid:
    """What was expected and what was found.

    Attributes
    ----------
    cells
        DataFrame with the columns of `COLUMNS`, one row per expected run; metrics are NaN where there are none.
    baseline
        The arm that the others are compared with.
    expected_percent
        Improvement that was expected of an arm, in percent; arms without an expectation are not in it.
    descriptions
        A sentence on an arm, where there is one.
    configs
        By (arm, group), the configuration of one of its runs; empty where it could not be read.
    planned
        Whether there was a frozen plan.
    window
        First and last step over which the training loss of the finished runs was averaged; None where they share none.
    """

    cells: pd.DataFrame
    baseline: str
    expected_percent: dict[str, float]
    descriptions: dict[str, str]
    configs: dict[tuple[str, str], dict[str, Any]]
    planned: bool
    window: tuple[float, float] | None = None

    @cached_property
    def arms(self) -> list[tuple[str, str, bool]]:
        """(arm, group, control), each once, in the order of the cells."""
        return list(dict.fromkeys(zip(self.cells["arm"], self.cells["group"], self.cells["control"], strict=True)))

    @cached_property
    def groups(self) -> list[str]:
        """Losses within which arms are compared; controls stand outside."""
        return list(dict.fromkeys(group for _, group, control in self.arms if not control))

    @cached_property
    def run_of(self) -> dict[tuple[str, str, int], str]:
        """The run folder of each (arm, group, seed), empty where there is none."""
        rows = zip(*(self.cells[name] for name in ("arm", "group", "seed", "run")), strict=True)
        return {(arm, group, int(seed)): run for arm, group, seed, run in rows}

    def differing(self, one: tuple[str, str], other: tuple[str, str]) -> tuple[str, ...]:
        """Name what the configurations of two (arm, group) differ in; empty where one could not be read."""
        return differing_choices(self.configs.get(one, {}), self.configs.get(other, {}))

    def group_of(self, arm: str, group: str) -> str | None:
        """The group under which an arm takes part in a comparison within `group`; None if it does not."""
        for name, own, control in self.arms:
            if name == arm and (own == group or control):
                return own
        return None


def grid_of(
    collected: Collected, criteria: Criteria, baseline: str | None = None, *, needs_baseline: bool = True
) -> Grid:
    """Lay what was collected over the expected grid.

    Parameters
    ----------
    collected, criteria
        The tables; the criteria say at which step and over which window is measured.
    baseline
        Arm to compare with; None: the plan's, or the flat arm of a multirun.
    needs_baseline
        Whether a multirun in which no arm offers itself is refused; else its first arm is named as the baseline.

    Raises
    ------
    ConfigError
        If `baseline` is not an arm of the sweep, or a multirun has none that offers itself.
    """
    expected = expected_runs(collected)
    runs, window = _with_metrics(collected, criteria, {run.folder for run in expected.runs})
    rows = [
        {"arm": run.arm, "group": run.group, "control": run.control, "seed": run.seed}
        | _with_inputs(cell_of(runs.get(run.folder)), run.inputs)
        for run in expected.runs
    ]
    names = list(dict.fromkeys(run.arm for run in expected.runs))
    chosen = baseline or expected.baseline or (None if needs_baseline else names[0])
    if chosen is None:
        raise ConfigError(
            f"{collected.sweep} holds no flat arm to compare with: its arms are {', '.join(names)}; choose one with "
            "--baseline ARM."
        )
    if needs_baseline and all(run.control for run in expected.runs):
        raise ConfigError(
            f"{collected.sweep} holds controls only ({', '.join(names)}), which stand outside every loss: compare two of "
            f"them with {program('analysis')} compare SWEEP:ARM SWEEP:ARM."
        )
    if chosen not in names:
        raise ConfigError(
            f"--baseline={chosen} is not allowed: the arms are {', '.join(names)}; choose one with --baseline ARM."
        )
    return Grid(
        cells=pd.DataFrame(rows, columns=list(COLUMNS)),
        baseline=chosen,
        # What was expected was expected against the plan's baseline.
        expected_percent=expected.percent if chosen == expected.baseline else {},
        descriptions=expected.descriptions,
        configs=expected.configs,
        planned=collected.plan is not None,
        window=window,
    )


def _with_metrics(
    collected: Collected, criteria: Criteria, used: Collection[str]
) -> tuple[dict[str, dict[str, Any]], tuple[float, float] | None]:
    """By run, the columns of `runs` and the metrics that are computed from other tables; the window of training loss.

    The window is that of the finished runs that are `used`: no other in the folder may cut it short.
    """
    runs = collected.runs
    by_run: dict[str, dict[str, Any]] = {str(row["run"]): {**row} for row in runs.to_dict("records")}  # type: ignore[dict-item]
    steps = collected.training()
    finished = [run for run, row in by_run.items() if run in used and _state(row)[0] == FINISHED]
    found = areas(steps, finished, criteria.training_window)
    for run, area in found.by_run.items():
        by_run[run]["training_area"] = area
    if criteria.primary.step != "last":
        evaluations = collected.table("evaluations", ["run", "step", "validation_loss"])
        at_step = evaluations[evaluations["step"] == criteria.primary.step]
        chosen = dict(zip(at_step["run"], at_step["validation_loss"], strict=True))
        for run, row in by_run.items():
            row["loss_at_step"] = chosen.get(run)
    return by_run, found.window


def cell_of(row: dict[str, Any] | None) -> dict[str, Any]:
    """Columns of a cell out of a row of `runs`; None where no folder holds the run.

    `training_area` is added to the row, and `loss_at_step` where the criteria name a step that is not the last.
    """
    if row is None:
        return {"run": "", "state": MISSING, "reason": "no folder holds it", **dict.fromkeys((*HASHES, "inputs"), "")}
    state, reason = _state(row)
    cell = {"run": row["run"], "state": state, "reason": reason}
    cell |= {name: row.get(name) or "" for name in (*HASHES, "inputs")}
    values: dict[str, Any] = {name: row.get(name) for name in METRICS} if state == FINISHED else {}
    for name in ("probe_r2", "cosine"):
        both = [row.get(f"{name}_{kind}") for kind in ("key", "value")]
        if state == FINISHED and all(value is not None and value == value for value in both):
            values[name] = sum(both) / 2  # type: ignore[arg-type]
    if "loss_at_step" in row and state == FINISHED:
        values["validation_loss"] = row["loss_at_step"]
    values["untrained_validation_loss"] = row.get("untrained_validation_loss")
    values["variance_share_min"] = row.get("variance_share_min")
    return cell | values


def _with_inputs(cell: dict[str, Any], configured: dict[str, Any]) -> dict[str, Any]:
    """The cell with what its run read: as its provenance recorded it, else as its configuration has it."""
    return cell if cell["inputs"] or not configured else cell | {"inputs": json.dumps(configured, sort_keys=True)}


def _state(row: dict[str, Any]) -> tuple[str, str]:
    """What a run counts as: only one that says so has diverged; one whose numbers are missing or contradicted is "
    "damaged."""
    state, reason = row["state"], row.get("reason") or ""
    if state == UNREADABLE:
        return state, "its folder or its status cannot be read"
    if len(row["contradictions"]):
        return DAMAGED, "; ".join(row["contradictions"])
    if state != FINISHED:
        return state, reason
    if not row["has_summary"]:
        return DAMAGED, "it finished, but its summary cannot be read"
    loss = row.get("validation_loss")
    if loss is None or loss != loss:
        return DAMAGED, "it finished, but its validation loss is missing, or not a finite number"
    return FINISHED, ""


def coverage(cells: pd.DataFrame) -> tuple[int, int]:
    """Return (runs that ended, runs expected): a diverged run has ended, it is an outcome."""
    return int(cells["state"].isin([FINISHED, DIVERGED]).sum()), len(cells)


def states(cells: pd.DataFrame) -> Counter[str]:
    """Return how many cells are in each state."""
    return Counter(cells["state"])
