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
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AllowInfNan

PositiveFloat = Annotated[float, Gt(0), AllowInfNan(False)]
NonNegativeFloat = Annotated[float, Ge(0), AllowInfNan(False)]
UnitFloat = Annotated[float, Ge(0), Le(1)]
FractionFloat = Annotated[float, Ge(0), Lt(1)]
PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
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
        Dotted path, `package.module.Name`. The parent packages are imported, the module itself is not.

    Raises
    ------
    ValueError
        If there is no such module or name, or an annotation uses names other than this module's types.
    """
    module_name, _, name = target.rpartition(".")
    definition = _definition(module_name, name, target)
    if isinstance(definition, ast.ClassDef):
        initialisers = [
            node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        ]
        if not initialisers:
            return {}
        arguments = initialisers[0].args
    else:
        arguments = definition.args
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
    module_name, _, name = target.rpartition(".")
    definition = _definition(module_name, name, target)
    if isinstance(definition, ast.FunctionDef):
        return tuple(argument.arg for argument in definition.args.args)
    for node in definition.body:
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
    module_name, _, class_name = target.rpartition(".")
    definition = _definition(module_name, class_name, target)
    for node in definition.body if isinstance(definition, ast.ClassDef) else ():
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(each, ast.Name) and each.id == name for each in targets):
            with suppress(ValueError):
                return ast.literal_eval(node.value)
    raise ValueError(f"{target} does not say its {name}")


def _definition(module_name: str, name: str, target: str) -> ast.ClassDef | ast.FunctionDef:
    try:
        spec = importlib.util.find_spec(module_name) if module_name else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"_target_={target} names no module that can be found")
    try:
        module = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"_target_={target}: {spec.origin} is not Python ({error})") from error
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise ValueError(f"_target_={target}: {spec.origin} defines no class or function {name}")


def _evaluate(annotation: ast.expr | None, target: str, argument: str) -> Any:
    if annotation is None:
        raise ValueError(f"{target}: its option {argument} has no type")
    source = ast.unparse(annotation)
    try:
        return eval(source, {"__builtins__": {}}, dict(_ANNOTATION_NAMES))
    except (NameError, TypeError, SyntaxError, AttributeError) as error:
        known = ", ".join(sorted(_ANNOTATION_NAMES))
        raise ValueError(f"{target}: its option {argument} has the type {source}; known are {known}") from error
