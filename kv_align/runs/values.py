"""Values as `conf/cluster`, `conf/sweep`, `conf/criteria` and the command line of launch have them: YAML in decimal numbers.

YAML itself reads `4:00:00` as 14400 (base sixty) and `0240` as 160 (base eight). Here both are text, so that a key that is
a number refuses them, and one whose text goes to the scheduler hands on what was written. What Hydra reads of the user's own
groups is read by YAML itself, so there both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kv_align.runs.errors import ConfigError

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_WHOLE = r"(0|[1-9][0-9_]*)"


class _Loader(yaml.SafeLoader):
    """YAML's own but for its numbers, and for a key that stands twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; refuse a key that stands twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice} stands twice; leave one of them out", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(rf"[-+]?{_WHOLE}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(rf"[-+]?({_WHOLE}\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def read_values(text: str) -> Any:
    """Return what YAML says, as plain containers.

    Raises
    ------
    yaml.YAMLError
        If it is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def check_own_file(file: Path) -> None:
    """Refuse what YAML itself would read otherwise than it is written, in a file that Hydra is going to read.

    Parameters
    ----------
    file
        A choice of a group, of the user's own. What is no YAML at all is left to Hydra.

    Raises
    ------
    ConfigError
        For a number in base eight or sixty, or an alias that leads back to itself, with file and line.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    for node in () if root is None else _nodes(root, (), file):
        if not isinstance(node, yaml.ScalarNode) or node.tag not in (_INT, _FLOAT):
            continue
        base = 60 if ":" in node.value else 8 if node.tag == _INT and re.match(r"[-+]?0[0-9_]", node.value) else 10
        if base != 10:
            raise ConfigError(
                f"{file} is not allowed: YAML reads {node.value} in line {node.start_mark.line + 1} in base {base}; write a "
                "decimal number, or put quotes around it for text."
            )


def _nodes(node: yaml.Node, above: tuple[int, ...], file: Path) -> Iterator[yaml.Node]:
    if id(node) in above:
        raise ConfigError(f"{file} is not allowed: its alias in line {node.start_mark.line + 1} leads back to itself.")
    yield node
    if isinstance(node, yaml.CollectionNode):
        for each in node.value:
            for inner in each if isinstance(each, tuple) else (each,):
                yield from _nodes(inner, (*above, id(node)), file)
