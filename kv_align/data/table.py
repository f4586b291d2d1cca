"""Rows of texts as they are written, from a local file or from the hub. Imports no torch.

Local files are read here, and not through `datasets`, because what is read must be what the file holds: that library knows
a file by its time of change, takes "NA" in a CSV file for nothing, and makes dates of what looks like one.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kv_align.runs.progress import progress_bar

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_MEBIBYTE = 2**20
SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""What a file with each suffix is read as."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of texts, in their order.

    Attributes
    ----------
    name
        What they were read from, for messages.
    columns
        The names of all columns.
    rows
        Of each row the columns that were asked for; those that a row lacks are missing.
    places
        Where each row stands, for messages.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    places: tuple[str, ...]


def read_table(file: Path, wanted: Iterable[str]) -> Table:
    """Read a file; only the wanted columns are kept, all are named. A file that has not changed is read once.

    Raises
    ------
    ValueError
        If it cannot be read, naming file and line.
    """
    try:
        status = file.stat()
        identity = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        table = _read(file, tuple(sorted(wanted)), identity)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}); make it readable") from error
    if not table.rows:
        raise ValueError(f"{file} is empty: it holds no row; write one or remove the file")
    return table


def hub_tables(name: str, config: str | None, wanted: Iterable[str]) -> dict[str, Table]:
    """Read all splits of a data set on the hub; see `read_table`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"data.hub_name={name} cannot be loaded ({message}); correct the name, or give data.path"
        ) from error
    tables = {}
    for split, rows in loaded.items():
        columns = tuple(rows.column_names)
        places = tuple(f"{name}, {split} row {number}" for number in range(1, len(rows) + 1))
        kept = rows.select_columns([column for column in wanted if column in columns])
        tables[str(split)] = Table(f"{name}, {split}", columns, tuple(kept) or ({},) * len(rows), places)
    return tables


def text_of(value: Any, place: str, column: str) -> str | None:
    """Return a cell as a text, decoded where it is bytes; None where it holds nothing.

    Raises
    ------
    ValueError
        If it is neither, or no text that a tokenizer can read.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place}: {column} holds bytes that are no UTF-8 ({error.reason}); write texts there"
            ) from error
    if not isinstance(value, str):
        raise ValueError(f"{place}: {column} is no text but of the type {type(value).__name__}; write texts there")
    unreadable = re.search("[\0\ud800-\udfff]", value)
    if unreadable is not None:
        raise ValueError(f"{place}: {column} holds {unreadable.group()!r}, which is no character; save it as UTF-8")
    return value


@lru_cache(maxsize=1024)
def _read(file: Path, wanted: tuple[str, ...], identity: tuple[int, ...]) -> Table:
    return _READERS[SUFFIXES[file.suffix.lower()]](file, wanted)


def _read_text(file: Path, wanted: tuple[str, ...]) -> Table:
    """A text file has one column, whatever it is called, and a row for each line."""
    lines = list(_lines(file))
    rows = tuple(dict.fromkeys(wanted, line) for _, line in lines)
    return Table(str(file), wanted, rows, tuple(_place(file, number) for number, _ in lines))


def _read_json(file: Path, wanted: tuple[str, ...]) -> Table:
    """JSON lines, or one list of objects."""
    columns: dict[str, None] = {}
    rows, places = [], []
    for place, value in _json_values(file):
        if not isinstance(value, dict):
            raise ValueError(f"{place} is no object; write {{column: value, ...}} there")
        columns.update(dict.fromkeys(value))
        rows.append({column: value[column] for column in wanted if column in value})
        places.append(place)
    return Table(str(file), tuple(columns), tuple(rows), tuple(places))


def _json_values(file: Path) -> Iterator[tuple[str, Any]]:
    lines = ((number, line) for number, line in _lines(file) if line.strip())
    for number, line in lines:
        if line.lstrip().startswith("["):
            whole = "\n".join([*[""] * (number - 1), line, *(rest for _, rest in lines)])
            for entry, value in enumerate(_parsed(whole, file, 1), 1):
                yield f"{file}, entry {entry}", value
            return
        yield _place(file, number), _parsed(line, file, number)


def _parsed(text: str, file: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, message = _place(file, first_line + error.lineno - 1), f"{error.msg} in column {error.colno}"
    except (RecursionError, ValueError) as error:
        place, message = _place(file, first_line), str(error)
    raise ValueError(f"{place} cannot be read as JSON ({message}); correct that line or remove it")


def _read_csv(file: Path, wanted: tuple[str, ...]) -> Table:
    """Every cell as it is written: NA and null are texts. The first line names the columns."""
    columns: list[str] = []
    rows, places = [], []
    with _any_length():
        reader = csv.reader((f"{line}\n" for _, line in _lines(file)), strict=True)
        try:
            columns = next(reader, [])
            for cells in reader:
                if not cells:
                    continue
                place = _place(file, reader.line_num)
                if len(cells) != len(columns):
                    raise ValueError(
                        f"{place} has {len(cells)} cells under {len(columns)} columns; quote a text that holds commas"
                    )
                named = dict(zip(columns, cells, strict=True))
                rows.append({column: named[column] for column in wanted if column in named})
                places.append(place)
        except csv.Error as error:
            raise ValueError(f"{_place(file, reader.line_num)} is no CSV ({error}); correct the quotes") from error
    twice = sorted({column for column in columns if columns.count(column) > 1} & set(wanted))
    if twice:
        raise ValueError(f"{file} has several columns named {twice[0]}; rename all but one")
    return Table(str(file), tuple(columns), tuple(rows), tuple(places))


def _read_parquet(file: Path, wanted: tuple[str, ...]) -> Table:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            columns = tuple(opened.schema_arrow.names)
            rows = opened.read(columns=[column for column in wanted if column in columns]).to_pylist()
            rows = rows or [{}] * opened.metadata.num_rows
    except pa.ArrowException as error:
        raise ValueError(f"{file} is no Parquet file ({str(error).strip().splitlines()[0]}); write it again") from error
    return Table(str(file), columns, tuple(rows), tuple(f"{file}, row {number}" for number in range(1, len(rows) + 1)))


_READERS: dict[str, Callable[[Path, tuple[str, ...]], Table]] = {
    "text": _read_text,
    "json": _read_json,
    "parquet": _read_parquet,
    "csv": _read_csv,
}


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) without line ends and without a mark of the byte order."""
    size = file.stat().st_size
    with file.open("rb") as stream, progress_bar(f"reading {file.name} (MiB)", size // _MEBIBYTE) as advance:
        read = 0
        for number, line in enumerate(stream, 1):
            if number == 1:
                if line.startswith(_WIDE):
                    raise ValueError(f"{file} is written in UTF-16 or UTF-32; save it as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{_place(file, number)} is not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from error
            advance((read + len(line)) // _MEBIBYTE - read // _MEBIBYTE)
            read += len(line)


def _place(file: Path, line: int) -> str:
    return f"{file}, line {line}"


@contextmanager
def _any_length() -> Iterator[None]:
    """Let cells of a CSV file be of any length; the limit is the process's."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
