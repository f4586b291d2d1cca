"""A folder of runs into tidy tables, read again only where it changed.

    runs         one row per run folder: status, summary, provenance
    metrics      one row per run and logged optimizer step
    evaluations  one row per run and evaluation
    outcomes     one row per run and evaluated example
    problems     one row for everything that is wrong with a folder, or was planned and is not there

They are kept as Parquet under `report/data/`, keyed by each run's files (path, modification time, size); a later
collect reads the runs whose files changed and puts them in their place.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet

from analysis.read import records, rows
from analysis.read.compact import read_compact
from analysis.read.cross_check import cross_check, last_evaluations, outcome_means
from analysis.read.health import (
    LoggedSteps,
    logged_steps,
    other_than_planned,
    problems_of,
    rows_not_finite,
    smallest_variance_shares,
)
from analysis.read.scan import FoundRun, runs_of_sweep
from analysis.read.store import CHANGED, LEVELS, WHOLE, Before, in_order, read_level, write_tables
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import Plan, SweepDirectory

FEW = 0.1
"""Share of the runs up to which only the rows of those that changed are written again."""


@dataclass(frozen=True, eq=False)
class Collected:
    """The tables of a sweep.

    Attributes
    ----------
    sweep
        The sweep's folder.
    plan
        Its frozen plan; None for a plain Hydra multirun.
    runs, problems
        See the module; `runs` is indexed by `run`.
    data
        The folder with all tables as Parquet.
    num_read
        Runs whose files were read this time; the others had not changed.
    """

    sweep: Path
    plan: Plan | None
    runs: pd.DataFrame
    problems: pd.DataFrame
    data: Path
    num_read: int

    def table(self, level: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Load one of `LEVELS`; what nobody logged of `columns` is NaN.

        Lists (agreement by layer) come as arrays: name the columns you need where speed matters.
        """
        table = read_level(self.data, level, None if columns is None else list(columns))
        loaded: pd.DataFrame = table.to_pandas(split_blocks=True, self_destruct=True)
        return (
            loaded if columns is None or set(columns) <= set(loaded.columns) else loaded.reindex(columns=list(columns))
        )

    @property
    def broken(self) -> pd.DataFrame:
        """The problems of folders that are there; what is missing is a matter of coverage."""
        return self.problems[self.problems["kind"] != "missing"]

    def training(self) -> pd.DataFrame:
        """Load `run`, `step` and `task_loss` of the runs whose rows were not lost before the end."""
        table = self.table("metrics", ["run", "step", "task_loss"])
        broken = self.runs.index[self.runs["metrics_whole"].eq(False)]
        return table[~table["run"].isin(broken)] if len(broken) else table


def collect(path: Path | str, *, verify: bool = False) -> Collected:
    """Read a sweep, or what has changed of it since it was last read.

    Parameters
    ----------
    path
        A sweep directory, with a plan or without (a plain Hydra multirun).
    verify
        Read every run again, and check every file of a finished one by its digest.

    Raises
    ------
    ConfigError
        If `path` is no folder, holds neither a plan nor a run, or its plan cannot be trusted.
    """
    sweep = SweepDirectory(path)
    folders = runs_of_sweep(sweep)
    plan = sweep.plan()
    data = sweep.report / "data"
    known = set() if plan is None else {run.content_hash for run in plan.runs}
    before = Before(data)
    changed = [folder for folder in folders if verify or before.signatures.get(folder.run) != folder.signature]
    if before.sound and not changed and len(folders) == len(before.signatures):
        runs = before.runs_table.to_pandas()
    else:
        runs = _update(folders, changed, before, data, known, verify=verify)
    runs = runs.set_index("run", drop=False).drop(columns="part")
    if plan is not None:
        # Of the plan as it is now, and so not kept with the rest.
        for run, sentences in other_than_planned(runs, plan).items():
            runs.at[run, "contradictions"] = [*runs.at[run, "contradictions"], *sentences]
    problems = problems_of(runs, plan)
    return Collected(sweep.path, plan, runs, problems, data, len(changed))


