"""One run folder into one record: status, summary, provenance, and what is wrong with the folder.

A record is flat and holds numbers and texts only; whatever is missing or broken is named in its `problems` and read as
absent. Which runs were wanted is not known here.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import yaml

from kv_align.runs.run_dir import RunDirectory, Status, read_json

UNREADABLE = "unreadable"
"""State of a folder whose status cannot be read; the other states are those of `kv_align.runs.run_dir.State`."""

OUTCOMES = pa.schema(
    [
        ("split", pa.string()),
        ("id", pa.string()),
        ("loss_nats", pa.float64()),
        ("tokens", pa.int64()),
        ("answered", pa.string()),
        ("correct", pa.bool_()),
    ]
)
PROVENANCE = ("data_order_sha256", "initial_weights_sha256", "teacher_sha256", "device")
_IDENTITY = ("arm", "loss", "seed", "content_hash")
RESERVED = {field.name for field in fields(Status)} | {"run", "signature", "has_summary", "config", "problems"}
"""Names that mean something else in a record: a summary that holds one of them is not believed."""


def read_record(run: str, directory: RunDirectory, known: Container[str] = ()) -> dict[str, Any]:
    """Read the small files of a run.

    Parameters
    ----------
    run
        The run's key.
    directory
        Its folder.
    known
        Content hashes of configurations that are known from the plan: reading one takes longer than all the rest.

    Returns
    -------
    dict
        `run`, `state`, the other fields of `kv_align.runs.run_dir.Status`, the summary's numbers (times in seconds, losses in
        nats) and, as JSON, its lists; the hashes and versions of its provenance; `config` as JSON, empty where it is
        known; `problems`, a list of sentences.
    """
    problems, status = list[str](), _sound(directory.status())
    record: dict[str, Any] = {"run": run, "state": UNREADABLE, "content_hash": ""}
    if status is None:
        problems.append(_absent_or_broken(directory.status_file))
    else:
        record |= vars(status)
    summary = read_json(directory.summary_file)
    if summary is None and (record["state"] == "finished" or directory.summary_file.exists()):
        problems.append(_absent_or_broken(directory.summary_file))
    if (
        summary is not None
        and status is not None
        and summary.get("content_hash", status.content_hash) != status.content_hash
    ):
        problems.append(f"{directory.summary_file.name} is of another run than {directory.status_file.name}: left out")
        summary = None
    record["has_summary"] = summary is not None
    record |= {name: value for name, value in _summary(summary or {}, problems).items() if name not in RESERVED}
    provenance = read_json(directory.provenance_file)
    if provenance is None:
        problems.append(_absent_or_broken(directory.provenance_file))
    record |= _provenance(provenance or {})
    record["config"] = "" if record["content_hash"] in known else _config(directory, problems)
    if record["state"] in ("finished", "diverged") and not directory.metrics_file.exists():
        problems.append(_absent_or_broken(directory.metrics_file))
    return record | {"problems": problems}


def read_outcomes(files: list[tuple[str, Path]], problems: dict[str, list[str]]) -> tuple[pa.Table, dict[str, int]]:
    """Read the per-example outcomes of runs, in their order; a file that cannot be read is named and left out.

    Returns
    -------
    table
        `run` (dictionary) and the columns of `OUTCOMES`.
    counts
        Rows of each run.
    """
    tables = [_outcomes(run, path, problems) for run, path in files]
    counts = {run: table.num_rows for (run, _), table in zip(files, tables, strict=True)}
    runs = list(counts)
    index_N = np.repeat(np.arange(len(runs), dtype=np.int32), list(counts.values()))
    keyed = pa.DictionaryArray.from_arrays(pa.array(index_N), pa.array(runs, pa.string()))
    every = pa.concat_tables(tables) if tables else OUTCOMES.empty_table()
    return every.add_column(0, "run", keyed), counts


def _outcomes(run: str, path: Path, problems: dict[str, list[str]]) -> pa.Table:
    """The outcomes of one run; out of memory, since opening thousands of small files by themselves takes longer."""
    try:
        table = parquet.ParquetFile(pa.py_buffer(path.read_bytes())).read(use_threads=False)
        return table.select(OUTCOMES.names).replace_schema_metadata(None).cast(OUTCOMES)
    except FileNotFoundError:
        pass
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = str(error).splitlines()[0].split(":")[0]
        problems.setdefault(run, []).append(f"{path.name} cannot be read and is left out ({reason})")
    return OUTCOMES.empty_table()


def _sound(status: Status | None) -> Status | None:
    """The status, if what identifies the run is of the right kind: a file written by hand may hold anything."""
    if status is None:
        return None
    texts = all(
        isinstance(each, str) for each in (status.state, status.reason, status.arm, status.loss, status.content_hash)
    )
    return status if texts and isinstance(status.seed, int) and isinstance(status.step, int) else None


def _absent_or_broken(file: Path) -> str:
    return f"{file.name} cannot be read" if file.exists() else f"{file.name} is missing"


def _summary(summary: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in summary.items():
        if name in _IDENTITY:
            continue
        if isinstance(value, bool | int | float):
            record[name] = float(value) if math.isfinite(value) else None
        elif isinstance(value, list):
            record[name] = json.dumps(value)
    loss = record.get("validation_loss")
    if summary and loss is None:
        problems.append("the validation loss at the end is not a finite number")
    return record


def _provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {name: _text(provenance.get(name)) for name in PROVENANCE}
    parameters = provenance.get("parameters")
    for whose in ("teacher", "student", "aligner"):
        count = parameters.get(whose) if isinstance(parameters, dict) else None
        record[f"parameters_{whose}"] = float(count) if isinstance(count, int | float) else None
    attempts = provenance.get("attempts")
    attempts = [each for each in attempts if isinstance(each, dict)] if isinstance(attempts, list) else []
    record["git_commits"] = " ".join(dict.fromkeys(_code(each) for each in attempts))
    record["packages"] = " | ".join(dict.fromkeys(_versions(each.get("packages")) for each in attempts))
    record["python"] = " ".join(dict.fromkeys(_text(each.get("python")) for each in attempts))
    return record


def _code(attempt: dict[str, Any]) -> str:
    """Commit, with the start of its diff's hash where the checkout was changed."""
    commit, diff = _text(attempt.get("git_commit")) or "unknown", _text(attempt.get("git_diff"))
    return f"{commit}+{hashlib.sha256(diff.encode()).hexdigest()[:8]}" if diff else commit


def _versions(packages: Any) -> str:
    if not isinstance(packages, dict):
        return "unknown"
    return ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _config(directory: RunDirectory, problems: list[str]) -> str:
    try:
        return json.dumps(directory.read_config())
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        problems.append(_absent_or_broken(directory.config_file))
        return ""
