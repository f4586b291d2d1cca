"""The `key=value` words of the command line: what belongs to the sweep, to the cluster, and to every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kv_align.runs.errors import ConfigError, invalid_value
from kv_align.runs.values import read_values

_SHORT = ("seeds", "losses")


@dataclass(frozen=True)
class Request:
    """What `submit` is asked for.

    Attributes
    ----------
    sweep, cluster
        Names in `conf/`.
    sweep_changes, cluster_changes
        Single keys that are changed.
    overrides
        Hydra overrides of every run.
    output_dir
        The sweep goes to `sweeps/` below it.
    config_dir
        A folder of the user's that is laid over `conf/`.
    """

    sweep: str
    cluster: str
    sweep_changes: dict[str, Any]
    cluster_changes: dict[str, Any]
    overrides: list[str]
    output_dir: Path
    config_dir: str | None


def read_request(words: Sequence[str], config_dir: str | None) -> Request:
    """Sort the words of `submit`.

    Raises
    ------
    ConfigError
        For a word that is no `key=value`, a value that cannot be read, or a sweep or cluster that is not named.
    """
    chosen: dict[str, str] = {}
    changes: dict[str, dict[str, Any]] = {"sweep": {}, "cluster": {}}
    overrides = []
    output_dir = Path("outputs")
    for word in words:
        key, equals, value = word.partition("=")
        group, _, rest = key.partition(".")
        if not equals and not key.startswith("~"):
            raise ConfigError(
                f"{word} is not a setting: settings are written key=value, such as sweep=demo; correct it."
            )
        if key in changes:
            chosen[key] = value
        elif key in _SHORT:
            changes["sweep"][key] = _value(key, value)
        elif key in ("cluster.kind", "cluster.name"):
            raise ConfigError(f"{word} is not allowed: cluster=NAME chooses what has it; take it out.")
        elif group in changes and rest:
            changes[group][rest] = _value(key, value)
        elif key == "output_dir":
            if not value.strip():
                raise invalid_value("output_dir", "''", "the name of a folder, such as outputs")
            output_dir = Path(value).expanduser()
        else:
            overrides.append(word)
    for group in changes:
        if group not in chosen:
            example = {"sweep": "expected_results", "cluster": "local"}[group]
            raise ConfigError(f"{group} is missing: choose a file of conf/{group}, such as {group}={example}.")
    return Request(
        chosen["sweep"], chosen["cluster"], changes["sweep"], changes["cluster"], overrides, output_dir, config_dir
    )


def read_changes(words: Sequence[str]) -> dict[str, Any]:
    """Read the `cluster.KEY=VALUE` words of `resume`.

    Raises
    ------
    ConfigError
        For any other word: the rest of a sweep is frozen.
    """
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        group, _, rest = key.partition(".")
        if not equals or group != "cluster" or not rest:
            raise ConfigError(
                f"{word} is not allowed: the plan is frozen, and only what its jobs ask for can be changed, such as "
                "cluster.mem_gb=64; submit a new sweep for anything else."
            )
        changes[rest] = _value(key, value)
    return changes


def read_seeds(word: str) -> Any:
    """Read `seeds=12` or `seeds=[0,1,12]`; what it means is for the plan to say."""
    key, equals, value = word.partition("=")
    if key != "seeds" or not equals:
        raise ConfigError(f"{word} is not allowed: give seeds=COUNT, such as seeds=12, or a list, such as seeds=[8,9].")
    return _value(key, value)


def _value(key: str, value: str) -> Any:
    try:
        return read_values(value)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={value} is not allowed: its value cannot be read; quote it for the shell.") from None
