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

from kv_align.runs.record import Record
from kv_align.runs.run_dir import RunDirectory, Status, read_json, status_of

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
PROVENANCE = ("data_order_sha256", "initial_weights_sha256", "teacher_sha256", "device", "criteria_sha256")
_IDENTITY = ("arm", "loss", "seed", "content_hash")
RESERVED = {field.name for field in fields(Status)} | {
    *("run", "signature", "has_summary", "config", "inputs", "first_started", "problems", "contradictions"),
    *PROVENANCE,
}
"""Names that mean something else in a record: a summary that holds one of them is not believed."""


def read_record(
    run: str, directory: RunDirectory, known: Container[str] = (), compact: Record | None = None
) -> dict[str, Any]:
    """Read the small files of a run.

    Parameters
    ----------
    run
        The run's key.
    directory
        Its folder.
    known
        Content hashes of configurations that are known from the plan: reading one takes longer than all the rest.
    compact
        What the run's compact record holds, where it is believed: the small files are not opened then.

    Returns
    -------
    dict
        `run`, `state`, the other fields of `kv_align.runs.run_dir.Status`, the summary's numbers (times in seconds, losses in
        nats) and, as JSON, its lists; the hashes and versions of its provenance; `config` as JSON, empty where it is
        known; `problems`, a list of sentences; `contradictions`, those of them that say why what a finished run holds
        cannot be believed.
    """
    problems = list[str]()
    status = _sound(directory.status() if compact is None else status_of(compact.status))
    record: dict[str, Any] = {"run": run, "state": UNREADABLE, "content_hash": ""}
    if status is None:
        problems.append(_absent_or_broken(directory.status_file))
    else:
        record |= vars(status) | {"reason": _printable(status.reason)}
    summary = read_json(directory.summary_file) if compact is None else compact.summary
    if summary is None and (record["state"] == "finished" or is_there(directory.summary_file)):
        problems.append(_absent_or_broken(directory.summary_file))
    if (
        summary is not None
        and status is not None
        and summary.get("content_hash", status.content_hash) != status.content_hash
    ):
        problems.append(f"{directory.summary_file.name} is of another run than {directory.status_file.name}: left out")
        summary = None
    record["has_summary"] = summary is not None
    contradictions = _contradictions(status, summary) if status is not None else []
    record |= {name: value for name, value in _summary(summary or {}, problems).items() if name not in RESERVED}
    provenance = read_json(directory.provenance_file) if compact is None else compact.provenance
    if provenance is None:
        problems.append(_absent_or_broken(directory.provenance_file))
    record |= _provenance(provenance or {})
    record["config"] = "" if record["content_hash"] in known else _config(directory, problems)
    if record["config"]:
        contradictions += _other_than_configured(record, json.loads(record["config"]))
    return record | {"problems": [*problems, *contradictions], "contradictions": contradictions}


def _contradictions(status: Status, summary: dict[str, Any] | None) -> list[str]:
    """What in a run's own files says that it is not what its status says."""
    sentences = []
    if status.state == "finished" and status.step < status.total_steps:
        sentences.append(f"it says finished at step {status.step} of {status.total_steps}")
    if status.state == "diverged" and summary is not None:
        sentences.append("its status says diverged, and beside it lies the summary of a finished run")
    for name in ("arm", "loss", "seed"):
        own = getattr(status, name)
        if summary is not None and summary.get(name, own) != own:
            sentences.append(f"its status is of {name} {own}, its summary of {name} {summary[name]}")
    return sentences


