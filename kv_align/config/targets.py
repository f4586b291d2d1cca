"""What the choices of `conf/` name: by which words they are known, and of what kind each group's must be. Imports no torch.

A choice names its class or function by a dotted path, `_target_`. What is hashed, and so what a run is, is the name of the
choice: moving a class moves no run. A target is looked at in its source before anything of it is called.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from kv_align.config.options import definition, imported_names
from kv_align.runs.errors import ConfigError

BASES = {
    "adapter": "kv_align.models.adapter.Adapter",
    "aligner": "kv_align.align.head_map.HeadMap",
    "data": "kv_align.data.example.DataSource",
    "loss": "kv_align.losses.base.Loss",
    "time_warp": "kv_align.align.time_warp.SegmentWarp",
}
"""The class that a group's target is or derives from."""

RESULTS = {"init": ("HeadInit",), "layer_map": ("list[int]", "Mixture")}
"""What a group's target, a function, is annotated to return."""

FORMER_PATHS = {
    "kv_align.adapters.lora.Lora": "kv_align.models.lora.Lora",
    "kv_align.align.init.random": "kv_align.align.init.fixed.random",
    "kv_align.align.init.uniform": "kv_align.align.init.fixed.uniform",
    "kv_align.align.init_cka_hungarian.cka_hungarian": "kv_align.align.init.cka_hungarian.cka_hungarian",
    "kv_align.align.init_identity.identity": "kv_align.align.init.fixed.identity",
    "kv_align.align.init_least_squares.least_squares": "kv_align.align.init.least_squares.least_squares",
    "kv_align.align.init_orthogonal.orthogonal": "kv_align.align.init.fixed.orthogonal",
    "kv_align.align.init_procrustes.procrustes": "kv_align.align.init.procrustes.procrustes",
    "kv_align.align.layer_map.explicit": "kv_align.align.layer_map.fixed.explicit",
    "kv_align.align.layer_map.last": "kv_align.align.layer_map.fixed.last",
    "kv_align.align.layer_map.proportional": "kv_align.align.layer_map.fixed.proportional",
    "kv_align.align.layer_map.random": "kv_align.align.layer_map.fixed.random",
    "kv_align.align.layer_map.reverse": "kv_align.align.layer_map.fixed.reverse",
    "kv_align.align.layer_map_cka.cka": "kv_align.align.layer_map.cka.cka",
    "kv_align.align.layer_map_learned.learned": "kv_align.align.layer_map.learned.learned",
    "kv_align.objectives.ce.CrossEntropy": "kv_align.losses.ce.CrossEntropy",
    "kv_align.objectives.hidden.Hidden": "kv_align.losses.hidden.Hidden",
    "kv_align.objectives.kv.KeyValue": "kv_align.losses.kv.KeyValue",
    "kv_align.objectives.kv_struct.KeyValueStruct": "kv_align.losses.kv.KeyValueStruct",
    "kv_align.objectives.logit_kd.LogitDistillation": "kv_align.losses.logit_kd.LogitDistillation",
    "kv_align.objectives.relations.Relations": "kv_align.losses.relations.Relations",
}
"""Where a target of version 0.1.0 is now, for plans and runs that were frozen by it."""


def config_directory() -> Path:
    """Return the folder `conf/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


@cache
def own_choices(group: str) -> dict[str, str]:
    """Names of the project's own choices of a group, by target; the first in the alphabet where several share one."""
    names: dict[str, str] = {}
    for file in sorted((config_directory() / group).glob("*.yaml")):
        target = re.search(r"^_target_: *(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        if target is not None:
            names.setdefault(target[1], file.stem)
    return names


def choice_identity(group: str, target: str) -> str:
    """Return what a choice is known by: its name where it is the project's own, else its dotted path."""
    return own_choices(group).get(target, target)


def check_target(group: str, name: str, target: str) -> None:
    """Refuse a target that is not of its group's kind, from its source alone: nothing is imported and nothing called.

    Raises
    ------
    ConfigError
        Naming what the group wants.
    """
    if group in BASES:
        if not _derives(target, BASES[group], set()):
            raise ConfigError(
                f"{group}._target_={target} is not allowed: {group}={name} must name a class that derives from {BASES[group]}"
                "; correct it in that choice's YAML file."
            )
    elif group in RESULTS:
        node = definition(target)
        annotation = None if isinstance(node, ast.ClassDef) or node.returns is None else ast.unparse(node.returns)
        if annotation is None or annotation.strip("'\"").rpartition(".")[2] not in RESULTS[group]:
            raise ConfigError(
                f"{group}._target_={target} is not allowed: {group}={name} must name a function that is annotated to return "
                f"{' or '.join(RESULTS[group])}; correct it in that choice's YAML file."
            )


def _derives(target: str, base: str, seen: set[str]) -> bool:
    """Whether a class is `base` or has it among its ancestors, as far as sources say."""
    if target == base:
        return True
    if target in seen:
        return False
    seen.add(target)
    try:
        node = definition(target)
    except ValueError:
        return False
    if not isinstance(node, ast.ClassDef):
        return False
    module = target.rpartition(".")[0]
    names = imported_names(module)
    for parent in map(ast.unparse, node.bases):
        first, _, rest = parent.partition(".")
        path = names.get(first, f"{module}.{first}")
        if _derives(f"{path}.{rest}" if rest else path, base, seen):
            return True
    return False
