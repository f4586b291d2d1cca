"""Teacher, student and their tokenizers: the embedded tiny pair, a folder, or a name on the hub."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kv_align.config.config import ModelConfig
from kv_align.config.model_card import model_path, tokenizer_path
from kv_align.models.adapter import Adapter
from kv_align.models.capture.prepare import Geometry, prepare
from kv_align.models.devices import is_out_of_memory, stored
from kv_align.models.placement import check_names, check_processes, loading_options, offload_folder, placeable
from kv_align.models.quantization import check_widths, keep_layout
from kv_align.runs.errors import ConfigError
from kv_align.runs.seeds import derive_seed

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer, the shapes of its attention, and what learns in its place (None: it learns itself)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    geometry: Geometry
    adapter: Adapter | None = None

    @property
    def pad_id(self) -> int:
        """The id to pad with; the end-of-text id where the tokenizer has no other."""
        tokenizer = self.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def load_teacher(config: ModelConfig, device: torch.device, processes: int = 1, *, longest: int = 64) -> LanguageModel:
    """Return the frozen teacher, in evaluation mode; on the device, or where its device map says.

    Parameters
    ----------
    config, device
        Which, and where.
    processes
        How many processes load it.
    longest
        How many tokens it will be given at most, see `prepare`.

    Raises
    ------
    ConfigError
        If it cannot be loaded, has no safetensors weights or no fast tokenizer, its attention cannot be recorded, or one of
        several `processes` would have it on several devices.
    """
    architecture = _architecture(config, "teacher")
    options = loading_options(config, architecture, device)
    if not options:
        model = _pretrained(config, "teacher", config.teacher_dtype).to(device)
    else:
        with placeable(config):
            check_widths(config, architecture, options)
        with offload_folder(options) as loaded:
            loaded.append(model := _pretrained(config, "teacher", config.teacher_dtype, **options))
        keep_layout(model)
        check_names(config, model)
        check_processes(config, model, processes)
    model = model.eval().requires_grad_(False)
    return LanguageModel(model, _tokenizer(config, "teacher"), prepare(model, "teacher", longest=longest))


def load_student(
    config: ModelConfig,
    seed: int,
    device: torch.device,
    adapt: Callable[[PreTrainedModel], Adapter] | None = None,
    *,
    longest: int = 64,
) -> LanguageModel:
    """Return the student in float32: its own weights, or with `student_start=scratch` new ones drawn from the seed.

    Parameters
    ----------
    config, seed, device
        Which, drawn from what, and where.
    adapt
        Makes an adapter of it, while it is still on the CPU; None: all of it learns.
    longest
        How many tokens it will be given at most, see `prepare`.

    Raises
    ------
    ConfigError
        As `load_teacher`.
    """
    if config.student_start == "pretrained":
        model = _pretrained(config, "student", "float32")
    else:
        architecture = _architecture(config, "student")
        with _readable("student", config.student), torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "student start"))
            model = AutoModelForCausalLM.from_config(
                architecture, dtype=torch.float32, trust_remote_code=config.student in config.remote_code
            )
    adapter = None if adapt is None else adapt(model)
    model = model.to(device)
    if config.gradient_checkpointing:
        # Under the reentrant form, recorded keys and values would carry no gradient.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return LanguageModel(model, _tokenizer(config, "student"), prepare(model, "student", longest=longest), adapter)


def check_queries(
    config: ModelConfig, loss: str, teacher: LanguageModel, student: LanguageModel, *, attention: bool
) -> None:
    """Refuse a loss on queries for models that do not show them.

    Parameters
    ----------
    config, loss
        The models' names and the loss's, for the message.
    teacher, student
        The models.
    attention
        Whether the loss computes the student's attention of them.

    Raises
    ------
    ConfigError
        If one of them gives no queries, or the student's attention is not the one that the loss computes.
    """
    for role, reader in (("teacher", teacher), ("student", student)):
        name = f"loss={loss} is not allowed with model.{role}={getattr(config, role)}"
        if not reader.geometry.gives_queries:
            raise ConfigError(
                f"{name}: {type(reader.model).__name__} computes its attention itself, in a way that does not show its "
                "queries; use loss=kv or another model."
            )
        if attention and role == "student" and not reader.geometry.plain_attention:
            raise ConfigError(
                f"{name}: {type(reader.model).__name__} attends by more than scaled dot products, windows, soft caps, sinks "
                "and ALiBi, which is all that the loss knows; use loss=kv or another model."
            )


def check_unrotated(config: ModelConfig, teacher: LanguageModel, student: LanguageModel) -> None:
    """Refuse to compare keys before they are turned by their position for models whose keys cannot be turned back.

    Raises
    ------
    ConfigError
        If one of them is such a model.
    """
    for role, reader in (("teacher", teacher), ("student", student)):
        if reader.geometry.fixed_rotation is not None:
            raise ConfigError(
                f"keys=unrotated is not allowed with model.{role}={getattr(config, role)} ({type(reader.model).__name__}): "
                f"{reader.geometry.fixed_rotation}; use keys=rotated or another model."
            )


def weights_digest(module: nn.Module) -> str:
    """SHA-256 (hex) over the names and values of a module's state, wherever they are kept."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            stored(module, name, tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _architecture(config: ModelConfig, role: str) -> PreTrainedConfig:
    name = getattr(config, role)
    with _readable(role, name):
        architecture = AutoConfig.from_pretrained(model_path(name, role), trust_remote_code=name in config.remote_code)
    if architecture.is_encoder_decoder:
        raise ConfigError(f"model.{role}={name} is not allowed: it is an encoder-decoder; use a decoder.")
    return architecture


