"""Types of the options that a choice in `conf/` can have, and how a choice is bound to its target without importing it.

A choice (`conf/aligner/flat.yaml`, say) names its class or function by `_target_`. Its options are the target's
keyword-only parameters, and their types are those parameters' annotations. `options_of` reads them from the source with
`ast`, so that a wrong option is refused before torch is imported. Knows nothing of which groups there are.
"""

from __future__ import annotations

import ast
import importlib.util
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AllowInfNan

PositiveFloat = Annotated[float, Gt(0), AllowInfNan(False)]
NonNegativeFloat = Annotated[float, Ge(0), AllowInfNan(False)]
UnitFloat = Annotated[float, Ge(0), Le(1)]
FractionFloat = Annotated[float, Ge(0), Lt(1)]
PositiveInt = Annotated[int, Gt(0), Le(2**63 - 1)]
NonNegativeInt = Annotated[int, Ge(0), Le(2**63 - 1)]
Count = Annotated[int, Gt(0), Le(10_000_000)]
"""Of things that are made and held in memory."""
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Parts = Annotated[dict[str, Any], MinLen(2)]
"""Choices of a group that together are one of its choices, by the names under which their options are changed."""
Decay = Literal["constant", "linear", "cosine"]
LayerList = Annotated[list[NonNegativeInt], MinLen(1)]
NameList = Annotated[list[str], MinLen(1)]

_ANNOTATION_NAMES: dict[str, Any] = {
    "Annotated": Annotated,
    "Literal": Literal,
    "Any": Any,
    **{kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple)},
    "PositiveFloat": PositiveFloat,
    "NonNegativeFloat": NonNegativeFloat,
    "UnitFloat": UnitFloat,
    "FractionFloat": FractionFloat,
    "PositiveInt": PositiveInt,
    "NonNegativeInt": NonNegativeInt,
    "Count": Count,
    "Decay": Decay,
    "Parts": Parts,
    "LayerList": LayerList,
    "NameList": NameList,
}


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a target.

    Attributes
    ----------
    annotation
        A type that pydantic can check, evaluated from the source.
    required
        Whether the parameter has no default.
    """

    annotation: Any
    required: bool


@cache
def options_of(target: str) -> dict[str, Option]:
    """Keyword-only parameters of a class or function, by name, read from its source.

    Parameters
    ----------
    target
        Dotted path, `package.module.Name`. Nothing of it is imported.

    Raises
    ------
    ValueError
        If there is no such module or name, or an annotation uses names other than this module's types.
    """
    node = definition(target)
    if isinstance(node, ast.ClassDef):
        initialisers = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        if not initialisers:
            return {}
        arguments = initialisers[0].args
    else:
        arguments = node.args
    return {
        argument.arg: Option(_evaluate(argument.annotation, target, argument.arg), default is None)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }


@cache
def parameters_of(target: str) -> tuple[str, ...]:
    """Return the names of a target's positional parameters (without `self`), read from its source.

    What a choice is given beside its options can depend on what it asks for by name.

    Raises
    ------
    ValueError
        As `options_of`.
    """
    target_node = definition(target)
    if isinstance(target_node, ast.FunctionDef):
        return tuple(argument.arg for argument in target_node.args.args)
    for node in target_node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return tuple(argument.arg for argument in node.args.args[1:])
    return ()


@cache
def constant_of(target: str, name: str) -> Any:
    """Return a class attribute of a target that is assigned a literal (`signal = "logits"`), read from its source.

    Raises
    ------
    ValueError
        If the target is no class or has no such literal.
    """
    target_node = definition(target)
    for node in target_node.body if isinstance(target_node, ast.ClassDef) else ():
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(each, ast.Name) and each.id == name for each in targets):
            with suppress(ValueError):
                return ast.literal_eval(node.value)
    raise ValueError(f"{target} does not say its {name}")


def source_file(module_name: str) -> Path | None:
    """Return the Python file of a module, which is not imported for it; None where there is none."""
    spec, where = None, None
    parts = module_name.split(".")
    for depth in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), where)
        if spec is None:
            break
        where = spec.submodule_search_locations
        if where is None and depth + 1 < len(parts):  # a module has no modules in it
            return None
    if spec is None:  # not on the path: what another finder knows, as of an editable installation
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(module_name) if module_name else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


@cache
def imported_names(module_name: str) -> dict[str, str]:
    """Names that a module imports at its top, with the dotted path that each stands for, read from its source."""
    names: dict[str, str] = {}
    package = module_name.split(".")[:-1]
    for node in _module(module_name, module_name).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    return names


def definition(target: str) -> ast.ClassDef | ast.FunctionDef:
    """Return the definition of a class or function, from its module's source.

    Raises
    ------
    ValueError
        As `options_of`.
    """
    module_name, _, name = target.rpartition(".")
    module = _module(module_name, target)
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise ValueError(f"_target_={target}: {source_file(module_name)} defines no class or function {name}")


@cache
def _module(module_name: str, target: str) -> ast.Module:
    file = source_file(module_name)
    if file is None:
        raise ValueError(f"_target_={target} names no module that can be found")
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"_target_={target}: {file} is not Python ({error})") from error


def _evaluate(annotation: ast.expr | None, target: str, argument: str) -> Any:
    if annotation is None:
        raise ValueError(f"{target}: its option {argument} has no type")
    source = ast.unparse(annotation)
    try:
        return eval(source, {"__builtins__": {}}, dict(_ANNOTATION_NAMES))
    except (NameError, TypeError, SyntaxError, AttributeError) as error:
        known = ", ".join(sorted(_ANNOTATION_NAMES))
        raise ValueError(f"{target}: its option {argument} has the type {source}; known are {known}") from error
