"""The typed schema of `conf/`: what a run is asked to do, before anything of it is built. Imports no torch.

A `Config` is made once, by `validate`, from what Hydra composed; no `DictConfig` travels further. Its sections are plain
frozen data. A *choice* (aligner, loss, init, ...) names its target by `_target_`, and its other keys are that target's
options, bound to the target's signature by `kv_align.options`. What choices mean together is in `kv_align.effective`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kv_align.errors import ConfigError, first_error, unknown_key
from kv_align.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, options_of

# Excluded from the content hash: these change where a run is written, how it is shown and how fast it goes, or are mere
# labels, but no number of the result.
_NOT_HASHED = {
    "": {"output_dir", "run_name", "arm", "teacher_cache"},
    "model": {"teacher_device_map"},
    "trainer": {"parallel", "num_workers", "checkpoint_interval", "keep_checkpoints", "tracker", "name"},
    "*": {"name"},
}


class Section(BaseModel):
    """A frozen part of the configuration that knows exactly which keys it has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


SectionType = TypeVar("SectionType", bound=Section)


class Choice(Section):
    """One choice of a group: a label, a target, and the target's options as extra keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, populate_by_name=True)

    name: str
    target: str = Field(alias="_target_", default="")

    @property
    def options(self) -> dict[str, Any]:
        """The target's keyword arguments."""
        return dict(self.__pydantic_extra__ or {})


ChoiceType = TypeVar("ChoiceType", bound=Choice)


class ModelConfig(Section):
    """Teacher and student: `embedded`, a folder, or a name on the hub."""

    name: str
    teacher: str
    student: str
    student_start: Literal["scratch", "pretrained"]
    teacher_dtype: Literal["auto", "float32", "bfloat16"]
    gradient_checkpointing: bool
    remote_code: list[str]
    # These have defaults, as what is new: plans and runs that were frozen before they were there go on.
    teacher_device_map: (
        Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, NonNegativeInt | str] | None
    ) = None
    teacher_quantization: Literal["int8", "nf4"] | None = None


class DataConfig(Choice):
    """A data source and how its texts are read."""

    max_length: PositiveInt
    rationale: Literal["full", "short", "none"]
    rationale_every: PositiveInt | None
    shuffle_teacher: bool


class KeysConfig(Section):
    """Whether keys are compared before or after the rotary embedding."""

    name: str
    rotated: bool


class AlignConfig(Section):
    """Who learns when from the alignment loss."""

    fit: Literal["joint", "fit_then_freeze", "alternate", "frozen"]
    fit_steps: PositiveInt | None
    period: PositiveInt | None


class TrainerConfig(Section):
    """The optimisation, the same in every arm; `batch_size` is that of an optimizer step over all processes."""

    name: str
    epochs: PositiveFloat | None
    max_steps: PositiveInt | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    lr: PositiveFloat
    aligner_lr: PositiveFloat | None
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat
    mixed_precision: Literal["no", "bf16"]
    parallel: Literal["ddp", "fsdp"] = "ddp"  # a plan that was frozen before there was a choice has none
    log_interval: PositiveInt
    checkpoint_interval: PositiveInt
    keep_checkpoints: PositiveInt
    num_workers: NonNegativeInt
    tracker: Literal["none", "tensorboard", "wandb"]


class EvaluationConfig(Section):
    """What is measured, on which examples, and when: the same in every arm."""

    interval: PositiveInt
    batch_size: PositiveInt
    validation_examples: PositiveInt
    exact_match_split: Literal["validation", "test"]
    exact_match_examples: NonNegativeInt
    exact_match_at_intervals: NonNegativeInt
    max_new_tokens: PositiveInt
    probe_examples: Annotated[int, Ge(2)]
    probe_ridge: PositiveFloat
    calibration_examples: PositiveInt


