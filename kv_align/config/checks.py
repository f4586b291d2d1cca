"""Combinations of choices that cannot be, each with its sentence. Imports no torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import get_method, get_object

from kv_align.config.config import Config
from kv_align.config.model_card import ModelCard, model_card, model_path, tokenizer_path
from kv_align.config.options import constant_of, parameters_of
from kv_align.config.schema import Choice
from kv_align.config.signals import composed_of, learns_projection, signals_of, uses_aligner
from kv_align.runs.errors import ConfigError, invalid_value
from kv_align.runs.values import is_one_line

_LONGEST_NAME = 150  # file systems take 255 bytes; loss, seed and hash, and the suffixes of temporary files, come to it


def check_places(config: Config) -> None:
    """Refuse names of folders that are none, or that lead elsewhere."""
    for key, folder, allowed in (
        ("output_dir", config.output_dir, "the name of a folder, such as outputs"),
        ("teacher_cache", config.teacher_cache, "auto, off, or the name of a folder"),
    ):
        if not folder.strip() or not is_one_line(folder):
            raise invalid_value(key, repr(folder), allowed)
    if config.hub.repo is not None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(config.hub.repo)
        except HFValidationError:
            allowed = "a repository's name on the hub, such as me/student, or null"
            raise invalid_value("hub.repo", repr(config.hub.repo), allowed) from None
    for key, name in (("run_name", config.run_name), ("arm", config.arm)):
        if name is None:
            continue
        if not name.strip() or name in (".", "..") or re.search(r"[/\\]", name) or not is_one_line(name):
            allowed = "a plain name without slashes and control characters, such as first_try, or null"
            raise invalid_value(key, repr(name), allowed)
        if len(name.encode()) > _LONGEST_NAME:
            raise invalid_value(key, f"{name[:20]}...", f"a name of at most {_LONGEST_NAME} bytes")


def check_batch_size(config: Config) -> None:
    """Refuse a batch larger than the training split, where the choice of texts says how many it has."""
    examples = config.data.options.get("train_examples")
    if isinstance(examples, int) and config.trainer.batch_size > examples:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size} is above data.train_examples={examples}: lower it to at most "
            "that."
        )


def check_loss_against_aligner(config: Config) -> None:
    """Refuse a loss that needs an aligner without one."""
    if uses_aligner(config) and not config.aligner.target and config.aligner.name != "none":
        raise ConfigError(
            f"aligner={config.aligner.name} is not allowed: its file has no _target_; name the class there that maps keys "
            "and values."
        )
    if uses_aligner(config) and not config.aligner.target:
        raise ConfigError(
            f"loss={config.loss.name} is not allowed with aligner={config.aligner.name}: there would be no projected keys "
            "and values to compare with; use aligner=flat or structured, or loss=ce or logit_kd."
        )


def check_init(config: Config) -> None:
    """Refuse an init that the aligner says it cannot start from."""
    if not uses_aligner(config) or config.init is None:
        return
    try:
        unfit = constant_of(config.aligner.target, "unfit_inits")
    except ValueError:
        return
    if config.init.name in unfit:
        raise ConfigError(
            f"init={config.init.name} is not allowed with aligner={config.aligner.name}: its head mix is not orthonormal; "
            "use init=orthogonal."
        )


def check_models(config: Config) -> tuple[ModelCard | None, ModelCard | None]:
    """Refuse models that are not there, and return what their files say (None for names on the hub)."""
    cards = {}
    for role in ("teacher", "student"):
        name = getattr(config.model, role)
        try:
            cards[role] = card = model_card(model_path(name, role))
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"model.{role}={name} is not allowed: its config.json cannot be read ({str(error).rstrip('.')}); "
                "save the model again with save_pretrained."
            ) from None
        needed = role == "teacher" or config.model.student_start == "pretrained"
        if card is not None and needed and not card.has_weights:
            raise ConfigError(
                f"model.{role}={name} is not allowed: that folder holds no safetensors weights; "
                "save the model with save_pretrained and name its folder."
            )
    teacher, student = cards["teacher"], cards["student"]
    lent = tokenizer_path(config.model.teacher, config.model.student, "student")
    if teacher is None or student is None or lent != model_path(config.model.teacher, "teacher"):
        return teacher, student
    if config.model.student_start == "scratch" and student.vocabulary < teacher.vocabulary:
        raise ConfigError(
            f"model.student={config.model.student} is not allowed: its folder has no tokenizer, and its {student.vocabulary} "
            f"tokens are fewer than the {teacher.vocabulary} of model.teacher={config.model.teacher}, with whose tokenizer "
            "it would read; add its tokenizer, or enlarge its vocab_size."
        )
    return teacher, replace(student, tokenizer=teacher.tokenizer)


def check_adapter(config: Config) -> None:
    """Refuse to adapt what has learned nothing."""
    if config.adapter.target and config.model.student_start == "scratch":
        raise ConfigError(
            f"adapter={config.adapter.name} is not allowed with model.student_start=scratch: the weights that it would "
            "freeze have learned nothing; use model.student_start=pretrained or adapter=none."
        )


def check_teacher_loading(config: Config) -> None:
    """Refuse a device map of what are no devices, and to quantise what stays in memory or on the disk."""
    devices = config.model.teacher_device_map
    if not isinstance(devices, dict):
        return
    key = "model.teacher_device_map"
    for module, device in devices.items():
        if isinstance(device, str) and not re.fullmatch(r"disk|[a-z]+(:\d+)?", device):
            raise invalid_value(
                f"{key}[{module!r}]", device, "the number of a GPU, cpu, disk, or a device such as cuda:0"
            )
    if not devices:
        raise invalid_value(key, devices, "auto, a mapping of at least one module to a device, or null")
    kinds = set(devices.values())
    if config.model.teacher_quantization is not None and kinds != {"cpu"} and kinds & {"cpu", "disk"}:
        raise ConfigError(
            f"model.teacher_quantization={config.model.teacher_quantization} is not allowed with a {key} that names cpu or "
            "disk: bitsandbytes leaves such parts as they are; name GPUs alone, or use model.teacher_quantization=null."
        )


def check_data(config: Config) -> None:
    """Refuse data that is not there or that cannot be read so."""
    if config.data.max_length < 2:
        raise invalid_value(
            "data.max_length", config.data.max_length, "at least 2: each token is predicted from the one before"
        )
    if config.data.rationale == "short" and config.data.rationale_every is None:
        raise invalid_value("data.rationale_every", None, "a whole number with data.rationale=short")
    if config.data.rationale != "full" and not get_object(config.data.target).has_reasoning:
        raise invalid_value(
            "data.rationale", config.data.rationale, f"full with data={config.data.name}, whose texts have no steps"
        )
    path = config.data.options.get("path")
    if path and not Path(path).expanduser().exists():
        raise ConfigError(f"data.path={path} is not allowed: there is no such file or folder; correct the path.")
    try:
        get_object(config.data.target)(**absolute_data(config).options)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"data={config.data.name} is not allowed: {error}.") from None


def absolute_data(config: Config) -> Any:
    """Return the data's section with an absolute path."""
    path = config.data.options.get("path")
    if not path:
        return config.data
    options = {**config.data.model_dump(by_alias=True), "path": str(Path(path).expanduser().resolve())}
    return type(config.data).model_validate(options)


