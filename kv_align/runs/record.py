"""The compact record of a finished run: what an analysis reads of it, in one file bound to the readable ones. No torch.

    record.arrow   three Arrow streams, one behind the other: the rows of metrics.jsonl, of evaluations.jsonl and of
                   outcomes.parquet. The metadata of the first hold, as JSON, `files` (size in bytes and SHA-256 of every
                   readable file, by name) and the contents of status.json, summary.json and provenance.json.

It is the last act of a run that finished, and adds nothing: whoever has lost it reads the other files. It is believed only as
long as they are what they were, so that a file that was changed afterwards is noticed by its digest.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as arrow_json
import pyarrow.parquet as parquet

from kv_align.runs.files import file_digest, read_json, temporary_beside
from kv_align.runs.run_dir import RunDirectory

_METADATA = b"kv_align.record"
_SMALL = ("status_file", "summary_file", "provenance_file")
_LARGE = ("metrics_file", "evaluations_file", "outcomes_file")


@dataclass(frozen=True, eq=False)
class Record:
    """What a compact record holds.

    Attributes
    ----------
    files
        (size in bytes, SHA-256) of every readable file when the run finished, by name.
    status, summary, provenance
        As in the files of these names.
    metrics, evaluations, outcomes
        The rows.
    """

    files: dict[str, tuple[int, str]]
    status: dict[str, Any]
    summary: dict[str, Any]
    provenance: dict[str, Any]
    metrics: pa.Table
    evaluations: pa.Table
    outcomes: pa.Table


def write_record(directory: RunDirectory) -> bool:
    """Write the record of a run whose readable files are final; returns whether it could be written.

    A run does not fail for want of one: rows that are no plain table (a loss that is not a number, say) have none.
    """
    try:
        tables = [
            arrow_json.read_json(directory.metrics_file),
            arrow_json.read_json(directory.evaluations_file),
            parquet.read_table(directory.outcomes_file).replace_schema_metadata(None),
        ]
        for table in tables:
            table.validate()  # Arrow 26 loses the null with which the first list of a block begins
        small = {name: read_json(getattr(directory, name)) for name in _SMALL}
        readable = [getattr(directory, name) for name in (*_SMALL, *_LARGE)]
        files = {file.name: (file.stat().st_size, file_digest(file)) for file in readable}
    except (OSError, pa.ArrowException):
        return False
    content = json.dumps({"files": files, **{name.removesuffix("_file"): value for name, value in small.items()}})
    tables[0] = tables[0].replace_schema_metadata({_METADATA: content.encode()})
    temporary = temporary_beside(directory.record_file)
    with temporary.open("wb") as stream:
        for table in tables:
            with pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
    temporary.replace(directory.record_file)
    return True


def read_record_file(file: Path) -> Record | None:
    """Return what a record holds; None where there is none, or none that can be read."""
    try:
        source = pa.BufferReader(file.read_bytes())
        metrics, evaluations, outcomes = (pa.ipc.open_stream(source).read_all() for _ in range(3))
        content = json.loads(metrics.schema.metadata[_METADATA])
        files = {str(name): (int(size), str(sha256)) for name, (size, sha256) in content["files"].items()}
        small = (content[name] for name in ("status", "summary", "provenance"))
        status, summary, provenance = (value if isinstance(value, dict) else {} for value in small)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError):
        return None
    plain = metrics.replace_schema_metadata(None)
    return Record(files, status, summary, provenance, plain, evaluations, outcomes)
