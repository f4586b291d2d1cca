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

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet

from analysis import records, rows
from analysis.problems import problems_of
from analysis.scan import FoundRun, find_runs
from kv_align.errors import ConfigError
from kv_align.plans import Plan, SweepDirectory
from kv_align.runs import RunDirectory

FORMAT = b"1"
ALWAYS = ("run", "signature", "state", "reason", "arm", "loss", "seed", "content_hash", "problems", "rows_not_finite")
"""Columns of `runs` that are there whatever was found."""
LEVELS = ("metrics", "evaluations", "outcomes")


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
        """Load one of `LEVELS`; of `columns` those that exist.

        Lists (agreement by layer) come as arrays: name the columns you need where speed matters.
        """
        file = self.data / f"{level}.parquet"
        wanted = None
        if columns is not None:
            there = set(parquet.read_schema(file).names)
            wanted = [name for name in columns if name in there]
        table = parquet.read_table(file, columns=wanted, memory_map=True)
        return pd.DataFrame(table.to_pandas(split_blocks=True, self_destruct=True))


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
    before = _Before(data)
    changed = [each for each in found if before.signatures.get(each.run) != each.signature]
    if before.sound and not changed and len(found) == len(before.signatures):
        runs = before.runs_table.to_pandas()
    else:
        runs = _update(found, changed, before, data, known)
    runs = runs.set_index("run", drop=False)
    problems = problems_of(runs, plan)
    return Collected(sweep.path, plan, runs, problems, data, len(changed))


def write_csv(collected: Collected) -> list[Path]:
    """Write every table as CSV beside the Parquet files; lists become numbers with spaces between them."""
    written = []
    for level in ("runs", *LEVELS):
        table = parquet.read_table(collected.data / f"{level}.parquet")
        file = collected.data / f"{level}.csv"
        arrow_csv.write_csv(pa.table({name: _plain(table[name]) for name in table.column_names}), file)
        written.append(file)
    for suffix in ("csv", "parquet"):
        file = collected.data / f"problems.{suffix}"
        collected.problems.to_csv(file, index=False) if suffix == "csv" else collected.problems.to_parquet(file)
        written.append(file)
    return written


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


class _Before:
    """What was collected last time; empty where there is nothing, or nothing that can be read."""

    def __init__(self, data: Path) -> None:
        self._data = data
        try:
            self.runs_table = parquet.read_table(data / "runs.parquet", memory_map=True)
            known_format = (self.runs_table.schema.metadata or {}).get(b"analysis.format") == FORMAT
            self.sound = known_format and all((data / f"{level}.parquet").is_file() for level in LEVELS)
        except (OSError, pa.ArrowException):
            self.sound = False
        self.signatures: dict[str, str] = {}
        if self.sound:
            keys = (self.runs_table[name].to_pylist() for name in ("run", "signature"))
            self.signatures = dict(zip(*keys, strict=True))

    def records(self) -> dict[str, dict[str, Any]]:
        """The rows of `runs`, by run."""
        return {row["run"]: row for row in self.runs_table.to_pylist()} if self.signatures else {}

    def level(self, name: str) -> pa.Table:
        """One of the other tables."""
        return parquet.read_table(self._data / f"{name}.parquet")