def _other_than_configured(record: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Where the status says another arm, loss or seed than the frozen configuration."""
    loss = config.get("loss")
    configured = {
        "arm": config.get("arm"),
        "loss": loss.get("name") if isinstance(loss, dict) else None,
        "seed": config.get("seed"),
    }
    return [
        f"its status is of {name} {record[name]}, its configuration of {name} {value}"
        for name, value in configured.items()
        if value is not None and name in record and record[name] != value
    ]


def read_outcomes(files: list[tuple[str, Path]], problems: dict[str, list[str]]) -> tuple[pa.Table, dict[str, int]]:
    """Read the per-example outcomes of runs, in their order; a file that cannot be read is named and left out.

    Returns
    -------
    table
        `run` (dictionary) and the columns of `OUTCOMES`.
    counts
        Rows of each run.
    """
    return keyed_outcomes({run: _outcomes(run, path, problems) for run, path in files})


def keyed_outcomes(tables_by_run: dict[str, pa.Table]) -> tuple[pa.Table, dict[str, int]]:
    """Put the outcomes of runs under each other, with the run of every row, and count the rows of each."""
    tables = list(tables_by_run.values())
    counts = {run: table.num_rows for run, table in tables_by_run.items()}
    runs = list(counts)
    index_N = np.repeat(np.arange(len(runs), dtype=np.int32), list(counts.values()))
    keyed = pa.DictionaryArray.from_arrays(pa.array(index_N), pa.array(runs, pa.string()))
    every = pa.concat_tables(tables, promote_options="permissive") if tables else OUTCOMES.empty_table()
    every = every.select(OUTCOMES.names).cast(OUTCOMES)
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
        isinstance(value, str) for value in (status.state, status.reason, status.arm, status.loss, status.content_hash)
    )
    whole = all(isinstance(value, int) for value in (status.seed, status.step, status.total_steps))
    return status if texts and whole else None


def _absent_or_broken(file: Path) -> str:
    return f"{file.name} cannot be read" if is_there(file) else f"{file.name} is missing"


def is_there(file: Path) -> bool:
    """Whether a file exists; one in a folder that cannot be looked into is not there for a reader."""
    try:
        return file.exists()
    except OSError:
        return False


def _summary(summary: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in summary.items():
        if name in _IDENTITY:
            continue
        if isinstance(value, bool | int | float):
            record[name] = float(value) if math.isfinite(value) else None
        elif isinstance(value, list):
            record[name] = json.dumps(value)
    if summary and record.get("validation_loss") is None:
        problems.append("the validation loss at the end is missing, or not a finite number")
    return record


def _provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {name: _text(provenance.get(name)) for name in PROVENANCE}
    parameters = provenance.get("parameters")
    for whose in ("teacher", "student", "aligner"):
        count = parameters.get(whose) if isinstance(parameters, dict) else None
        record[f"parameters_{whose}"] = float(count) if isinstance(count, int | float) else None
    attempts = provenance.get("attempts")
    attempts = [attempt for attempt in attempts if isinstance(attempt, dict)] if isinstance(attempts, list) else []
    starts = [attempt["started"] for attempt in attempts if isinstance(attempt.get("started"), int | float)]
    record["first_started"] = min(starts, default=None)
    inputs = provenance.get("inputs")
    record["inputs"] = json.dumps(inputs, sort_keys=True) if isinstance(inputs, dict) else ""
    record["git_commits"] = " ".join(dict.fromkeys(_code(attempt) for attempt in attempts))
    record["packages"] = " | ".join(dict.fromkeys(_versions(attempt.get("packages")) for attempt in attempts))
    record["python"] = " ".join(dict.fromkeys(_text(attempt.get("python")) for attempt in attempts))
    return record


def _code(attempt: dict[str, Any]) -> str:
    """Commit, with the start of its diff's hash where the checkout was changed; of a copy without one, that of its files."""
    commit, diff = _text(attempt.get("git_commit")), attempt.get("git_diff")
    if not commit:
        files = _text(attempt.get("code_sha256"))
        return f"no commit, files {files[:8]}" if files else "unknown"
    diff = diff if isinstance(diff, str) else ""
    return f"{commit}+{hashlib.sha256(diff.encode()).hexdigest()[:8]}" if diff else commit


def _versions(packages: Any) -> str:
    if not isinstance(packages, dict):
        return "unknown"
    return ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))


def _text(value: Any) -> str:
    return _printable(value) if isinstance(value, str) else ""


def _printable(text: str) -> str:
    """A text without what no page, table or terminal can show, such as a NUL byte."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else " " for letter in text)


def _config(directory: RunDirectory, problems: list[str]) -> str:
    try:
        return json.dumps(directory.read_config())
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        problems.append(_absent_or_broken(directory.config_file))
        return ""
