"""What a run reads beside its settings, by digest: data, models, tokenizers, and code of the user's own. Imports no torch.

Each input has a name that a message can say. A generated source, and what a hub gives by name, have none here: these are
settings, and what came of them is recorded when they have been read (`provenance.json`).
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from hydra.utils import get_object

from kv_align.config.config import Config
from kv_align.config.model_card import model_path
from kv_align.config.options import source_file
from kv_align.config.schema import Choice
from kv_align.config.targets import own_choices
from kv_align.runs.digests import digest_of, digest_of_files
from kv_align.runs.errors import ConfigError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
CODE = "source "
"""What the names of inputs that are code begin with; arms may differ in it."""


def digest_inputs(config: Config) -> dict[str, str]:
    """Return the SHA-256 of each input of a run, by its name."""
    digests: dict[str, str] = {}
    for role in ("teacher", "student"):
        folder = Path(model_path(getattr(config.model, role), role))
        if not folder.is_dir():
            continue  # a name on the hub
        digests[f"{role} config"] = digest_of(folder / "config.json")
        digests[f"{role} tokenizer"] = _matching(folder, _TOKENIZER)
        if role == "teacher" or config.model.student_start == "pretrained":
            digests[f"{role} weights"] = _matching(folder, _WEIGHTS)
        if getattr(config.model, role) in config.model.remote_code:
            digests[f"{role} code"] = _matching(folder, ("*.py",))
    files = get_object(config.data.target)(**config.data.options).files
    if files:
        digests["data"] = digest_of_files((file.name, file) for file in files)
    for name, file in task_files(config).items():
        digests[name] = digest_of(file)
    for group, choice in config:
        if isinstance(choice, Choice):
            for key, each in {
                group: choice,
                **{f"{group}.{name}": part for name, part in choice.parts.items()},
            }.items():
                if each.target and each.target not in own_choices(group):
                    digests[f"{CODE}{key}"] = digest_of_files(_sources(each.target))
    return digests


def task_files(config: Config) -> dict[str, Path]:
    """Return the user's own tasks for `lm-eval`, by the name of the input."""
    tasks = [Path(task) for task in config.evaluation.lm_eval or ()]
    return {f"task {at + 1} ({task.name})": task for at, task in enumerate(tasks) if task.is_file()}


def changed_inputs(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names of inputs that are not what they were."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def check_inputs(config: Config) -> None:
    """Refuse a frozen configuration whose inputs are no longer what they were when it was frozen.

    Raises
    ------
    ConfigError
        Naming what changed, and where it is.
    """
    if config.inputs is None:  # frozen by a version that did not record them
        return
    changed = changed_inputs(config.inputs, digest_inputs(config))
    if changed:
        raise ConfigError(
            f"{describe(config, changed)} since this was frozen: restore what it was, or submit a new sweep."
        )


def describe(config: Config, names: list[str]) -> str:
    """Return which inputs have changed, with the place of each, as the beginning of a sentence."""
    source = "path" if config.data.options.get("path") else "hub_name"
    where = {
        "data": f"data.{source}={config.data.options.get(source)}",
        **{
            f"source {group}": f"{group}._target_={choice.target}"
            for group, choice in config
            if isinstance(choice, Choice)
        },
    }
    for role in ("teacher", "student"):
        where |= {
            f"{role} {part}": f"the {part} of model.{role}={getattr(config.model, role)}"
            for part in ("config", "tokenizer", "weights", "code")
        }
    return f"{' and '.join(where.get(name, name) for name in names)} {'has' if len(names) == 1 else 'have'} changed"


def _matching(folder: Path, patterns: tuple[str, ...]) -> str:
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return digest_of_files((file.name, file) for file in files)


def _sources(target: str) -> Iterator[tuple[str, Path]]:
    """The module of a target and what it imports of the user's own code; what is installed is a version in the provenance."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]
    waiting, seen = [target.rpartition(".")[0]], set[str]()
    while waiting:
        module = waiting.pop()
        file = source_file(module)
        if module in seen or file is None or any(file.resolve().is_relative_to(root) for root in installed):
            continue
        if module.partition(".")[0] == "kv_align" and seen:
            continue  # the project's own code is in the provenance by its commit
        seen.add(module)
        yield module, file
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.ImportFrom):
                package = module.split(".")[: -node.level]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [".".join([*package, name]) for name in names]
