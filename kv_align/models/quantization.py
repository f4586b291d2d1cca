"""A teacher in 8 or 4 bits, as bitsandbytes packs it, with the same numbers on every processor."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from kv_align.config.config import ModelConfig
from kv_align.runs.errors import ConfigError

_METHODS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},  # LLM.int8 (Dettmers et al., 2022)
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},  # QLoRA (Dettmers et al., 2023)
}
_BLOCK = 64
"""How many weights share a scale in 4 bits."""


def quantization_of(config: ModelConfig, architecture: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """Return what bitsandbytes is told to make of the teacher's weights; None where they are loaded as they are."""
    if config.teacher_quantization is None:
        return None
    dtype = architecture.dtype if config.teacher_dtype == "auto" else getattr(torch, config.teacher_dtype)
    return BitsAndBytesConfig(**_METHODS[config.teacher_quantization], bnb_4bit_compute_dtype=dtype)


def check_widths(config: ModelConfig, architecture: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Refuse 4-bit weights on a CPU whose rows are no whole blocks, before any weight is loaded.

    On CPUs with AVX-512, bitsandbytes reads such rows with other rows' scales and says nothing. Other CPUs and GPUs read
    them rightly; but a number that hangs on the processor is none, so that all CPUs are treated alike.

    Parameters
    ----------
    config, architecture
        What is asked for, and what the teacher's own files say.
    options
        What `from_pretrained` will be told, its `device_map` among it.

    Raises
    ------
    ConfigError
        If there is such a module; it names one, and its width.
    """
    own = getattr(architecture, "quantization_config", None)
    asked = options.get("quantization_config")
    method = asked or (BitsAndBytesConfig.from_dict(own) if own and own.get("quant_method") == "bitsandbytes" else None)
    if method is None or not method.load_in_4bit or not _on_cpu(options["device_map"]):
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(architecture), trust_remote_code=config.teacher in config.remote_code
        )
    AutoHfQuantizer.from_config(method, pre_quantized=asked is None).preprocess_model(model, device_map=None)
    for name, module in _four_bit_modules(model):
        if module.in_features % _BLOCK:
            key, remedy = f"model.teacher={config.teacher}, which is in 4 bits,", ""
            if asked is not None:
                key = f"model.teacher_quantization={config.teacher_quantization} with model.teacher={config.teacher}"
                remedy = "model.teacher_quantization=int8 or null, "
            raise ConfigError(
                f"{key} is not allowed on a CPU: bitsandbytes reads 4-bit weights there in rows of whole blocks of {_BLOCK}, "
                f"and a row of {name} has {module.in_features}; "
                f"use {remedy}a teacher whose widths are multiples of {_BLOCK}, or a GPU."
            )


def keep_layout(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in the one layout that every processor reads; to be called before the first forward pass.

    On a CPU with AVX512-BF16, bitsandbytes would pack them once more, for a kernel that is slower on whole texts than the
    general one, rounds scales to bfloat16, and comes back from `state_dict` with its scales in another order: a teacher
    whose weights were read, for a digest, would compute something else afterwards.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        for _, module in _four_bit_modules(model):
            module.support_avx512bf16_for_cpu = False


def _four_bit_modules(model: PreTrainedModel) -> list[tuple[str, Any]]:
    from bitsandbytes.nn import Linear4bit  # an extra of the package

    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def _on_cpu(device_map: Any) -> bool:
    if isinstance(device_map, dict):
        return any(str(device) in ("cpu", "disk") for device in device_map.values())
    return not torch.accelerator.is_available()
