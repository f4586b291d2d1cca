"""The tables of a sweep on the disk: Parquet that is read back as long as the runs' files stay the same, and CSV.

`runs` is what makes the other tables valid: it is removed before they are written and comes back last, so that a
collect that was killed leaves nothing that the next one would believe.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet

from analysis.read import rows
from analysis.read.records import PROVENANCE
from analysis.read.scan import FoundRun

FORMAT = b"3"
ALWAYS = (
    *("run", "signature", "state", "reason", "arm", "loss", "seed", "content_hash", "problems", "contradictions"),
    *("rows_not_finite", "config", "inputs", "first_started", "metrics_whole", *PROVENANCE),
    *("git_commits", "packages", "python"),
)
"""Columns of `runs` that are there whatever was found."""
LEVELS = ("metrics", "evaluations", "outcomes")


class Before:
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


def in_order(
    folders: list[FoundRun],
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
    for folder in folders:
        is_new = folder.run in new_counts
        first, count = starts.get((is_new, folder.run), (0, 0))
        if count:
            pieces.append((new_table if is_new else old_table).slice(first, count))
    return rows.concatenate(pieces) if pieces else new_table.slice(0, 0)


def write_tables(data: Path, merged: list[dict[str, Any]], tables: dict[str, pa.Table]) -> None:
    """Write `runs` out of its records, one for each run, and the other tables."""
    data.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([*ALWAYS, *(name for record in merged for name in record)]))
    columns = {name: _records_column([record.get(name) for record in merged]) for name in names}
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


def write_csv(data: Path, problems: pd.DataFrame) -> list[Path]:
    """Write every table as CSV beside its Parquet file; lists become numbers with spaces between them."""
    written = []
    for level in ("runs", *LEVELS):
        table = parquet.read_table(data / f"{level}.parquet")
        file = data / f"{level}.csv"
        arrow_csv.write_csv(pa.table({name: _plain(table[name]) for name in table.column_names}), file)
        written.append(file)
    for suffix in ("csv", "parquet"):
        file = data / f"problems.{suffix}"
        problems.to_csv(file, index=False) if suffix == "csv" else problems.to_parquet(file)
        written.append(file)
    return written


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """What a CSV file can hold of a column."""
    if pa.types.is_dictionary(column.type):
        return column.cast(pa.string())
    if pa.types.is_list(column.type):
        separator = "; " if pa.types.is_string(column.type.value_type) else " "
        return pc.binary_join(column.cast(pa.list_(pa.string())), separator)
    return column
