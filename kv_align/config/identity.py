"""What makes a run this run and no other: its settings by name, and its inputs by content. Imports no torch.

Two commands that mean the same run have the same hash, wherever the files lie and wherever a class stands in the code; what
changes where a run is written, how it is shown or how fast it goes is in no hash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kv_align.config.config import Config
from kv_align.config.inputs import changed_inputs, describe, task_files
from kv_align.config.schema import Choice
from kv_align.config.targets import FORMER_PATHS, choice_identity
from kv_align.runs.digests import digest_of_json
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory

# These change where a run is written, how it is shown and how fast it goes, or are mere labels, but no number of the result.
_NOT_HASHED = {
    "": ("output_dir", "run_name", "arm", "teacher_cache", "hub"),
    "model": ("teacher_device_map",),
    "trainer": [
        "parallel",
        "num_workers",
        "grad_norm_interval",
        "checkpoint_interval",
        "keep_checkpoints",
        "tracker",
        "name",
    ],
    "*": ("name",),
}


def content_hash(config: Config) -> str:
    """SHA-256 (hex) over everything that can change a number of the run: its identity.

    A configuration without `inputs` was frozen by version 0.1.0 and has the hash that it had there.
    """
    if config.inputs is None:
        return _hash_of_0_1_0(config)
    raw = _without_labels(config)
    for group, choice in config:
        if isinstance(choice, Choice):
            raw[group] = _identity_of(group, choice, raw[group])
    for role in ("teacher", "student"):
        if f"{role} config" in config.inputs:  # known by what it holds, so it may lie anywhere
            raw["model"][role] = None
    raw["model"]["remote_code"] = [
        role for role in ("teacher", "student") if getattr(config.model, role) in config.model.remote_code
    ]
    if "data" in config.inputs:
        raw["data"]["path"] = None
    own = {str(file): config.inputs[name] for name, file in task_files(config).items() if name in config.inputs}
    if own:
        raw["evaluation"]["lm_eval"] = [own.get(str(Path(task)), task) for task in config.evaluation.lm_eval or ()]
    if raw["teacher_cache_keeps"] != "targets":  # what is rounded
        raw["teacher_cache_keeps"] = None
    return digest_of_json(_set(raw))


def settings_hash(config: Config) -> str:
    """SHA-256 (hex) that runs have in common which differ in nothing but the seed."""
    return content_hash(config.model_copy(update={"seed": 0}))


def going_on(directory: RunDirectory, config: Config) -> Config:
    """Return the configuration under which a directory's run goes on: this one, or what version 0.1.0 knew of it.

    Raises
    ------
    ConfigError
        If the directory holds a run of other settings or of other inputs, or one that is no longer whole.
    """
    before = directory.status()
    former = config.model_copy(update={"inputs": None})
    if before is not None and before.content_hash == content_hash(former):
        return former
    if directory.holds_no_step():
        return config
    stored = {} if before is None or not directory.config_file.exists() else directory.read_config()
    inputs = stored.get("inputs")
    if before is not None and inputs and config.inputs is not None:
        same_settings = config.model_copy(update={"inputs": inputs})
        if before.content_hash == content_hash(same_settings) != content_hash(config):
            changed = describe(config, changed_inputs(inputs, config.inputs))
            raise ConfigError(
                f"{changed} since {directory.path} was begun with it: nothing was overwritten; restore what it was, or "
                "choose another run_name or output_dir."
            )
        length = _stored_length(stored)
        same_but_length = same_settings.model_copy(update={"trainer": config.trainer.model_copy(update=length)})
        if before.content_hash == content_hash(same_but_length) != content_hash(config):
            asked = " and ".join(f"trainer.{key}={value}" for key, value in length.items() if value is not None)
            raise ConfigError(
                f"{directory.path} holds this run with {asked}: nothing was overwritten, since a longer run has another "
                "schedule from its first step; choose another run_name, and to start from what this one learned "
                f"model.student={directory.student} model.student_start=pretrained."
            )
    directory.earlier_attempt(content_hash(config))
    return config


def continued_run(config: Config) -> dict[str, Any] | None:
    """Return which run a student is taken from, where it is what a run left; None for any other student."""
    folder = Path(config.model.student)
    if config.model.student_start != "pretrained" or not folder.is_dir():
        return None
    status = RunDirectory(folder.resolve().parent).status()
    if status is None or folder.name != "student":
        return None
    return {"path": str(folder.resolve().parent), "content_hash": status.content_hash, "steps": status.step}


def _identity_of(group: str, choice: Choice, raw: dict[str, Any]) -> dict[str, Any]:
    """Know a choice, and those that it is composed of, by their names instead of their class paths."""
    own = {key: value for key, value in raw.items() if key != "name"} | {
        "_target_": choice_identity(group, choice.target)
    }
    if choice.parts:
        own["parts"] = {name: _identity_of(group, part, raw["parts"][name]) for name, part in choice.parts.items()}
    return own


def _stored_length(stored: dict[str, Any]) -> dict[str, Any]:
    return {key: stored["trainer"].get(key) for key in ("max_steps", "epochs")}


def _without_labels(config: Config) -> dict[str, Any]:
    raw = config.model_dump(by_alias=True)
    for section, excluded in _NOT_HASHED.items():
        parts = [raw] if section == "" else [raw[section]] if section != "*" else list(raw.values())
        for part in parts:
            if isinstance(part, dict):
                for key in excluded:
                    part.pop(key, None)
    return raw


def _set(value: Any) -> Any:
    """Leave out what is not set, so that an option that is new and not used changes no identity."""
    if isinstance(value, dict):
        return {key: _set(each) for key, each in value.items() if each is not None}
    return value


_KEYS_OF_0_1_0 = {
    "": "seed model data aligner init loss layer_map time_warp keys align trainer evaluation "
    "teacher_cache_dtype teacher_cache_keeps adapter",
    "model": "teacher student student_start teacher_dtype gradient_checkpointing remote_code teacher_quantization",
    "trainer": "epochs max_steps batch_size micro_batch_size lr aligner_lr lr_schedule warmup_steps weight_decay clip_norm "
    "mixed_precision log_interval",
    "evaluation": "interval batch_size validation_examples exact_match_split exact_match_examples exact_match_at_intervals "
    "max_new_tokens probe_examples probe_ridge calibration_examples",
}
_DATA_SINCE_0_1_0 = ("answers",)


def _hash_of_0_1_0(config: Config) -> str:
    """The hash of version 0.1.0, over the keys and the class paths that it had."""
    raw = _without_labels(config)
    for section, keys in _KEYS_OF_0_1_0.items():
        part = raw if section == "" else raw[section]
        for key in part.keys() - set(keys.split()):
            del part[key]
    for key in _DATA_SINCE_0_1_0:
        raw["data"].pop(key, None)
    former = {now: before for before, now in FORMER_PATHS.items()}
    for group, choice in config:
        if isinstance(choice, Choice) and isinstance(raw.get(group), dict):
            raw[group]["_target_"] = former.get(choice.target, choice.target)
    if raw["teacher_cache_dtype"] is None:
        del raw["teacher_cache_dtype"]
    if raw["model"]["teacher_quantization"] is None:
        del raw["model"]["teacher_quantization"]
    if not raw["adapter"]["_target_"]:
        del raw["adapter"]
    if raw["teacher_cache_keeps"] != "targets":
        del raw["teacher_cache_keeps"]
    return digest_of_json(raw)