class Config(Section):
    """Everything one run is told. A choice that has no effect on it is None (see `kv_align.effective`)."""

    arm: str | None
    seed: NonNegativeInt
    output_dir: str
    run_name: str | None
    model: ModelConfig
    data: DataConfig
    aligner: Choice
    init: Choice | None
    loss: Choice
    layer_map: Choice | None
    time_warp: Choice | None
    keys: KeysConfig | None
    align: AlignConfig | None
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    teacher_cache: str
    teacher_cache_dtype: Literal["bfloat16", "float32"] | None
    teacher_cache_keeps: Literal["states", "targets"] | None = None
    adapter: Choice = Choice(name="none")


class LlamaShape(Section):
    """A Llama to pretrain, and for how long."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    steps: PositiveInt


class PretrainConfig(Section):
    """The recipe of a teacher and a student start (`kv_align.pretrain`)."""

    seed: NonNegativeInt
    output_dir: str
    data: DataConfig
    vocabulary_size: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup_steps: NonNegativeInt
    evaluation_examples: PositiveInt
    teacher: LlamaShape
    student: LlamaShape


def validate(kind: type[SectionType], raw: dict[str, Any]) -> SectionType:
    """Check a composed configuration against the schema.

    Raises
    ------
    ConfigError
        For the first unknown key, wrong type or value outside its range, as one sentence.
    """
    try:
        section = kind.model_validate(raw)
    except ValidationError as error:
        finding = error.errors()[0]
        if finding["type"] == "extra_forbidden":
            raise _unknown(kind, finding["loc"]) from None
        raise first_error(error) from None
    checked = {key: check_options(key, value) for key, value in section if isinstance(value, Choice)}
    return section.model_copy(update=checked)


def _unknown(kind: type[BaseModel], location: tuple[str | int, ...]) -> ConfigError:
    *parents, _ = location
    for parent in parents:
        annotation = kind.model_fields[str(parent)].annotation
        members = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))
    where = ".".join(map(str, parents)) or "the configuration"
    return unknown_key(".".join(map(str, location)), kind.model_fields, where)


def check_options(group: str, choice: ChoiceType) -> ChoiceType:
    """Bind a choice's options to its target's keyword-only parameters, without importing the target's module.

    Returns
    -------
    The choice with its options as the types say (1 as 1.0 where a float is wanted), so that they hash alike.

    Raises
    ------
    ConfigError
        For an option that the target does not have, or one of another type or range.
    """
    if not choice.target:
        known = {}
    else:
        try:
            known = options_of(choice.target)
        except ValueError as error:
            raise ConfigError(f"{group}={choice.name}: {error}; correct it in that choice's YAML file.") from None
    options = choice.options
    for option, value in options.items():
        if option not in known:
            raise unknown_key(f"{group}.{option}", known, f"{group}={choice.name}")
        try:
            options[option] = TypeAdapter(known[option].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise first_error(error, f"{group}.{option}") from None
    missing = [name for name, option in known.items() if option.required and name not in options]
    if missing:
        raise ConfigError(
            f"{group}.{missing[0]} is missing: {group}={choice.name} needs it; add it to the command line."
        )
    return choice.model_copy(update=options)


def content_hash(config: Config) -> str:
    """SHA-256 (hex) over everything that can change a number of the run: its identity."""
    raw = config.model_dump(by_alias=True)
    if raw["teacher_cache_dtype"] is None:  # whether there is a cache matters, where it is does not
        del raw["teacher_cache_dtype"]
    if raw["model"]["teacher_quantization"] is None:
        del raw["model"]["teacher_quantization"]
    if not raw["adapter"]["_target_"]:
        del raw["adapter"]
    if raw["teacher_cache_keeps"] != "targets":  # what is rounded
        del raw["teacher_cache_keeps"]
    for section, excluded in _NOT_HASHED.items():
        parts = [raw] if section == "" else [raw[section]] if section != "*" else list(raw.values())
        for part in parts:
            if isinstance(part, dict):
                for key in excluded:
                    part.pop(key, None)
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def config_directory() -> Path:
    """Return the folder `conf/`: beside the package in a checkout, inside it in an installed wheel."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"