def _update(
    found: list[FoundRun], changed: list[FoundRun], before: _Before, data: Path, known: set[str]
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
    with ThreadPoolExecutor(1) as beside:
        # Thousands of small Parquet files are opened without the interpreter, while it reads what is JSON.
        outcomes = beside.submit(records.read_outcomes, files["outcomes"], problems)
        new = {
            each.run: records.read_record(each.run, directories[each.run], known) | {"signature": each.signature}
            for each in changed
        }
        read = {level: rows.read_many(files[level]) for level in ("metrics", "evaluations")}
        found_rows = {level: (each.table, each.counts) for level, each in read.items()} | {
            "outcomes": outcomes.result()
        }
    shares = rows.smallest_variance_shares(read["metrics"].table, read["metrics"].counts)
    bad = _not_finite(read["metrics"].table, read["metrics"].counts)
    tables: dict[str, pa.Table] = {}
    for level, (table, counts) in found_rows.items():
        for run, count in counts.items():
            new[run][f"num_{level}"] = count
        tables[level] = _in_order(found, old, before.level(level) if old else None, table, counts)
    for run in new:
        new[run] |= {"variance_share_min": shares.get(run), "rows_not_finite": bad.get(run, 0)}
        for each in read.values():
            new[run]["problems"] += each.problems.get(run, [])
    for run, sentences in problems.items():
        new[run]["problems"] = [*new[run]["problems"], *sentences]
    merged = [new[each.run] if each.run in new else old[each.run] for each in found]
    _write(data, merged, tables)
    return pd.DataFrame(parquet.read_table(data / "runs.parquet").to_pandas())


def _not_finite(table: pa.Table, counts: dict[str, int]) -> dict[str, int]:
    """Rows of each run in which a loss that the run logs is null, NaN or infinite."""
    bad_N = np.zeros(table.num_rows, dtype=bool)
    for name in ("task_loss", "total_loss"):
        if name in table.column_names:
            bad_N |= ~np.asarray(pc.fill_null(pc.is_finite(table[name]), False))
    places = np.repeat(np.arange(len(counts)), list(counts.values()))
    return dict(zip(counts, np.bincount(places[bad_N], minlength=len(counts)).tolist(), strict=True))


def _in_order(
    found: list[FoundRun],
    old: dict[str, dict[str, Any]],
    old_table: pa.Table | None,
    new_table: pa.Table,
    new_counts: dict[str, int],
) -> pa.Table:
    """Rows of all runs in the order of `found`, out of what was kept and what was read."""
    if old_table is None:
        return new_table
    starts: dict[tuple[bool, str], tuple[int, int]] = {}
    place = 0
    for run, count in new_counts.items():
        starts[True, run] = (place, count)
        place += count
    # The old table still holds the rows of runs that changed or went: its own `run` column says where each run is.
    runs_in_old = old_table["run"].combine_chunks() if old_table.num_rows else None
    if runs_in_old is not None:
        encoded = runs_in_old if pa.types.is_dictionary(runs_in_old.type) else runs_in_old.dictionary_encode()
        bounds = pc.run_end_encode(encoded.indices)
        first = 0
        for code, end in zip(bounds.values.to_pylist(), bounds.run_ends.to_pylist(), strict=True):
            starts[False, encoded.dictionary[code].as_py()] = (first, end - first)
            first = end
    pieces = []
    for each in found:
        is_new = each.run in new_counts
        first, count = starts.get((is_new, each.run), (0, 0))
        if count:
            pieces.append((new_table if is_new else old_table).slice(first, count))
    return rows.concatenate(pieces) if pieces else new_table.slice(0, 0)


def _write(data: Path, merged: list[dict[str, Any]], tables: dict[str, pa.Table]) -> None:
    data.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([*ALWAYS, *(name for record in merged for name in record)]))
    columns = {name: _records_column([record.get(name) for record in merged]) for name in names}
    # The runs table is what makes the others valid: it goes first and comes back last.
    (data / "runs.parquet").unlink(missing_ok=True)
    for level, table in tables.items():
        _write_parquet(table, data / f"{level}.parquet")
    runs = pa.table(columns).replace_schema_metadata({b"analysis.format": FORMAT})
    _write_parquet(runs, data / "runs.parquet")


def _write_parquet(table: pa.Table, file: Path) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    texts = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
    parquet.write_table(table, temporary, compression="lz4", use_dictionary=texts, write_statistics=False)
    temporary.replace(file)


def _records_column(values: list[Any]) -> pa.Array:
    present = [value for value in values if value is not None]
    if any(isinstance(value, list) for value in present):
        return pa.array(values, pa.list_(pa.string()))
    if any(isinstance(value, str) for value in present):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    if present and all(isinstance(value, bool) for value in present):
        return pa.array(values, pa.bool_())
    if present and all(isinstance(value, int) for value in present):
        return pa.array(values, pa.int64())
    return pa.array([None if value is None else float(value) for value in values], pa.float64())


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """What a CSV file can hold of a column."""
    if pa.types.is_dictionary(column.type):
        return column.cast(pa.string())
    if pa.types.is_list(column.type):
        separator = "; " if pa.types.is_string(column.type.value_type) else " "
        return pc.binary_join(column.cast(pa.list_(pa.string())), separator)
    return column
