"""Checkpoints that a kill at any moment cannot spoil: written beside, verified by digest, renamed into place.

Weights and the optimizer's state are in Accelerate's format; the schedule is in the manifest, and random states are
numbers in safetensors. Nothing of it is executed when it is read: what is a pickle (the optimizer's state) may hold tensors
and plain containers alone. Sharded checkpoints are the exception: PyTorch's own format keeps its table of contents as a
pickle, so that only a folder of one's own should be resumed with `trainer.parallel=fsdp`.
Every process of a run writes its part into the same folder, and the first seals all of it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler

from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import file_digest, give_usual_mode, read_json, write_json
from kv_align.training import random_states

LOGGER = logging.getLogger(__name__)
_MANIFEST = "manifest.json"


def save(
    accelerator: Accelerator, directory: Path, step: int, state: dict[str, Any], keep: int, schedule: LRScheduler
) -> None:
    """Write a checkpoint and delete all but the newest `keep`.

    Parameters
    ----------
    accelerator
        Knows the models and the optimizer.
    directory
        The run's `checkpoints/`, the same in all processes.
    step
        Optimizer steps done.
    state
        What the loop needs to go on, as JSON.
    keep
        How many to keep.
    schedule
        Of the learning rates.
    """
    final = directory / f"step_{step:08d}"
    temporary = directory / f".writing_{step:08d}"
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        for left_over in directory.glob(".writing_*"):
            shutil.rmtree(left_over)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    # Accelerate's own are a pickle, and it goes on without a word where it cannot read them.
    (temporary / f"random_states_{accelerator.process_index}.pkl").unlink()
    random_states.save(temporary, accelerator.process_index)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        content = {"step": step, "sharded": accelerator.is_fsdp2, "state": state, "schedule": schedule.state_dict()}
        _seal(temporary, final, content, keep)
    accelerator.wait_for_everyone()


def _seal(temporary: Path, final: Path, content: dict[str, Any], keep: int) -> None:
    """Put a manifest to what was written and give it its name; delete what it replaces."""
    files = {str(file.relative_to(temporary)): file for file in sorted(temporary.rglob("*")) if file.is_file()}
    for file in files.values():
        give_usual_mode(file)
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    digests = {name: file_digest(file) for name, file in files.items()}
    write_json(temporary / _MANIFEST, {**content, "sha256": digests})
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    # One with a later step is of an attempt that this one could not go on from: damaged.
    directory = final.parent
    later = [each for each in directory.glob("step_*") if each.name > final.name]
    earlier = sorted(each for each in directory.glob("step_*") if each.name <= final.name)[:-keep]
    for old in (*later, *earlier):
        shutil.rmtree(old)


def newest_sound(directory: Path) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written; None if there is none."""
    for candidate in sorted(directory.glob("step_*"), reverse=True):
        if is_sound(candidate):
            return candidate
        LOGGER.warning("checkpoint %s is damaged: trying the one before it", candidate)
    return None


def is_sound(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint has the digest that its manifest names."""
    manifest = read_json(checkpoint / _MANIFEST)
    if manifest is None:
        return False
    return all(
        (checkpoint / name).is_file() and file_digest(checkpoint / name) == digest
        for name, digest in manifest["sha256"].items()
    )


def restore(accelerator: Accelerator, checkpoint: Path, schedule: LRScheduler) -> dict[str, Any]:
    """Load a sound checkpoint into what the accelerator knows and the schedule; returns the loop's state, with `step` in it.

    Raises
    ------
    ConfigError
        If it was saved in shards and is to be loaded whole, or the other way round; if its random states are damaged, or
        if it holds other things than numbers.
    """
    manifest = read_json(checkpoint / _MANIFEST)
    assert manifest is not None
    sharded = manifest.get("sharded", False)  # not in those of before there were shards
    if sharded != accelerator.is_fsdp2:
        before = "fsdp and several processes" if sharded else "ddp, or fsdp and a single process"
        raise ConfigError(
            f"{checkpoint} cannot be gone on from: it was saved with trainer.parallel={before}; go on with that, or delete "
            "the run's checkpoints to start again."
        )
    try:
        if "schedule" in manifest:
            accelerator.load_state(str(checkpoint))
            schedule.load_state_dict(manifest["schedule"])
        else:
            schedule.load_state_dict(_load_as_0_1_0_wrote(accelerator, checkpoint))
    except UnpicklingError as error:
        raise ConfigError(
            f"{checkpoint} cannot be gone on from: one of its files holds other things than numbers, which are not executed; "
            "delete the run's checkpoints to start again."
        ) from error
    random_states.restore(checkpoint, accelerator.process_index)
    return {**manifest["state"], "step": manifest["step"]}


def _load_as_0_1_0_wrote(accelerator: Accelerator, checkpoint: Path) -> dict[str, Any]:
    """Load what the accelerator knows; return the schedule's state, a pickle that Accelerate would execute."""
    schedule = checkpoint / "custom_checkpoint_0.pkl"
    with tempfile.TemporaryDirectory() as without:
        for file in checkpoint.iterdir():
            if file != schedule:
                (Path(without) / file.name).symlink_to(file.resolve())
        accelerator.load_state(without)
    state: dict[str, Any] = torch.load(schedule, weights_only=True)
    return state
