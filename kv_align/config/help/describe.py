"""What can be said on a command line: groups, choices and keys, with the meaning that the comments of `conf/` give them.

The YAML files are the only place where a key is explained; this reads their comments, not their values. Imports no torch.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kv_align.config.targets import config_directory

_KEY = re.compile(r"^(?P<indent> *)(?P<name>[\w+]+):(?P<rest>.*)$")
_STRUCTURE = frozenset({"name", "kind", "_target_", "defaults", "hydra"})
_DESIGNS = ("experiment", "sweep", "criteria")  # files of which a user writes their own, not single keys
_NAMELESS = ("experiment", "cluster", "sweep")
_GROUPS = {
    "train": [
        "experiment",
        "model",
        "adapter",
        "data",
        "aligner",
        "init",
        "layer_map",
        "time_warp",
        "keys",
        "loss",
        "trainer",
    ],
    "pretrain": ["data"],
    "submit": ["sweep", "cluster", "criteria"],
}
"""The groups of each entry point, in the order in which they are shown."""


@dataclass(frozen=True)
class Key:
    """A key of a YAML file.

    Attributes
    ----------
    path
        Its name below the file, with dots.
    value
        As it is written there; empty where keys of its own follow.
    meaning
        Its comment; empty where it has none.
    """

    path: str
    value: str
    meaning: str


@dataclass(frozen=True)
class File:
    """A YAML file: what its first comment says of it, whether it says a `name`, the files it starts from, and its keys."""

    meaning: str
    named: bool
    bases: tuple[str, ...]
    keys: tuple[Key, ...]


def read_file(path: Path) -> File:
    """Read the comments of a YAML file of `conf/`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    top: list[str] = []
    for line in lines:
        if not line.startswith("#") or line.startswith("# @"):
            if top or not line.startswith("#"):
                break
            continue
        top.append(line.lstrip("# "))
    keys: list[Key] = []
    above: list[tuple[int, str]] = []
    bases, comment = [], ""
    for number, line in enumerate(lines):
        found = _KEY.match(line)
        if found is None:
            base = re.match(r"^  - ([\w+]+)$", line)
            bases += [base[1]] if base and base[1] != "_self_" else []
            is_comment = line.lstrip().startswith("#") and number >= len(top)
            comment = f"{comment} {line.strip('# ')}".strip() if is_comment else ""
            continue
        indent = len(found["indent"])
        while above and above[-1][0] >= indent:
            above.pop()
        above.append((indent, found["name"]))
        value, _, beside = f" {found['rest'].strip()}".partition(" #")
        if above[0][1] not in _STRUCTURE:
            keys.append(Key(".".join(name for _, name in above), value.strip(), beside.strip() or comment))
        comment = ""
    return File(" ".join(top), any(line.startswith("name:") for line in lines), tuple(bases), tuple(keys))


def choices(group: str, config_dir: str | None = None) -> dict[str, File]:
    """Return the choices of a group by name, a user's own too, without files that others only start from."""
    folders = [config_directory(), *([Path(config_dir)] if config_dir else [])]
    paths = {path.stem: path for folder in folders for path in (folder / group).glob("*.yaml")}
    files = {name: read_file(paths[name]) for name in sorted(paths)}
    named = {name: file for name, file in files.items() if file.named or group in _NAMELESS}
    bases = {base for file in named.values() for base in file.bases if base in files and base not in named}
    inherited = {
        name: [key for base in file.bases if base in bases for key in files[base].keys] for name, file in named.items()
    }
    return {name: replace(file, keys=(*file.keys, *inherited[name])) for name, file in named.items()}


def keys_of(group: str, default: str | None = None, config_dir: str | None = None) -> list[tuple[Key, tuple[str, ...]]]:
    """Return the keys of a group, each with the meaning that some choice gives it, and the choices that have it.

    Values are those of the default choice, of keys that it lacks those of another.
    """
    files = choices(group, config_dir)
    keys: dict[str, Key] = {}
    owners: dict[str, set[str]] = {}
    for name in sorted(files, key=lambda name: name != default):
        for key in files[name].keys:
            known = keys.setdefault(key.path, key)
            if not known.meaning:
                keys[key.path] = replace(known, meaning=key.meaning)
            owners.setdefault(key.path, set()).add(name)
    # A choice that starts from another has the keys of that too.
    for name, file in files.items():
        for base in file.bases:
            for names in owners.values():
                if base in names:
                    names.add(name)
    return [(key, tuple(sorted(owners[path]))) for path, key in keys.items()]


def described(entry: str, config_dir: str | None = None, width: int = 80) -> str:
    """Return all groups and keys of an entry point (`train`, `pretrain`, `submit`), as its `--help` shows them."""
    lines: list[str] = []
    defaults = default_choices(entry)
    for group in _GROUPS[entry]:
        lines += ["", f"{group}=CHOICE"]
        files = choices(group, config_dir)
        for name, file in files.items():
            lines += _row(
                f"{'*' if name == defaults.get(group) else ' '} {name}", file.meaning.split(". ")[0].rstrip("."), width
            )
        if group in _DESIGNS:
            continue
        for key, owners in keys_of(group, defaults.get(group), config_dir):
            of = "" if len(owners) == len(files) else f" ({', '.join(owners)})"
            lines += _key_row(replace(key, path=f"{group}.{key.path}", meaning=f"{key.meaning}{of}".strip()), width)
    own = config_directory() / f"{entry}.yaml"
    if own.is_file():
        lines += ["", "KEY=VALUE"]
        for key in read_file(own).keys:
            lines += _key_row(key, width)
    return "\n".join(lines)


def config_dir_of(words: Sequence[str]) -> str | None:
    """Return the folder of the user's own groups that a line names, if it does."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, equals, folder = word.partition("=")
        if option == "--config-dir":
            return str(Path(folder if equals else after).expanduser())
    return None


def groups_of(entry: str) -> list[str]:
    """Return the groups of an entry point."""
    return _GROUPS[entry]


def keys_of_entry(entry: str, config_dir: str | None = None) -> list[Key]:
    """Return the keys of an entry point, of all its groups' choices and its own, by their whole paths."""
    own = config_directory() / f"{entry}.yaml"
    keys = [key for key in read_file(own).keys if key.value] if own.is_file() else []
    for group in _GROUPS[entry]:
        if group not in _DESIGNS:
            keys += [
                replace(key, path=f"{group}.{key.path}") for key, _ in keys_of(group, None, config_dir) if key.value
            ]
    return keys


def default_choices(entry: str) -> dict[str, str]:
    """Return the choice of each group that an entry point starts with."""
    own = config_directory() / f"{entry}.yaml"
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    found = (re.match(r"^  - (\w+): ([\w+]+)$", line) for line in lines)
    return {match[1]: match[2] for match in found if match and match[2] != "null"}


def _key_row(key: Key, width: int) -> list[str]:
    if not key.value:  # only where keys of its own follow
        return []
    return _row(f"  {key.path}={key.value}", key.meaning, width)


def _row(name: str, meaning: str, width: int, column: int = 30) -> list[str]:
    """Put a meaning beside what it explains, or below where that is too long."""
    head = f" {name}"
    if not meaning:
        return [head]
    body = textwrap.wrap(meaning, width - column)
    if len(head) < column - 1:
        return [f"{head:<{column}}{body[0]}", *(" " * column + line for line in body[1:])]
    return [head, *(" " * column + line for line in body)]