def check_trainer(config: Config) -> None:
    """Refuse numbers of the trainer that exclude each other."""
    trainer = config.trainer
    micro = trainer.micro_batch_size
    if micro is not None and trainer.batch_size % micro:
        raise invalid_value("trainer.micro_batch_size", micro, f"a divisor of trainer.batch_size={trainer.batch_size}")
    if config.data.shuffle_teacher and (micro or trainer.batch_size) < 2:
        raise invalid_value("data.shuffle_teacher", True, "false where a micro-batch holds a single example")
    if trainer.max_steps is None and trainer.epochs is None:
        raise invalid_value("trainer.epochs", None, "a number above 0, or trainer.max_steps to a whole number")
    if trainer.aligner_lr is None and config.align is not None and config.align.fit != "frozen":
        raise invalid_value("trainer.aligner_lr", None, f"a number above 0 with align.fit={config.align.fit}")
    if trainer.aligner_lr is None and learns_projection(config):
        raise invalid_value(
            "trainer.aligner_lr", None, f"a number above 0 with loss={config.loss.name}, which learns a projection"
        )
    if config.align is not None and config.align.fit == "fit_then_freeze":
        if config.align.fit_steps is None:
            raise invalid_value("align.fit_steps", None, "a whole number with align.fit=fit_then_freeze")
        if trainer.max_steps is not None and config.align.fit_steps >= trainer.max_steps:
            raise invalid_value(
                "align.fit_steps", config.align.fit_steps, f"below trainer.max_steps={trainer.max_steps}"
            )
    if config.align is not None and config.align.fit == "alternate" and config.align.period is None:
        raise invalid_value("align.period", None, "a whole number with align.fit=alternate")
    for package in trainer.tracker:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"trainer.tracker={package} is not allowed: the package {package} is not installed; "
                "install kv-align[trackers] or use trainer.tracker=none."
            )


