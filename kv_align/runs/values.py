"""Values as `conf/cluster`, `conf/sweep`, `conf/criteria` and the command line of launch have them: YAML in decimal numbers.

YAML itself reads `4:00:00` as 14400 (base sixty) and `0240` as 160 (base eight). Here both are text, so that a key that is
a number refuses them, and one whose text goes to the scheduler hands on what was written. What Hydra reads of the user's own
groups is read by YAML itself, so there both are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kv_align.runs.errors import ConfigError

_MOST_VALUES = 100_000
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


def is_one_line(text: str) -> bool:
    """Whether a text has no line breaks and other control characters."""
    return not re.search(r"[\x00-\x1f]", text)


def read_values(text: str) -> Any:
    """Return what YAML says, as plain containers.

    Raises
    ------
    yaml.YAMLError
        If it is none, or is nested or stands for more than anybody writes.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return None
        _check_size(root)
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def check_own_file(file: Path, *, named: bool = True) -> None:
    """Refuse what YAML itself would read otherwise than it is written, in a file that Hydra is going to read.

    Parameters
    ----------
    file
        A choice of a group, of the user's own.
    named
        Whether what it says as its `name` must be its file's.

    Raises
    ------
    ConfigError
        If it is no YAML, has another name than its file, a number in base eight or sixty, or aliases that lead back to
        themselves or stand for more than anybody writes; with file and line.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        nodes = [] if root is None else _check_size(root)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not allowed: it is not UTF-8 ({error.reason}); save it as UTF-8.") from None
    except (yaml.YAMLError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{file} is not YAML: {what}; correct it.") from None
    for node in nodes:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in (_INT, _FLOAT):
            continue
        base = 60 if ":" in node.value else 8 if node.tag == _INT and re.match(r"[-+]?0[0-9_]", node.value) else 10
        if base != 10:
            raise ConfigError(
                f"{file} is not allowed: YAML reads {node.value} in line {node.start_mark.line + 1} in base {base}; write a "
                "decimal number, or put quotes around it for text."
            )
    names = [value for key, value in root.value if key.value == "name"] if isinstance(root, yaml.MappingNode) else []
    if named and names and isinstance(names[0], yaml.ScalarNode) and names[0].value != file.stem:
        raise ConfigError(
            f"{file} is not allowed: its name is {names[0].value}, and a choice is named as its file; write name: "
            f"{file.stem}."
        )


def _check_size(root: yaml.Node) -> list[yaml.Node]:
    """Return all nodes, each once; refuse aliases that lead back to themselves, or that stand for too much."""
    sizes: dict[int, int] = {}
    nodes: list[yaml.Node] = []

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise yaml.YAMLError(f"an alias to line {node.start_mark.line + 1} leads back to itself")
            return sizes[id(node)]
        nodes.append(node)
        sizes[id(node)] = 0  # until all that is in it is known
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        sizes[id(node)] = 1 + sum(map(size, parts))
        if sizes[id(node)] > _MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases it stands for more than {_MOST_VALUES} values")
        return sizes[id(node)]

    size(root)
    return nodes
