"""The typed schema of `conf/`: what a run is asked to do, before anything of it is built. Imports no torch.

A `Config` is made once, by `kv_align.config.schema.validate`, from what Hydra composed; no `DictConfig` travels further. Its
sections and choices are plain frozen data. What choices mean together is in `resolve`, what makes a run the same run in
`identity`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import BeforeValidator

from kv_align.config.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from kv_align.config.schema import Choice, Section


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
    # What was frozen before there was a choice has numbers.
    answers: Literal["number", "text"] = "number"


class KeysConfig(Section):
    """Whether keys are compared before or after the rotary embedding."""

    name: str
    rotated: bool


class AlignConfig(Section):
    """Who learns when from the alignment loss."""

    fit: Literal["joint", "fit_then_freeze", "alternate", "frozen"]
    fit_steps: PositiveInt | None
    period: PositiveInt | None


def _listed(value: object) -> object:
    """Return one name as a list of it, and `none` as an empty one."""
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str) else value


class TrainerConfig(Section):
    """The optimisation, the same in every arm; `batch_size` is that of an optimizer step over all processes."""

    name: str
    epochs: Annotated[PositiveFloat, Le(1e6)] | None
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
    grad_norm_interval: PositiveInt = 1  # as it was for a plan that was frozen without it
    checkpoint_interval: PositiveInt
    keep_checkpoints: PositiveInt
    num_workers: NonNegativeInt
    tracker: Annotated[list[Literal["tensorboard", "mlflow", "wandb"]], BeforeValidator(_listed)]


def warmup_of(asked: int, num_steps: int) -> int:
    """Return the warm-up of a run: what is asked for, or a tenth of the run where that is no shorter than the run."""
    return asked if asked < num_steps else num_steps // 10


def _tasks(value: object) -> object:
    """Return one name as a list of it, and no names as None."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        value = [each.strip() if isinstance(each, str) else each for each in value]
    return value or None


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
    lm_eval: Annotated[list[Annotated[str, MinLen(1)]] | None, BeforeValidator(_tasks)] = None


class HubConfig(Section):
    """Where the student goes at the end of a run, by name and never by default."""

    repo: str | None = None
    private: bool = True


class Config(Section):
    """Everything one run is told. A choice that has no effect on it is None (see `kv_align.config.resolve`)."""

    arm: str | None
    seed: Seed
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
    hub: HubConfig = HubConfig()
    inputs: dict[str, str] | None = None
    """SHA-256 of what the run reads, by name (see `kv_align.config.inputs`); nothing that is asked for on a command line."""


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

    seed: Seed
    output_dir: str
    data: DataConfig
    vocabulary_size: Annotated[PositiveInt, Le(10_000_000)]
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup_steps: NonNegativeInt
    evaluation_examples: PositiveInt
    teacher: LlamaShape
    student: LlamaShape
