"""The tables of a sweep on the disk: Parquet that is read back as long as the runs' files stay the same, and CSV.

Where few runs have changed, only their rows are written, into LEVEL.changed.parquet; `part` of `runs` says in which of the
two files a run's rows are, and rows of it in the other one count no more. So a change costs what it is.

`runs` is what makes the other tables valid: it is removed before they are written and comes back last, so that a
collect that was killed leaves nothing that the next one would believe.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet

from analysis.read import rows
from analysis.read.records import PROVENANCE
from kv_align.runs.files import temporary_beside

FORMAT = b"4"
ALWAYS = (
    *("run", "signature", "state", "reason", "arm", "loss", "seed", "content_hash", "problems", "contradictions"),
    *("rows_not_finite", "config", "inputs", "first_started", "metrics_whole", *PROVENANCE),
    *("git_commits", "packages", "python", "part"),
)
"""Columns of `runs` that are there whatever was found."""
LEVELS = ("metrics", "evaluations", "outcomes")
WHOLE, CHANGED = "whole", "changed"
"""Where the rows of a run are: in the table itself, or in that of the changed runs."""


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
        """One of the other tables, whole."""
        return read_level(self._data, name)

    def changed(self, name: str) -> pa.Table | None:
        """The rows of the runs that changed since the table was last written whole; None where none did."""
        file = _changed_file(self._data, name)
        return parquet.read_table(file) if file.is_file() else None

    def changed_runs(self) -> set[str]:
        """The runs whose rows `changed` holds."""
        if not self.signatures:
            return set()
        runs, parts = (self.runs_table[name].to_pylist() for name in ("run", "part"))
        return {run for run, part in zip(runs, parts, strict=True) if part == CHANGED}


def read_level(data: Path, level: str, columns: list[str] | None = None) -> pa.Table:
    """Read one of `LEVELS`, the rows of runs in the order of `runs` where some have changed since it was written "
    "whole."""
    file, changed_file = data / f"{level}.parquet", _changed_file(data, level)
    if not changed_file.is_file():
        present = columns and [name for name in columns if name in parquet.read_schema(file).names]
        return parquet.read_table(file, columns=present, memory_map=True)
    tables = []
    for part in (file, changed_file):
        names = set(parquet.read_schema(part).names)
        asked = columns and [name for name in dict.fromkeys(["run", *columns]) if name in names]
        tables.append(parquet.read_table(part, columns=asked, memory_map=True))
    order = parquet.read_table(data / "runs.parquet", columns=["run", "part"])
    keys = zip(order["run"].to_pylist(), order["part"].to_pylist(), strict=True)
    table = in_order([(run, part == CHANGED) for run, part in keys], *tables)
    return table if columns is None else table.select([name for name in columns if name in table.column_names])


def in_order(order: Iterable[tuple[str, bool]], old: pa.Table, new: pa.Table) -> pa.Table:
    """Rows of runs in the order given; each run comes with whether its rows are those of the new table."""
    places = (_places(old), _places(new))
    pieces = []
    for run, is_new in order:
        first, count = places[is_new].get(run, (0, 0))
        if count:
            pieces.append((new if is_new else old).slice(first, count))
    return rows.concatenate(pieces) if pieces else new.slice(0, 0)


def _places(table: pa.Table) -> dict[str, tuple[int, int]]:
    """First row and number of rows of every run; the rows of a run stand together."""
    if table.num_rows == 0:
        return {}
    runs = table["run"].combine_chunks()
    encoded = runs if pa.types.is_dictionary(runs.type) else runs.dictionary_encode()
    bounds = pc.run_end_encode(encoded.indices)
    names, ends = encoded.dictionary.to_pylist(), bounds.run_ends.to_pylist()
    starts = [0, *ends[:-1]]
    codes = bounds.values.to_pylist()
    return {names[code]: (start, end - start) for code, start, end in zip(codes, starts, ends, strict=True)}


def _changed_file(data: Path, level: str) -> Path:
    return data / f"{level}.changed.parquet"


def write_tables(data: Path, merged: list[dict[str, Any]], tables: dict[str, pa.Table], *, only_changed: bool) -> None:
    """Write `runs` out of its records, one for each run, and the other tables: whole, or the rows of changed runs."""
    data.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([*ALWAYS, *(name for record in merged for name in record)]))
    columns = {name: _records_column([record.get(name) for record in merged]) for name in names}
    (data / "runs.parquet").unlink(missing_ok=True)
    for level, table in tables.items():
        if only_changed:
            _write_parquet(table, _changed_file(data, level))
        else:
            _write_parquet(table, data / f"{level}.parquet")
            _changed_file(data, level).unlink(missing_ok=True)
    runs = pa.table(columns).replace_schema_metadata({b"analysis.format": FORMAT})
    _write_parquet(runs, data / "runs.parquet")


def _write_parquet(table: pa.Table, file: Path) -> None:
    temporary = temporary_beside(file)
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
        table = parquet.read_table(data / "runs.parquet") if level == "runs" else read_level(data, level)
        file = data / f"{level}.csv"
        arrow_csv.write_csv(pa.table({name: _plain(table[name]) for name in table.column_names}), file)
        written.append(file)
    for suffix in ("csv", "parquet"):
        file = data / f"problems.{suffix}"
        problems.to_csv(file, index=False) if suffix == "csv" else problems.to_parquet(file)
        written.append(file)
    return written


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """What a CSV file can hold of a column."""
    if pa.types.is_dictionary(column.type):
        return column.cast(pa.string())
    if pa.types.is_list(column.type):
        separator = "; " if pa.types.is_string(column.type.value_type) else " "
        texts = column.cast(pa.list_(pa.string()))
        # A list with a gap would be none.
        lengths = pc.fill_null(pc.list_value_length(texts), 0).to_numpy()
        offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
        numbers = pc.fill_null(pc.list_flatten(texts), "nan").combine_chunks()
        mask = texts.is_null().combine_chunks()
        return pc.binary_join(pa.ListArray.from_arrays(offsets, numbers, mask=mask), separator)
    return column
