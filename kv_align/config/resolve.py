"""What choices mean together: impossible combinations are refused, choices without effect are taken out.

`resolve` is the one way from a composed configuration to the `Config` that a run obeys and that its content hash is
taken of. Two commands that mean the same run give the same `Config`. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kv_align.config.checks import (
    absolute_data,
    check_adapter,
    check_batch_size,
    check_data,
    check_init,
    check_layer_map,
    check_layers_of_loss,
    check_logits,
    check_loss_against_aligner,
    check_models,
    check_places,
    check_teacher_loading,
    check_trainer,
)
from kv_align.config.config import Config, warmup_of
from kv_align.config.extras import check_extras
from kv_align.config.inputs import check_inputs, digest_inputs
from kv_align.config.model_card import SHIPPED, model_path
from kv_align.config.options import constant_of, options_of, parameters_of
from kv_align.config.schema import Choice, ChoiceType, validate
from kv_align.config.signals import concerned_groups, declared, learns_projection, signals_of, uses_aligner
from kv_align.runs.errors import invalid_value


def resolve(raw: dict[str, Any]) -> tuple[Config, list[str]]:
    """Validate a composed configuration and make it canonical.

    Parameters
    ----------
    raw
        Plain containers, as `OmegaConf.to_container(composed, resolve=True)` gives them.

    Returns
    -------
    The configuration, and one line for each choice that was taken out because it has no effect, or that means little.

    Raises
    ------
    ConfigError
        For whatever can be known to be wrong before anything is loaded.
    """
    config = validate(Config, raw)
    check_inputs(config)
    check_places(config)
    check_batch_size(config)
    check_loss_against_aligner(config)
    check_init(config)
    changes, notes = _without_effect(config)
    config = config.model_copy(update=changes)
    teacher, student = check_models(config)
    check_adapter(config)
    check_teacher_loading(config)
    check_extras(config)
    check_data(config)
    check_trainer(config)
    check_layer_map(config, teacher, student)
    check_layers_of_loss(config, student)
    check_logits(config, teacher, student)
    absolute = {"teacher": config.model.teacher, "student": config.model.student}
    absolute = {role: name if name in SHIPPED else model_path(name, role) for role, name in absolute.items()}
    tasks = config.evaluation.lm_eval and [
        str(Path(task).resolve()) if Path(task).is_file() else task for task in config.evaluation.lm_eval
    ]
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update=absolute),
            "data": absolute_data(config),
            "evaluation": config.evaluation.model_copy(update={"lm_eval": tasks}),
        }
    )
    config = config.model_copy(update={"inputs": digest_inputs(config)})
    return config, notes + _fitted_to_noise(config)


def _without_effect(config: Config) -> tuple[dict[str, Any], list[str]]:
    changes: dict[str, Any] = {}
    notes: list[str] = []
    aligned, concerned = uses_aligner(config), concerned_groups(config)
    reason = f"loss={config.loss.name}, which " + ("needs no aligner" if concerned else "compares no keys and values")
    for group in ("layer_map", "time_warp", "keys", "align", "init"):
        if group not in concerned:
            changes[group] = None
    changes |= _cache(config, notes)
    if not aligned and config.aligner.target:
        notes.append(f"aligner={config.aligner.name} has no effect on {reason}: left out.")
        changes["aligner"] = Choice(name="none", target="")
    if not concerned and config.data.shuffle_teacher:
        raise invalid_value("data.shuffle_teacher", True, f"false with {reason}")
    uses_init = aligned and declared("aligner", config.aligner, "uses_init")
    for group in concerned:
        if getattr(config, group) is None and (group != "init" or uses_init):
            needing = f"aligner={config.aligner.name}" if group == "init" else f"loss={config.loss.name}"
            raise invalid_value(group, None, f"what conf/ has for it, since {needing} needs it")
    if aligned and config.init is not None and not uses_init:
        notes.append(f"init={config.init.name} has no effect on aligner={config.aligner.name}: left out.")
        changes["init"] = None
    if aligned and config.align is not None:
        used = {"fit_then_freeze": "fit_steps", "alternate": "period"}.get(config.align.fit)
        idle = {option: None for option in ("fit_steps", "period") if option != used}
        changes["align"] = config.align.model_copy(update=idle)
    changes["loss"] = _without_idle_options(config.loss)
    if aligned:
        changes["aligner"] = _without_idle_options(config.aligner)
    changes["trainer"] = config.trainer.model_copy(update=_idle_in_trainer(config) | _shorter_warmup(config, notes))
    data = config.data if config.data.rationale == "short" else config.data.model_copy(update={"rationale_every": None})
    changes["data"] = _without_idle_options(data)
    return changes, notes


def _fitted_to_noise(config: Config) -> list[str]:
    if config.model.student_start != "scratch":
        return []
    asked = ((config.init, "init", "calibration"), (config.layer_map, "layer_map", "similarity"))
    return [
        f"{group}={choice.name} is fitted to the states of a student that has learned nothing, so to noise; use "
        "model.student_start=pretrained."
        for choice, group, parameter in asked
        if choice is not None and parameter in parameters_of(choice.target)
    ]


def _cache(config: Config, notes: list[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if config.teacher_cache not in ("off", "auto"):
        changes["teacher_cache"] = str(Path(config.teacher_cache).expanduser().absolute())
    if config.teacher_cache == "off" or not signals_of(config.loss):
        if config.teacher_cache == "off" and config.teacher_cache_keeps == "targets":
            notes.append("teacher_cache_keeps=targets has no effect with teacher_cache=off: left out.")
        # Nothing is rounded: what is measured is kept as it was computed.
        return {**changes, "teacher_cache_dtype": None, "teacher_cache_keeps": None}
    for key, allowed in (("dtype", "bfloat16 or float32"), ("keeps", "states or targets")):
        if getattr(config, f"teacher_cache_{key}") is None:
            raise invalid_value(f"teacher_cache_{key}", None, f"{allowed} with a teacher_cache")
    fixed = uses_aligner(config) and config.align is not None and config.align.fit == "frozen"
    if config.teacher_cache_keeps == "targets" and (not fixed or config.data.shuffle_teacher):
        why = (
            "data.shuffle_teacher=true, where they depend on the batch" if fixed else "an aligner that learns, or none"
        )
        notes.append(f"teacher_cache_keeps=targets has no effect with {why}: states are kept.")
        changes["teacher_cache_keeps"] = "states"
    return changes


def _without_idle_options(choice: ChoiceType) -> ChoiceType:
    """Take out options that are not set, so that a new one changes no old run's identity, and what a set one overrides."""
    known, kept = options_of(choice.target), choice.model_dump(by_alias=True)
    try:
        overrides = constant_of(choice.target, "overrides")
    except ValueError:
        overrides = {}
    for option, overridden in overrides.items():
        if kept.get(option) is not None:
            kept[overridden] = None
    if choice.parts:
        kept["parts"] = {name: _without_idle_options(part) for name, part in choice.parts.items()}
    return type(choice).model_validate(
        {key: value for key, value in kept.items() if value is not None or key not in known or known[key].required}
    )


def _shorter_warmup(config: Config, notes: list[str]) -> dict[str, int]:
    steps, asked = config.trainer.max_steps, config.trainer.warmup_steps
    if steps is None or asked < steps:
        return {}
    shorter = warmup_of(asked, steps)
    notes.append(f"trainer.warmup_steps={asked} is shortened to {shorter}: trainer.max_steps={steps}.")
    return {"warmup_steps": shorter}


def _idle_in_trainer(config: Config) -> dict[str, None]:
    trainer = config.trainer
    learns = uses_aligner(config) and config.align is not None and config.align.fit != "frozen"
    learns = learns or learns_projection(config)
    idle = {
        "epochs": trainer.max_steps is not None,
        "aligner_lr": not learns,
        "micro_batch_size": trainer.micro_batch_size == trainer.batch_size,
    }
    return {option: None for option, without_effect in idle.items() if without_effect}
