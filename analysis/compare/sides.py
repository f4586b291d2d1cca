"""The two sides of a comparison: a run's folder, or an arm of a sweep (SWEEP:ARM or SWEEP:ARM:LOSS)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.design.cells import Grid, grid_of
from analysis.design.criteria import Criteria
from analysis.design.declared import criteria_for
from analysis.read import rows
from analysis.read.collect import Collected, collect
from analysis.read.cross_check import cross_check, last_evaluations, outcome_means
from analysis.read.health import smallest_variance_shares
from analysis.read.records import UNREADABLE, read_outcomes, read_record
from analysis.verdict.verdict import paired_grid
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a comparison.

    Attributes
    ----------
    name
        What it is called.
    records
        One row of `analysis.read.collect`'s `runs` for each of its runs, `run` being unique over both sides.
    config
        The configuration of one of its runs; empty where it could not be read.
    metrics, evaluations
        Of its runs.
    problems
        What is wrong with its folders.
    sweep
        The planned sweep that it is an arm of; None for a run's folder and for an arm of a plain multirun.
    """

    name: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    problems: list[str]
    sweep: PlannedSweep | None = None


@dataclass(frozen=True, eq=False)
class PlannedSweep:
    """The planned sweep that a side is taken from, whose rules hold for a comparison of its arms too.

    Attributes
    ----------
    collected, grid, criteria
        What was read, the expected grid, and what was declared.
    arm, group
        The side's place in it.
    """

    collected: Collected
    grid: Grid
    criteria: Criteria
    arm: str
    group: str

    @property
    def complete(self) -> bool:
        """Whether as many runs ended as was declared; before that nothing is tested."""
        return paired_grid(self.grid, self.criteria).complete


def read_side(letter: str, asked: str, criteria: Criteria) -> Side:
    """Read what `asked` names.

    Parameters
    ----------
    letter
        `A` or `B`.
    asked
        A run's folder, SWEEP:ARM or SWEEP:ARM:LOSS.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    if Path(asked).is_dir():
        return _run(letter, Path(asked))
    for parts in (asked.rsplit(":", 1), asked.rsplit(":", 2)):
        if len(parts) > 1 and Path(parts[0]).is_dir():
            return _arm(letter, Path(parts[0]), parts[1], parts[2] if len(parts) > 2 else None, criteria)
    raise ConfigError(f"{letter}={asked} is not allowed: name a run's folder, SWEEP:ARM or SWEEP:ARM:LOSS.")


def _run(letter: str, path: Path) -> Side:
    directory = RunDirectory(path)
    record = read_record(letter, directory)
    if record["state"] == UNREADABLE:
        raise ConfigError(
            f"{letter}={path} is no run's folder: it holds no status.json that can be read; name a run's folder, "
            f"or an arm of a sweep as SWEEP:ARM."
        )
    metrics = rows.read_many([(letter, directory.metrics_file)])
    evaluations = rows.read_many([(letter, directory.evaluations_file)])
    record["variance_share_min"] = smallest_variance_shares(metrics.table, metrics.counts).get(letter)
    evaluated = last_evaluations(evaluations.table, evaluations.counts).get(letter)
    means = outcome_means(*read_outcomes([(letter, directory.outcomes_file)], {})).get(letter, {})
    record |= cross_check(record, evaluated, means)
    problems = [*record["problems"], *metrics.problems.get(letter, []), *evaluations.problems.get(letter, [])]
    name = f"{record['arm']}, {record['loss']}, seed {record['seed']}"
    config = json.loads(record["config"]) if record["config"] else {}
    tables = (metrics.table.to_pandas(), evaluations.table.to_pandas())
    return Side(name, [record], config, *tables, [f"{path}: {problem}" for problem in problems])


def _arm(letter: str, path: Path, arm: str, loss: str | None, criteria: Criteria) -> Side:
    collected = collect(path)
    if collected.plan is not None:
        criteria, _, _ = criteria_for(collected, None)
    grid = grid_of(collected, criteria, needs_baseline=False)
    groups = [group for name, group, _ in grid.arms if name == arm]
    if not groups:
        names = ", ".join(dict.fromkeys(name for name, _, _ in grid.arms))
        raise ConfigError(f"{letter}={path}:{arm} is not allowed: the arms of that sweep are {names}; choose one.")
    if loss is not None and loss not in groups and groups != [""]:
        raise ConfigError(
            f"{letter}={path}:{arm}:{loss} is not allowed: the losses of that arm are {', '.join(groups)}; choose one."
        )
    if loss is None and len(groups) > 1:
        raise ConfigError(
            f"{letter}={path}:{arm} is not enough: that arm has the losses {', '.join(groups)}; write "
            f"{arm}:{groups[0]}."
        )
    group = loss if loss in groups else groups[0]
    cells = grid.cells[(grid.cells["arm"] == arm) & (grid.cells["group"] == group)]
    runs = [run for run in cells["run"] if run]
    renamed = {run: f"{letter}/{run}" for run in runs}
    records: list[dict[str, Any]] = [
        {**row, "run": renamed[str(row["run"])]}  # type: ignore[dict-item]
        for row in collected.runs.loc[runs].to_dict("records")
    ]
    tables = []
    for level in ("metrics", "evaluations"):
        table = collected.table(level)
        table = table[table["run"].isin(runs)]
        tables.append(table.assign(run=table["run"].astype(str).map(renamed)))
    problems = collected.problems[collected.problems["run"].isin(runs)]
    named = [f"{run}: {detail}" for run, detail in zip(problems["run"], problems["detail"], strict=True)]
    named += [
        f"seed {seed}: {reason}"
        for seed, run, reason in zip(cells["seed"], cells["run"], cells["reason"], strict=True)
        if not run
    ]
    name = f"{arm}, {group}" if group else arm
    sweep = PlannedSweep(collected, grid, criteria, arm, group) if collected.plan is not None else None
    return Side(name, records, grid.configs.get((arm, group), {}), tables[0], tables[1], named, sweep)
