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

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet

from analysis.read import records, rows
from analysis.read.health import last_steps, problems_of, rows_not_finite, smallest_variance_shares
from analysis.read.scan import FoundRun, find_runs
from analysis.read.store import LEVELS, Before, in_order, write_tables
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import Plan, SweepDirectory


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
        file = self.data / f"{level}.parquet"
        wanted = None
        if columns is not None:
            there = set(parquet.read_schema(file).names)
            wanted = [name for name in columns if name in there]
        table = parquet.read_table(file, columns=wanted, memory_map=True)
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


def collect(path: Path | str) -> Collected:
    """Read a sweep, or what has changed of it since it was last read.

    Parameters
    ----------
    path
        A sweep directory, with a plan or without (a plain Hydra multirun).

    Raises
    ------
    ConfigError
        If `path` is no folder, holds neither a plan nor a run, or its plan cannot be trusted.
    """
    sweep = SweepDirectory(path)
    found = _find(sweep)
    plan = sweep.plan()
    data = sweep.report / "data"
    known = set() if plan is None else {run.content_hash for run in plan.runs}
    before = Before(data)
    changed = [each for each in found if before.signatures.get(each.run) != each.signature]
    if before.sound and not changed and len(found) == len(before.signatures):
        runs = before.runs_table.to_pandas()
    else:
        runs = _update(found, changed, before, data, known)
    runs = runs.set_index("run", drop=False)
    problems = problems_of(runs, plan)
    return Collected(sweep.path, plan, runs, problems, data, len(changed))


def _find(sweep: SweepDirectory) -> list[FoundRun]:
    if not sweep.path.is_dir():
        raise ConfigError(f"{sweep.path} is no folder: name the folder of a sweep or of a Hydra multirun.")
    if sweep.plan_file.exists():
        return find_runs(sweep.path)
    if RunDirectory(sweep.path).status_file.exists():
        raise ConfigError(
            f"{sweep.path} is one run, not a sweep: name the folder above it, or compare it with another run "
            "(python -m analysis compare RUN_A RUN_B)."
        )
    found = find_runs(sweep.path)
    if not found:
        raise ConfigError(
            f"{sweep.path} is no sweep: it holds neither a {sweep.plan_file.name} nor a run folder; name a folder that "
            "python -m launch submit or a Hydra --multirun has written."
        )
    return found


def _update(
    found: list[FoundRun], changed: list[FoundRun], before: Before, data: Path, known: set[str]
) -> pd.DataFrame:
    """Read what changed, put it where it belongs, write everything, and return the runs."""
    fresh = {each.run for each in changed}
    old = {run: record for run, record in before.records().items() if run not in fresh}
    directories = {each.run: RunDirectory(each.path) for each in changed}
    files = {
        level: [(run, getattr(directory, f"{level}_file")) for run, directory in directories.items()]
        for level in LEVELS
    }
    problems: dict[str, list[str]] = {}
    with ThreadPoolExecutor(2) as beside:
        # Arrow parses without the interpreter, which meanwhile reads the small files.
        outcomes = beside.submit(records.read_outcomes, files["outcomes"], problems)
        parsed = beside.submit(lambda: {level: rows.read_many(files[level]) for level in ("metrics", "evaluations")})
        new = {
            each.run: records.read_record(each.run, directories[each.run], known) | {"signature": each.signature}
            for each in changed
        }
        read = parsed.result()
        found_rows = {level: (each.table, each.counts) for level, each in read.items()} | {
            "outcomes": outcomes.result()
        }
    shares = smallest_variance_shares(read["metrics"].table, read["metrics"].counts)
    last = last_steps(read["metrics"].table, read["metrics"].counts)
    bad = rows_not_finite(read["metrics"].table, read["metrics"].counts)
    tables: dict[str, pa.Table] = {}
    for level, (table, counts) in found_rows.items():
        for run, count in counts.items():
            new[run][f"num_{level}"] = count
        tables[level] = in_order(found, old, before.level(level) if old else None, table, counts)
    for run in new:
        new[run] |= {"variance_share_min": shares.get(run), "rows_not_finite": bad.get(run, 0)}
        new[run] |= _logged_until(new[run], last.get(run))
        for each in read.values():
            new[run]["problems"] += each.problems.get(run, [])
    for run, sentences in problems.items():
        new[run]["problems"] = [*new[run]["problems"], *sentences]
    merged = [new[each.run] if each.run in new else old[each.run] for each in found]
    write_tables(data, merged, tables)
    return pd.DataFrame(parquet.read_table(data / "runs.parquet").to_pandas())


def _logged_until(record: dict[str, Any], last: tuple[int, int] | None) -> dict[str, Any]:
    """Whether the rows reach the end of a finished run, but for what is logged at intervals; names it if not."""
    if record["state"] != "finished" or last is None or last[1] == 0 or sum(last) >= record["step"]:
        return {"metrics_whole": True}
    said = f"the logged steps end at {last[0]}, the run at {record['step']}: its training curve is left out"
    return {"metrics_whole": False, "problems": [*record["problems"], said]}