def check_layer_map(config: Config, teacher: ModelCard | None, student: ModelCard | None) -> None:
    """Refuse a layer map that cannot serve the pair or the loss."""
    if config.layer_map is None:
        return
    if _learns_layers(config.layer_map) and (config.align is None or config.align.fit == "frozen"):
        why = f"loss={config.loss.name}, which has no aligner" if config.align is None else "align.fit=frozen"
        raise ConfigError(
            f"layer_map={config.layer_map.name} is not allowed with {why}: it is trained with the aligner; "
            "use layer_map=proportional."
        )
    if teacher is None or student is None or "similarity" in parameters_of(config.layer_map.target):
        return
    if not (teacher.num_layers and student.num_layers):  # their files do not say it; known when they are loaded
        return
    try:
        get_method(config.layer_map.target)(
            teacher.num_layers, student.num_layers, config.seed, **config.layer_map.options
        )
    except ValueError as error:
        raise ConfigError(f"layer_map={config.layer_map.name} is not allowed: {error}.") from None


def _learns_layers(layer_map: Choice) -> bool:
    annotation = get_method(layer_map.target).__annotations__.get("return")
    return str(getattr(annotation, "__name__", annotation)) == "Mixture"


def check_layers_of_loss(config: Config, student: ModelCard | None) -> None:
    """Refuse layers that the student does not have."""
    for key, part in composed_of(config.loss).items():
        layers = part.options.get("layers")
        if layers and student is not None and student.num_layers and max(layers) >= student.num_layers:
            raise invalid_value(f"{key}.layers", layers, f"student layers, which are 0 to {student.num_layers - 1}")


def check_logits(config: Config, teacher: ModelCard | None, student: ModelCard | None) -> None:
    """Refuse to compare logits of different tokens."""
    if not any(signal.predicting for signal in signals_of(config.loss)):
        return
    if config.data.rationale != "full":
        raise invalid_value(
            "data.rationale", config.data.rationale, f"full with loss={config.loss.name}, which compares token by token"
        )
    if config.data.shuffle_teacher:
        raise invalid_value(
            "data.shuffle_teacher", True, f"false with loss={config.loss.name}, which compares token by token"
        )
    if teacher is not None and student is not None and teacher.tokenizer_digest != student.tokenizer_digest:
        raise ConfigError(
            f"loss={config.loss.name} is not allowed with model.teacher={config.model.teacher}: its vocabulary is another "
            f"than that of model.student={config.model.student}; use a pair with one tokenizer, or another loss."
        )
    known = [card.vocabulary for card in (teacher, student) if card is not None and card.vocabulary]
    for key, part in composed_of(config.loss).items():
        top_k = part.options.get("top_k")
        if top_k is not None and known and top_k > min(known):
            raise invalid_value(f"{key}.top_k", top_k, f"at most {min(known)}, the tokens of the two models, or null")
