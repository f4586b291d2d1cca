"""What every kind of cluster can be told (`conf/cluster/`), and how files and command lines become it.

Each kind's own keys are a subclass beside its executor (`launch.executors`). Whoever does not know the kind, such as a
worker, reads a `Cluster`: the common keys are checked and typed, the others are kept as they are.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict

from kv_align.config.options import NonNegativeFloat, NonNegativeInt, PositiveFloat
from kv_align.config.schema import Section
from kv_align.config.targets import config_directory
from kv_align.runs.errors import ConfigError, no_config_dir, unknown_key
from kv_align.runs.values import read_values

PER_ARM = ("partition", "constraint", "time_min", "mem_gb", "cpus_per_task", "gpus_per_node", "nodes", "tasks_per_node")
"""Keys of a cluster that single arms of a sweep may have otherwise."""
_FROZEN_KEYS = ("kind", "name", "snapshot_code")


class RetryPolicy(Section):
    """How often a run is started again by itself, by what ended it; 0: never. A submission starts the count anew.

    Attributes
    ----------
    backoff_s
        After a failure of its node a run waits so long, twice as long after the next, and so on.
    pause_s
        On a full disk a sweep is paused; so often a run looks whether there is space again.
    """

    interrupted: NonNegativeInt
    node_failure: NonNegativeInt
    killed: NonNegativeInt
    out_of_memory: NonNegativeInt
    code_error: NonNegativeInt
    diverged: NonNegativeInt
    backoff_s: NonNegativeFloat = 30.0
    pause_s: NonNegativeFloat = 300.0


class Cluster(Section):
    """What every kind of cluster has.

    Attributes
    ----------
    name
        Of the file in `conf/cluster/`.
    kind
        The module of `launch.executors` that executes runs there.
    offline
        Whether jobs may not reach the hub: what they need is downloaded before anything is queued.
    snapshot_code
        Whether jobs run a copy of the packages, kept in the sweep, so that later edits do not reach them.
    stale_after_s
        A run whose job the scheduler does not know is lost when its heartbeat is older than this.
    hold_arm
        Whether a code error holds the runs of its arm that have not started.
    retry
        What is started again by itself.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str
    kind: str
    offline: bool
    snapshot_code: bool
    stale_after_s: PositiveFloat
    hold_arm: bool
    retry: RetryPolicy

    def check(self) -> None:
        """Refuse, with a `ConfigError`, values that do not go together."""


class OwnCluster(Cluster):
    """What one kind of cluster has: the common keys and its own, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def changed(raw: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    """Return plain containers with single keys changed; `retry.killed` is a nested one.

    Parameters
    ----------
    raw
        All keys of a cluster.
    changes
        New values by key.
    where
        What has these keys, for the sentence about one that does not exist.

    Raises
    ------
    ConfigError
        For a key that is not there.
    """
    result = deepcopy(raw)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                raise unknown_key(f"cluster.{key}", raw, where)
            section = section[parent]
        if last not in section and parents != ["additional_parameters"]:
            raise unknown_key(f"cluster.{key}", section, where)
        section[last] = value
    return result


def refuse_frozen(changes: dict[str, Any]) -> None:
    """Refuse to change what stays as it was when a sweep was submitted."""
    for key in _FROZEN_KEYS:
        if key in changes:
            raise ConfigError(
                f"cluster.{key}={changes[key]} is not allowed: {key} stays as it was when the sweep was submitted; change "
                "what jobs ask for, such as cluster.mem_gb=64."
            )


def read_choice(group: str, name: str, config_dir: str | None) -> dict[str, Any]:
    """Return `<group>/<name>.yaml` of the user's folder, else of `conf/`, as plain containers.

    Raises
    ------
    ConfigError
        If there is none, or it is not YAML of a mapping.
    """
    folders = [Path(config_dir)] if config_dir is not None else []
    folders.append(config_directory())
    if config_dir is not None and not folders[0].is_dir():
        raise no_config_dir(config_dir)
    for folder in folders:
        file = folder / group / f"{name}.yaml"
        if "/" not in name and file.is_file():
            try:
                raw = read_values(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}; correct it.") from None
            if not isinstance(raw, dict):
                raise ConfigError(f"{file} is not allowed: it must be a mapping of keys to values; correct it.")
            return raw
    names = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml") if file.is_file()})
    raise ConfigError(f"{group}={name} is not allowed: {group} must be one of {', '.join(names)}; choose one of these.")
