"""Everything that can be known to be wrong before a job is queued: one sentence then, and nothing queued.

What a configuration alone can have wrong was found when it was composed; here it meets the machine: folders, disk space,
models and data that have to be on the submitting machine, and whatever the executor asks its scheduler.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from kv_align.config.model_card import SHIPPED
from kv_align.runs.errors import ConfigError
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.executors.base import Executor
from launch.journal.journal import NO_LOCKS, no_locks

_SHIPPED_BYTES = {"embedded": 20_000_000, "llama_17m": 220_000_000}  # a checkpoint of each, generously
# Weights, gradients' two moments and the student that is kept, all in float32, beside the old checkpoint while writing.
_BYTES_PER_PARAMETER = 4 * 3 + 4


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
    _check_space(sweep, plan)
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


def _check_space(sweep: SweepDirectory, plan: Plan) -> None:
    """Refuse a disk that cannot hold what the runs keep, and their checkpoints."""
    existing = next(folder for folder in (sweep.path, *sweep.path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    sizes = {name: _checkpoint_bytes(name) for name in {run.config["model"]["student"] for run in plan.runs}}
    needed = sum(
        sizes[run.config["model"]["student"]] * (1 + run.config["trainer"]["keep_checkpoints"])
        for run in plan.runs
        if not sweep.run(run).summary_file.exists()
    )
    if needed > free:
        raise ConfigError(
            f"output_dir={sweep.path} is not allowed: the runs need about {needed / 1e9:.1f} GB and {existing} has "
            f"{free / 1e9:.1f} GB free; choose another disk, or fewer runs."
        )


def _checkpoint_bytes(student: str) -> int:
    if student in _SHIPPED_BYTES:
        return _SHIPPED_BYTES[student]
    folder = Path(student) if Path(student).is_dir() else _in_cache(student)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder is not None else 0
    return weights // 2 * _BYTES_PER_PARAMETER  # half precision as a rule; float32 weights overestimate


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
