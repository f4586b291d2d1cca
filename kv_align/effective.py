"""What choices mean together: impossible combinations are refused, choices without effect are taken out.

`effective` is the one way from a composed configuration to the `Config` that a run obeys and that its content hash is
taken of. Two commands that mean the same run give the same `Config`. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from hydra.utils import get_method, get_object

from kv_align.config import Choice, Config, validate
from kv_align.errors import ConfigError, refused
from kv_align.model_card import ModelCard, model_card, model_path
from kv_align.options import constant_of


def effective(raw: dict[str, Any]) -> tuple[Config, list[str]]:
    """Validate a composed configuration and make it canonical.

    Parameters
    ----------
    raw
        Plain containers, as `OmegaConf.to_container(composed, resolve=True)` gives them.

    Returns
    -------
    The configuration, and one line for each choice that was taken out because it has no effect.

    Raises
    ------
    ConfigError
        For whatever can be known to be wrong before anything is loaded.
    """
    config = validate(Config, raw)
    _check_loss_against_aligner(config)
    changes, notes = _without_effect(config)
    config = config.model_copy(update=changes)
    teacher, student = _check_models(config)
    _check_data(config)
    _check_trainer(config)
    _check_layer_map(config, teacher, student)
    _check_logits(config, teacher, student)
    absolute = {"teacher": config.model.teacher, "student": config.model.student}
    absolute = {role: name if name == "embedded" else model_path(name, role) for role, name in absolute.items()}
    config = config.model_copy(
        update={"model": config.model.model_copy(update=absolute), "data": _absolute_data(config)}
    )
    return config, notes


def signal_of(loss: Choice) -> str:
    """Return what a loss needs of the teacher: `none`, `keys_values`, `keys_values_queries` or `logits`."""
    return str(_declared("loss", loss, "signal"))


def uses_keys_values(config: Config) -> bool:
    """Whether the run compares keys and values at all."""
    return signal_of(config.loss).startswith("keys_values")


def _declared(group: str, choice: Choice, name: str) -> Any:
    try:
        return constant_of(choice.target, name)
    except ValueError as error:
        raise ConfigError(
            f"{group}={choice.name} is not allowed: {error}; correct its _target_ or that class."
        ) from None


def _check_loss_against_aligner(config: Config) -> None:
    if uses_keys_values(config) and not config.aligner.target:
        raise ConfigError(
            f"loss={config.loss.name} is not allowed with aligner={config.aligner.name}: there would be no projected keys "
            "and values to compare with; use aligner=flat or structured, or loss=ce or logit_kd."
        )


def _without_effect(config: Config) -> tuple[dict[str, Any], list[str]]:
    changes: dict[str, Any] = {}
    notes = []
    if not uses_keys_values(config):
        reason = f"loss={config.loss.name}, which compares no keys and values"
        for group in ("layer_map", "time_warp", "keys", "align", "init"):
            changes[group] = None
        if config.aligner.target:
            notes.append(f"aligner={config.aligner.name} has no effect on {reason}: left out.")
            changes["aligner"] = Choice(name="none", target="")
        if config.data.shuffle_teacher:
            raise refused("data.shuffle_teacher", True, f"false with {reason}")
    else:
        uses_init = _declared("aligner", config.aligner, "uses_init")
        for group in ("layer_map", "time_warp", "keys", "align", *(("init",) if uses_init else ())):
            if getattr(config, group) is None:
                needing = f"aligner={config.aligner.name}" if group == "init" else f"loss={config.loss.name}"
                raise refused(group, None, f"what conf/ has for it, since {needing} needs it")
        if config.init is not None and not uses_init:
            notes.append(f"init={config.init.name} has no effect on aligner={config.aligner.name}: left out.")
            changes["init"] = None
        if config.align is not None:
            used = {"fit_then_freeze": "fit_steps", "alternate": "period"}.get(config.align.fit)
            idle = {option: None for option in ("fit_steps", "period") if option != used}
            changes["align"] = config.align.model_copy(update=idle)
    changes["trainer"] = config.trainer.model_copy(update=_idle_in_trainer(config))
    if config.data.rationale != "short":
        changes["data"] = config.data.model_copy(update={"rationale_every": None})
    return changes, notes


def _idle_in_trainer(config: Config) -> dict[str, None]:
    trainer = config.trainer
    learns = uses_keys_values(config) and config.align is not None and config.align.fit != "frozen"
    idle = {
        "epochs": trainer.max_steps is not None,
        "aligner_lr": not learns,
        "micro_batch_size": trainer.micro_batch_size == trainer.batch_size,
    }
    return {option: None for option, without_effect in idle.items() if without_effect}


def _check_models(config: Config) -> tuple[ModelCard | None, ModelCard | None]:
    cards = {}
    for role in ("teacher", "student"):
        name = getattr(config.model, role)
        try:
            cards[role] = card = model_card(model_path(name, role))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"model.{role}={name} is not allowed: its config.json cannot be read ({error}); "
                "save the model again with save_pretrained."
            ) from None
        needed = role == "teacher" or config.model.student_start == "pretrained"
        if card is not None and needed and not card.has_weights:
            raise ConfigError(
                f"model.{role}={name} is not allowed: that folder holds no safetensors weights; "
                "save the model with save_pretrained and name its folder."
            )
    return cards["teacher"], cards["student"]


def _check_data(config: Config) -> None:
    if config.data.rationale == "short" and config.data.rationale_every is None:
        raise refused("data.rationale_every", None, "a whole number with data.rationale=short")
    if config.data.rationale != "full" and not get_object(config.data.target).has_reasoning:
        raise refused(
            "data.rationale", config.data.rationale, f"full with data={config.data.name}, whose texts have no steps"
        )
    path = config.data.options.get("path")
    if path and not Path(path).expanduser().exists():
        raise ConfigError(f"data.path={path} is not allowed: there is no such file or folder; correct the path.")
    try:
        get_object(config.data.target)(**_absolute_data(config).options)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"data={config.data.name} is not allowed: {error}.") from None


def _absolute_data(config: Config) -> Any:
    path = config.data.options.get("path")
    if not path:
        return config.data
    options = {**config.data.model_dump(by_alias=True), "path": str(Path(path).expanduser().resolve())}
    return type(config.data).model_validate(options)


def _check_trainer(config: Config) -> None:
    trainer = config.trainer
    micro = trainer.micro_batch_size
    if micro is not None and trainer.batch_size % micro:
        raise refused("trainer.micro_batch_size", micro, f"a divisor of trainer.batch_size={trainer.batch_size}")
    if config.data.shuffle_teacher and (micro or trainer.batch_size) < 2:
        raise refused("data.shuffle_teacher", True, "false where a micro-batch holds a single example")
    if trainer.max_steps is None and trainer.epochs is None:
        raise refused("trainer.epochs", None, "a number above 0, or trainer.max_steps to a whole number")
    if trainer.aligner_lr is None and config.align is not None and config.align.fit != "frozen":
        raise refused("trainer.aligner_lr", None, f"a number above 0 with align.fit={config.align.fit}")
    if trainer.max_steps is not None and trainer.warmup_steps >= trainer.max_steps:
        raise refused("trainer.warmup_steps", trainer.warmup_steps, f"below trainer.max_steps={trainer.max_steps}")
    if config.align is not None and config.align.fit == "fit_then_freeze":
        if config.align.fit_steps is None:
            raise refused("align.fit_steps", None, "a whole number with align.fit=fit_then_freeze")
        if trainer.max_steps is not None and config.align.fit_steps >= trainer.max_steps:
            raise refused("align.fit_steps", config.align.fit_steps, f"below trainer.max_steps={trainer.max_steps}")
    if config.align is not None and config.align.fit == "alternate" and config.align.period is None:
        raise refused("align.period", None, "a whole number with align.fit=alternate")
    package = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb"}[trainer.tracker]
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"trainer.tracker={package} is not allowed: the package {package} is not installed; "
            "install kv-align[trackers] or use trainer.tracker=none."
        )


def _check_layer_map(config: Config, teacher: ModelCard | None, student: ModelCard | None) -> None:
    if config.layer_map is None or teacher is None or student is None:
        return
    if not (teacher.num_layers and student.num_layers):  # their files do not say it; known when they are loaded
        return
    try:
        get_method(config.layer_map.target)(
            teacher.num_layers, student.num_layers, config.seed, **config.layer_map.options
        )
    except ValueError as error:
        raise ConfigError(f"layer_map={config.layer_map.name} is not allowed: {error}.") from None


def _check_logits(config: Config, teacher: ModelCard | None, student: ModelCard | None) -> None:
    if signal_of(config.loss) != "logits":
        return
    if config.data.rationale != "full":
        raise refused(
            "data.rationale", config.data.rationale, f"full with loss={config.loss.name}, which compares token by token"
        )
    if teacher is not None and student is not None and teacher.tokenizer_digest != student.tokenizer_digest:
        raise ConfigError(
            f"loss={config.loss.name} is not allowed with model.teacher={config.model.teacher}: its vocabulary is another "
            f"than that of model.student={config.model.student}; use a pair with one tokenizer, or another loss."
        )
