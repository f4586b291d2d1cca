"""Low-rank adapters (Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models), as PEFT makes them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as FAMILY_TARGETS
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kv_align.config.options import FractionFloat, NameList, PositiveFloat, PositiveInt
from kv_align.models.adapter import Adapter


class Lora(Adapter):
    """To each target's weight it adds alpha / rank * B A, of which B starts at zero: the start is the student itself.

    Parameters
    ----------
    student
        Pretrained and on the CPU; changed in place.
    seed
        What A is drawn from.
    rank
        Rows of A, columns of B.
    alpha
        See above.
    dropout
        Of what A is given, in training.
    target_modules
        Names of linear modules, such as `k_proj`; None: what PEFT takes for the student's family.

    Raises
    ------
    ValueError
        If the student has no such linear module, if PEFT has no choice for its family, or if a target's weight is also
        the input embedding's, where merging would change both.
    """

    requires = "peft"

    def __init__(
        self,
        student: PreTrainedModel,
        seed: int,
        *,
        rank: PositiveInt,
        alpha: PositiveFloat,
        dropout: FractionFloat,
        target_modules: NameList | None,
    ) -> None:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=_targets(student, target_modules),
            # GPT-2 and its kin keep their weights the other way round.
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in student.modules()),
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT still asks for it by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            self._wrapper = get_peft_model(student, config)

    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`."""
        self._wrapper.save_pretrained(str(folder), save_embedding_layers=False)

    def merge(self) -> None:
        """Add alpha / rank * B A to the targets' weights and put the plain modules back."""
        self._wrapper.merge_and_unload()


def _targets(student: PreTrainedModel, asked: list[str] | None) -> list[str]:
    """Return the names to adapt, each of which is there."""
    linear = {name for name, module in student.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    family = student.config.model_type
    if asked is None:
        if family not in FAMILY_TARGETS:
            raise ValueError(
                f"target_modules=null is not allowed: PEFT has no choice for {family}; set it to some of {there}"
            )
        asked = list(FAMILY_TARGETS[family])
    modules = {each: [name for name in linear if f".{name}".endswith(f".{each}")] for each in asked}
    missing = [each for each, names in modules.items() if not names]
    if missing:
        raise ValueError(
            f"target_modules={missing[0]} is not allowed: {type(student).__name__} has no linear module of that name; use "
            f"some of {there}"
        )
    embedding = student.get_input_embeddings().weight
    for each, names in modules.items():
        if any(student.get_submodule(name).weight is embedding for name in names):
            raise ValueError(
                f"target_modules={each} is not allowed: its weight is the input embedding's too, and merging would change "
                "both; leave it out"
            )
    return asked
