"""The states of all generators that a run draws from, as numbers in safetensors: nothing in such a file can be executed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.other import load as load_weights_only
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kv_align.runs.errors import ConfigError


def save(folder: Path, process: int) -> None:
    """Write down the states of Python's, NumPy's and PyTorch's generators, of the CPU and of the GPUs."""
    version, numbers, spare = random.getstate()
    kind, keys, place, has_spare, numpy_spare = np.random.get_state(legacy=True)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(numbers, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),  # type: ignore[union-attr]
    }
    for device, state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        tensors[f"cuda_{device}"] = state
    about = {"python": [version, spare], "numpy": [kind, int(place), int(has_spare), float(numpy_spare)]}
    save_file(tensors, _file(folder, process), {"about": json.dumps(about)})


def restore(folder: Path, process: int) -> None:
    """Set all generators as `save` found them, or as version 0.1.0 wrote them down.

    Raises
    ------
    ConfigError
        If the file is missing or damaged: the run could go on only with other numbers.
    """
    file = _file(folder, process)
    try:
        _restore(file) if file.is_file() else _restore_as_0_1_0_wrote(folder / f"random_states_{process}.pkl")
    except (SafetensorError, OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{folder} cannot be gone on from: its random states of process {process} are missing or damaged "
            f"({type(error).__name__}); delete this checkpoint to go on from the one before, or all of them to start again."
        ) from error


def _restore(file: Path) -> None:
    with safe_open(file, "pt") as content:
        about: dict[str, Any] = json.loads(content.metadata()["about"])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dictionary
    version, spare = about["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), spare))
    kind, *rest = about["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    gpus = sorted((name for name in tensors if name.startswith("cuda_")), key=lambda name: int(name[5:]))
    if gpus and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[name] for name in gpus])


def _restore_as_0_1_0_wrote(file: Path) -> None:
    """Read a pickle of which only numbers and arrays are allowed to be made."""
    try:
        states = load_weights_only(file)
    except Exception as error:  # unpickling raises whatever it likes
        raise ValueError(str(error)) from error
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if "torch_cuda_manual_seed" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])


def _file(folder: Path, process: int) -> Path:
    return folder / f"random_states_{process}.safetensors"