def _update(
    folders: list[FoundRun], changed: list[FoundRun], before: Before, data: Path, known: set[str], *, verify: bool
) -> pd.DataFrame:
    """Read what changed, put it where it belongs, write everything, and return the runs."""
    fresh = {folder.run for folder in changed}
    old = {run: record for run, record in before.records().items() if run not in fresh}
    directories = {folder.run: RunDirectory(folder.path) for folder in changed}
    compact = {folder.run: read_compact(folder, verify=verify) for folder in changed}
    kept = {run: found.record for run, found in compact.items() if found.record is not None}
    files = {
        level: [(run, getattr(directory, f"{level}_file")) for run, directory in directories.items() if run not in kept]
        for level in LEVELS
    }
    problems: dict[str, list[str]] = {}
    with ThreadPoolExecutor(2) as beside:
        # Arrow parses without the interpreter, which meanwhile reads the small files.
        outcomes = beside.submit(records.read_outcomes, files["outcomes"], problems)
        parsed = beside.submit(lambda: {level: rows.read_many(files[level]) for level in ("metrics", "evaluations")})
        new = {
            folder.run: records.read_record(folder.run, directories[folder.run], known, kept.get(folder.run))
            | {"signature": folder.signature}
            for folder in changed
        }
        of_records = {
            "metrics": rows.from_tables({run: record.metrics for run, record in kept.items()}),
            "evaluations": rows.from_tables({run: record.evaluations for run, record in kept.items()}),
        }
        kept_outcomes = records.keyed_outcomes({run: record.outcomes for run, record in kept.items()})
        read = {level: rows.together(part, of_records[level]) for level, part in parsed.result().items()}
        read_outcomes = (
            pa.concat_tables([outcomes.result()[0], kept_outcomes[0]]).unify_dictionaries(),
            outcomes.result()[1] | kept_outcomes[1],
        )
        found_rows = {level: (rows_read.table, rows_read.counts) for level, rows_read in read.items()} | {
            "outcomes": read_outcomes
        }
    shares = smallest_variance_shares(read["metrics"].table, read["metrics"].counts)
    logged = logged_steps(read["metrics"].table, read["metrics"].counts)
    evaluated = last_evaluations(read["evaluations"].table, read["evaluations"].counts)
    means = outcome_means(*read_outcomes)
    bad = rows_not_finite(read["metrics"].table, read["metrics"].counts)
    since = fresh | before.changed_runs()
    few = before.sound and len(since) <= FEW * len(folders)
    tables: dict[str, pa.Table] = {}
    for level, (table, counts) in found_rows.items():
        for run, count in counts.items():
            new[run][f"num_{level}"] = count
        base = (before.changed(level) if few else before.level(level)) if old else None
        order = [(folder.run, folder.run in fresh) for folder in folders if not few or folder.run in since]
        tables[level] = table if base is None else in_order(order, base, table)
    for run in new:
        changed_files = [*compact[run].changed]
        new[run]["contradictions"] = [*new[run]["contradictions"], *changed_files]
        new[run]["problems"] = [*new[run]["problems"], *changed_files]
        new[run] |= {"variance_share_min": shares.get(run), "rows_not_finite": bad.get(run, 0)}
        for named in (*(rows_read.problems for rows_read in read.values()), problems):
            new[run]["problems"] = [*new[run]["problems"], *named.get(run, [])]
        new[run] |= cross_check(new[run], evaluated.get(run), means.get(run, {}))
        new[run] |= _whole_metrics(new[run], logged.get(run), directories[run])
    merged = [
        (new[folder.run] if folder.run in new else old[folder.run])
        | {"part": CHANGED if few and folder.run in since else WHOLE}
        for folder in folders
    ]
    write_tables(data, merged, tables, only_changed=few)
    return pd.DataFrame(parquet.read_table(data / "runs.parquet").to_pandas())


def _whole_metrics(record: dict[str, Any], logged: LoggedSteps | None, directory: RunDirectory) -> dict[str, Any]:
    """Whether a run that ended logged all that it should have; names what is missing of it."""
    if record["state"] not in ("finished", "diverged"):
        return {"metrics_whole": True}
    finished = record["state"] == "finished"
    if logged is None:
        lost = [
            f"{directory.metrics_file.name} "
            f"{'holds no step' if records.is_there(directory.metrics_file) else 'is missing'}"
        ]
    else:
        lost = logged.gaps(record["step"]) if finished else []
    named = list(lost)
    if finished and not record["num_outcomes"] and not records.is_there(directory.outcomes_file):
        named.append(f"{directory.outcomes_file.name} is missing")
    return {"metrics_whole": not lost, "problems": [*record["problems"], *named]}
