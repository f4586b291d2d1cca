"""Many JSON-lines files into one Arrow table: fast where they are sound, line by line where one is not.

The files of many runs are parsed together, since a parser's start costs more than a run's few hundred lines. Where a
batch cannot be parsed, its files are read by themselves; a file that cannot be parsed is read line by line, and what
was left out of it is named.

Every scalar column is a float but `step`; lists of numbers stay lists; anything else has no place in a metric and is
named. Axes: T rows of a run.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as arrow_json

from kv_align.runs.run_dir import read_rows

# Bytes parsed at once: large enough to be fast, small enough to keep memory flat.
BATCH_BYTES = 16 * 2**20
NUMBERS = pa.list_(pa.float64())


@dataclass
class RowsRead:
    """What was read of some JSON-lines files.

    Attributes
    ----------
    table
        All rows, file after file: `run` (dictionary), `step`, and the columns found.
    counts
        Rows of each file, by run.
    problems
        By run, what was left out and why.
    """

    table: pa.Table
    counts: dict[str, int]
    problems: dict[str, list[str]] = field(default_factory=dict)


def read_many(files: Iterable[tuple[str, Path]]) -> RowsRead:
    """Read files of `(run, path)` in their order; a file that is not there has no rows.

    Returns
    -------
    RowsRead
        Steps of a run increase strictly: of rows with the same step the last one counts.
    """
    tables: list[pa.Table] = []
    counts: dict[str, int] = {}
    problems: dict[str, list[str]] = {}
    for batch in _batches(files, problems):
        table, lengths = _parse_batch(batch, problems)
        runs = [run for run, _, _ in batch]
        table = _numbers_only(table, runs, lengths, problems)
        table, lengths = _increasing(table, runs, lengths, problems)
        counts.update(zip(runs, lengths, strict=True))
        if table.num_rows:
            tables.append(_with_run(table, runs, lengths))
    return RowsRead(concatenate(tables), counts, problems)


def from_tables(tables_by_run: dict[str, pa.Table]) -> RowsRead:
    """Bring rows that were parsed already, run by run, into the form of `read_many`."""
    present = {run: table for run, table in tables_by_run.items() if table.num_rows and _has_steps(table)}
    problems: dict[str, list[str]] = {}
    try:
        table = pa.concat_tables(present.values(), promote_options="permissive") if present else concatenate([])
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # columns of different kinds: each run by itself
        present = {run: _numbers_only(own, [run], [own.num_rows], problems) for run, own in present.items()}
        table = concatenate(list(present.values()))
    runs, lengths = list(present), [own.num_rows for own in present.values()]
    table, lengths = _increasing(_numbers_only(table, runs, lengths, problems), runs, lengths, problems)
    counts = dict.fromkeys(tables_by_run, 0) | dict(zip(runs, lengths, strict=True))
    # Rows stand in the order of the counts.
    counts = {run: counts[run] for run in (*present, *(run for run in counts if run not in present))}
    return RowsRead(_with_run(table, runs, lengths) if runs else concatenate([]), counts, problems)


def together(first: RowsRead, second: RowsRead) -> RowsRead:
    """Put the rows of other runs under those of some."""
    tables = [read.table for read in (first, second) if read.table.num_rows]
    return RowsRead(concatenate(tables), first.counts | second.counts, first.problems | second.problems)


def concatenate(tables: list[pa.Table]) -> pa.Table:
    """Put tables under each other; a column that one of them lacks is null there."""
    if not tables:
        return pa.table({"run": pa.array([], pa.dictionary(pa.int32(), pa.string())), "step": pa.array([], pa.int64())})
    return pa.concat_tables(tables, promote_options="default").unify_dictionaries()


_Batch = list[tuple[str, Path, bytes]]


def _batches(files: Iterable[tuple[str, Path]], problems: dict[str, list[str]]) -> Iterator[_Batch]:
    batch: _Batch = []
    size = 0
    for run, path in files:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            content = b""
            problems.setdefault(run, []).append(f"{path.name} cannot be read ({error.strerror})")
        batch.append((run, path, content))
        size += len(content)
        if size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parse_batch(batch: _Batch, problems: dict[str, list[str]]) -> tuple[pa.Table, list[int]]:
    whole = [content if not content or content.endswith(b"\n") else content + b"\n" for _, _, content in batch]
    lengths = [content.count(b"\n") for content in whole]
    try:
        table = _parse(b"".join(whole))
        if table.num_rows == sum(lengths) and _has_steps(table):
            return table, lengths
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    tables = [_parse_one(run, path, content, problems) for (run, path, _), content in zip(batch, whole, strict=True)]
    cleaned = [
        _numbers_only(table, [run], [table.num_rows], problems)
        for table, (run, _, _) in zip(tables, batch, strict=True)
        if table.num_rows
    ]
    return concatenate(cleaned), [table.num_rows for table in tables]


def _parse(content: bytes) -> pa.Table:
    if not content:
        return pa.table({})
    options = arrow_json.ReadOptions(use_threads=True, block_size=max(2**20, len(content) // 4))
    table = arrow_json.read_json(pa.BufferReader(content), read_options=options)
    table.validate()  # Arrow 26 loses the null with which the first list of a block begins
    return table


def _parse_one(run: str, path: Path, content: bytes, problems: dict[str, list[str]]) -> pa.Table:
    try:
        table = _parse(content)
        if table.num_rows == content.count(b"\n") and _has_steps(table):
            return table
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    rows = [row for row in read_rows(path) if _is_step(row["step"])]
    num_lost = sum(1 for line in io.BytesIO(content) if line.strip()) - len(rows)
    if num_lost:
        where = "the last line of" if num_lost == 1 and not _last_line_is_whole(path) else f"{num_lost} line(s) of"
        problems.setdefault(run, []).append(f"{where} {path.name} cannot be read and is left out")
    odd = sorted({key for row in rows for key, value in row.items() if not _is_number(value)})
    if odd:
        problems.setdefault(run, []).append(f"{path.name} holds no numbers under {', '.join(odd)}: left out")
    keys = dict.fromkeys(key for row in rows for key in row if key not in odd)
    return pa.table({key: _column([row.get(key) for row in rows]) for key in keys})


def _column(values: list[Any]) -> pa.Array:
    if any(isinstance(value, list) for value in values):
        return pa.array([value if isinstance(value, list) else None for value in values], NUMBERS)
    return pa.array([None if value is None else float(value) for value in values], pa.float64())


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_number(value: Any) -> bool:
    if isinstance(value, list):
        return all(number is None or (isinstance(number, int | float) and abs(number) < 2**1000) for number in value)
    return value is None or (isinstance(value, int | float) and (not isinstance(value, int) or abs(value) < 2**1000))


def _last_line_is_whole(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, io.SEEK_END)
        return stream.read() == b"\n"


def _has_steps(table: pa.Table) -> bool:
    if table.num_rows == 0:
        return True
    return "step" in table.column_names and pa.types.is_integer(table["step"].type) and table["step"].null_count == 0


def _numbers_only(table: pa.Table, runs: list[str], lengths: list[int], problems: dict[str, list[str]]) -> pa.Table:
    """Cast every column to floats or lists of floats, `step` to integers; drop and name what is neither."""
    columns = {}
    for name in table.column_names:
        column = table[name]
        kind = column.type
        if name == "step":
            columns[name] = column.cast(pa.int64())
        elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
            columns[name] = column.cast(pa.float64(), safe=False)
        elif pa.types.is_null(kind):
            columns[name] = column.cast(pa.float64())
        elif pa.types.is_list(kind) and _is_plain_number(kind.value_type):
            columns[name] = column.cast(NUMBERS)
        elif name != "run":
            used = np.asarray(column.is_valid())
            ends = np.cumsum([0, *lengths])
            for place, run in enumerate(runs):
                if used[ends[place] : ends[place + 1]].any():
                    problems.setdefault(run, []).append(f"the column {name} holds no numbers and is left out")
    return pa.table(columns)


def _is_plain_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _increasing(
    table: pa.Table, runs: list[str], lengths: list[int], problems: dict[str, list[str]]
) -> tuple[pa.Table, list[int]]:
    """Keep the last row of every step of a run, in the order of the steps."""
    if table.num_rows == 0:
        return table, lengths
    step_N = table["step"].to_numpy()
    run_N = np.repeat(np.arange(len(lengths)), lengths)
    wrong_N = (np.diff(step_N) <= 0) & (np.diff(run_N) == 0)
    if not wrong_N.any():
        return table, lengths
    for place in np.unique(run_N[1:][wrong_N]):
        problems.setdefault(runs[place], []).append("steps were written twice: of each the last row counts")
    row_N = np.arange(len(step_N))
    order_N = np.lexsort((row_N, step_N, run_N))
    last_N = np.append((np.diff(step_N[order_N]) != 0) | (np.diff(run_N[order_N]) != 0), True)
    kept_N = order_N[last_N]
    return table.take(pa.array(kept_N)), np.bincount(run_N[kept_N], minlength=len(lengths)).tolist()


def _with_run(table: pa.Table, runs: list[str], lengths: list[int]) -> pa.Table:
    index_N = np.repeat(np.arange(len(runs), dtype=np.int32), lengths)
    column = pa.DictionaryArray.from_arrays(pa.array(index_N), pa.array(runs))
    return table.add_column(0, "run", column)
