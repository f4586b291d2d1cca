"""How a teacher that is too large is loaded: spread by a device map, or quantised by bitsandbytes.

A device map changes no number, so it is not in a run's hash; a quantisation does and is.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kv_align.config.config import ModelConfig
from kv_align.models.devices import is_out_of_memory, is_spread
from kv_align.models.quantization import quantization_of
from kv_align.runs.errors import ConfigError


def loading_options(config: ModelConfig, architecture: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` is told beside name and precision; empty where it is to load as it always does.

    Parameters
    ----------
    config, architecture
        What is asked for, and what the teacher's own files say (they may be quantised already).
    device
        Where all of a quantised teacher goes that has no device map; it cannot be moved later.
    """
    options: dict[str, Any] = {}
    quantization = quantization_of(config, architecture)
    if quantization is not None:
        options["quantization_config"] = quantization
    if config.teacher_device_map is not None:
        options["device_map"] = config.teacher_device_map
    elif options or getattr(architecture, "quantization_config", None) is not None:
        options["device_map"] = {"": str(device)}
    return options


@contextmanager
def offload_folder(options: dict[str, Any]) -> Iterator[list[PreTrainedModel]]:
    """Add a folder for what goes to the disk, and delete it with the model that is put into the list.

    Weights are read from their own safetensors files; only those that are changed in loading are written there.
    """
    loaded: list[PreTrainedModel] = []
    folder = tempfile.mkdtemp(prefix="kv-align-offload-")
    options["offload_folder"] = folder
    try:
        yield loaded
    finally:
        if loaded:
            weakref.finalize(loaded[0], shutil.rmtree, folder, ignore_errors=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def placeable(config: ModelConfig) -> Iterator[None]:
    """Turn what a device map or quantisation that this machine cannot do raises into one sentence."""
    try:
        yield
    except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, ConfigError) or is_out_of_memory(error):
            raise
        reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__
        raise ConfigError(
            f"{_asked(config)} is not allowed: the teacher cannot be loaded so on this machine ({reason}); name devices "
            "that it has, or leave it out."
        ) from error


def check_names(config: ModelConfig, model: PreTrainedModel) -> None:
    """Refuse a mapping of modules that the teacher does not have, which would be left where it happens to be.

    Raises
    ------
    ConfigError
        If there is such a name.
    """
    if not isinstance(config.teacher_device_map, dict):
        return
    there = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    for name in config.teacher_device_map:
        if name not in there:
            raise ConfigError(
                f"model.teacher_device_map[{name}] is not allowed: {type(model).__name__} has no such module; use names "
                f"of its modules, such as {', '.join(child for child, _ in model.named_children())}."
            )


def check_processes(config: ModelConfig, model: PreTrainedModel, number: int) -> None:
    """Refuse a teacher that is spread over devices which every process would take for its own.

    Raises
    ------
    ConfigError
        If there is more than one process and the teacher is not on one device.
    """
    if number > 1 and is_spread(model):
        devices = ", ".join(sorted({str(device) for device in model.hf_device_map.values()}))
        raise ConfigError(
            f"{_asked(config)} is not allowed with {number} processes: it spreads each one's teacher over {devices}; use one "
            "process, or model.teacher_device_map=null."
        )


def _asked(config: ModelConfig) -> str:
    asked = {key: getattr(config, key) for key in ("teacher_device_map", "teacher_quantization")}
    return " with ".join(f"model.{key}={value}" for key, value in asked.items() if value is not None) or "model.teacher"