def _pretrained(config: ModelConfig, role: str, dtype: str, **options: Any) -> PreTrainedModel:
    name = getattr(config, role)
    _architecture(config, role)  # says by name what cannot be loaded as a decoder
    with _readable(role, name), _unreported(), placeable(config) if options else nullcontext():
        model, report = AutoModelForCausalLM.from_pretrained(
            model_path(name, role),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=name in config.remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and then refused
            **options,
        )
    _check_complete(f"model.{role}={name}", model, report)
    return model


@contextmanager
def _unreported() -> Iterator[None]:
    """Keep transformers' table of keys that do not match from the terminal: they are refused in one sentence."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_complete(key: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse weights that are not those of the model: what is missing would be drawn anew without a word.

    Tied weights, and what a family declares that it can do without or that old files hold, are not in the report.
    """
    for kind, verb in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "hold"),
        ("mismatched_keys", "have other shapes of"),
    ):
        names = sorted(str(each[0] if isinstance(each, tuple) else each) for each in report[kind])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(
                f"{key} is not allowed: its weights {verb} {', '.join(names[:3])}{more}, and so are not those of the "
                f"{type(model).__name__} in its config.json; save the model again, or correct its config.json."
            )


def _tokenizer(config: ModelConfig, role: str) -> PreTrainedTokenizerFast:
    name = getattr(config, role)
    with _readable(role, name):
        path = tokenizer_path(config.teacher, config.student, role)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=name in config.remote_code)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.{role}={name} is not allowed: its tokenizer gives no character offsets; use a model with a fast one."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.{role}={name} is not allowed: its tokenizer has no end-of-text token; set its eos_token and save it."
        )
    return tokenizer


class _readable:  # noqa: N801 - a context manager, read as a statement
    """Turns what transformers raises about a model that cannot be read into one sentence."""

    def __init__(self, role: str, name: str) -> None:
        self._role, self._name = role, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        own = isinstance(error, ConfigError)
        if isinstance(error, Exception) and not own and not is_out_of_memory(error):  # a library's, of any kind
            first_line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            first_line = first_line if isinstance(error, OSError | ValueError) and first_line else repr(error)[:200]
            raise ConfigError(
                f"model.{self._role}={self._name} cannot be loaded ({first_line}): name a folder with safetensors weights, "
                "a model on the hub that this machine can reach or has downloaded, or embedded."
            ) from error
