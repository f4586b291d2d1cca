"""Everything that can be known to be wrong before a job is queued: one sentence then, and nothing queued.

What a configuration alone can have wrong was found when it was composed; here it meets the machine: folders, disk space,
models and data that have to be on the submitting machine, and whatever the executor asks its scheduler.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import kv_align
from kv_align.config.model_card import SHIPPED
from kv_align.runs.errors import ConfigError
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.executors.base import Executor
from launch.journal.journal import NO_LOCKS, no_locks

_EMBEDDED = Path(kv_align.__file__).parent / "models" / "embedded" / "student"
_FROM_SCRATCH = {"llama_17m": 17_100_000}  # numbers of a shipped student that has no weights
_KEPT_BYTES = 4  # of each number of a finished student, which is written in float32 as it was trained
_CHECKPOINT_BYTES = 4 * 3  # with the two moments of its optimizer
_LONGEST_HEADER = 100_000_000  # of a safetensors file
_BYTES_BESIDE = 5_000_000  # metrics, outcomes, the record, and an aligner of no great size


def check(executor: Executor[Any], plan: Plan, runs: Collection[str]) -> list[str]:
    """Refuse what cannot work; returns what there is to say beforehand, one line each.

    Parameters
    ----------
    executor
        Of the sweep.
    plan
        Of the sweep, which need not be written yet.
    runs
        Those of it that are to be queued.

    Raises
    ------
    ConfigError
        For the first thing that is wrong.
    """
    sweep = executor.sweep
    _check_folder(sweep.path)
    if executor.cluster.offline:
        _download(plan)
    _check_space(sweep, plan, executor.most_at_once())
    return executor.preflight(plan, runs)


def _check_folder(path: Path) -> None:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise _not_writable(path, existing)
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise no_locks(path, error) if error.errno in NO_LOCKS else _not_writable(path, existing) from None


def _not_writable(path: Path, existing: Path) -> ConfigError:
    return ConfigError(f"output_dir={path} is not allowed: {existing} is not a writable folder; choose another.")


def _check_space(sweep: SweepDirectory, plan: Plan, at_once: int) -> None:
    """Refuse a disk that cannot hold what the runs keep, and the checkpoints that are there at once."""
    existing = next(folder for folder in (sweep.path, *sweep.path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    numbers = {name: _numbers(name) for name in {run.config["model"]["student"] for run in plan.runs}}
    to_do = [run for run in plan.runs if not sweep.run(run).summary_file.exists()]
    kept = sum(_BYTES_BESIDE + _KEPT_BYTES * numbers[run.config["model"]["student"]] for run in to_do)
    in_checkpoints = sorted(
        (
            # A new one is written before the oldest is deleted.
            (run.config["trainer"]["keep_checkpoints"] + 1)
            * (_BYTES_BESIDE + _CHECKPOINT_BYTES * numbers[run.config["model"]["student"]])
            for run in to_do
        ),
        reverse=True,
    )
    needed = kept + sum(in_checkpoints[:at_once])
    if needed > free:
        raise ConfigError(
            f"output_dir={sweep.path} is not allowed: the runs need about {needed / 1e9:.1f} GB and {existing} has "
            f"{free / 1e9:.1f} GB free; choose another disk, or fewer runs."
        )


def _numbers(student: str) -> int:
    """How many numbers a student's weights are, by the headers of its files; 0 where it has none here."""
    if student in _FROM_SCRATCH:
        return _FROM_SCRATCH[student]
    folder = _EMBEDDED if student == "embedded" else Path(student) if Path(student).is_dir() else _in_cache(student)
    return 0 if folder is None else sum(_numbers_of(file) for file in folder.glob("*.safetensors"))


def _numbers_of(file: Path) -> int:
    """Numbers in a safetensors file: its header is JSON behind eight bytes that say how long it is.

    What is wrong with a file is said when it is loaded.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < _LONGEST_HEADER else {}
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def _in_cache(name: str) -> Path | None:
    """Return the folder that a name on the hub was downloaded to; None where that has not happened here."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # of many kinds; whatever is wrong with the model itself was said by the download
        return None


def _download(plan: Plan) -> None:
    """Fetch what names on the hub stand for, since jobs may not; what is there already costs nothing."""
    chosen = [run.config["model"] for run in plan.runs]
    models = {model[role] for model in chosen for role in ("teacher", "student")}
    scratch = {model["student"] for model in chosen if model["student_start"] == "scratch"}
    with_weights = {model["teacher"] for model in chosen} | (models - scratch)
    for name in sorted(_on_hub(models)):
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:
            raise ConfigError(
                f"model {name} is not allowed: it cannot be downloaded ({_first_line(error)}); name a folder, or submit "
                "where the hub can be reached."
            ) from None
        if name in with_weights and not any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"model {name} is not allowed: it has no safetensors weights on the hub; load it, save it with "
                "save_pretrained and name that folder."
            )
    for name, options in sorted({_hub_data(run.config["data"]) for run in plan.runs} - {("", "")}):
        import datasets

        try:
            datasets.load_dataset(name, options or None)
        except Exception as error:
            raise ConfigError(
                f"data.hub_name={name} is not allowed: it cannot be downloaded ({_first_line(error)}); give data.path, or "
                "submit where the hub can be reached."
            ) from None


def _on_hub(models: Iterable[str]) -> set[str]:
    return {name for name in models if name not in SHIPPED and not Path(name).exists()}


def _hub_data(data: dict[str, Any]) -> tuple[str, str]:
    if data.get("path") or not data.get("hub_name"):
        return "", ""
    return str(data["hub_name"]), str(data.get("hub_config") or ("main" if data["name"] == "gsm8k" else ""))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
