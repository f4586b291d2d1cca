"""Which kinds of cluster there are: a kind is a module of this folder, and `conf/cluster/` says which one a cluster is of.

To add a kind, add one module with a subclass of `Executor` as its `EXECUTOR` and one file `conf/cluster/NAME.yaml` with
`kind: MODULE` and the keys of that executor's schema. A kind is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import launch.executors
from kv_align.config.schema import validate
from kv_align.runs.errors import ConfigError, invalid_value
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.schema import Cluster, changed, read_choice, refuse_frozen
from launch.cluster.setting import Setting
from launch.executors.base import Executor

_NO_KINDS = ("base", "registry")


def kinds() -> list[str]:
    """Return the names of all kinds of cluster."""
    modules = pkgutil.iter_modules(launch.executors.__path__)
    return sorted(module.name for module in modules if module.name not in _NO_KINDS)


def executor_class(kind: object) -> type[Executor[Any]]:
    """Return the executor of a kind of cluster.

    Raises
    ------
    ConfigError
        If there is no such kind.
    """
    if kind not in kinds():
        raise invalid_value("cluster.kind", kind, f"one of {', '.join(kinds())}")
    executor: type[Executor[Any]] | None = getattr(
        importlib.import_module(f"launch.executors.{kind}"), "EXECUTOR", None
    )
    if executor is None:
        raise ConfigError(f"launch/executors/{kind} names no EXECUTOR: set it to that module's subclass of Executor.")
    return executor


def make_executor(sweep: SweepDirectory, setting: Setting, plan: Plan | None = None) -> Executor[Any]:
    """Return the executor of a sweep; see `Executor`."""
    return executor_class(setting.cluster.kind)(sweep, setting, plan)


def load_cluster(name: str, changes: dict[str, Any], config_dir: str | None = None) -> Cluster:
    """Read `conf/cluster/<name>.yaml`, change single keys (`retry.killed` for a nested one) and check it.

    Raises
    ------
    ConfigError
        If there is no such cluster, or a key or value that it does not allow.
    """
    raw = read_choice("cluster", name, config_dir)
    return _checked({"name": name, **changed(raw, changes, f"cluster={name}")})


def change_cluster(cluster: Cluster, changes: dict[str, Any]) -> Cluster:
    """Return a frozen cluster with single keys changed, as in `load_cluster`.

    Raises
    ------
    ConfigError
        For a key or value that it does not allow, or one that a sweep which was submitted cannot change.
    """
    refuse_frozen(changes)
    # Keys that are newer than the frozen file have their defaults.
    complete = validate(executor_class(cluster.kind).schema, cluster.model_dump())
    return _checked(changed(complete.model_dump(), changes, f"cluster={cluster.name}"))


def check_resources(cluster: Cluster, resources: dict[str, dict[str, Any]]) -> None:
    """Check what single arms ask for, by arm, against the schema of a kind; keys that the kind does not have say nothing.

    Raises
    ------
    ConfigError
        For a value that it does not allow.
    """
    schema = executor_class(cluster.kind).schema
    for arm, own in resources.items():
        known = {key: value for key, value in own.items() if key in schema.model_fields}
        try:
            validate(schema, cluster.model_dump() | known)
        except ConfigError as error:
            where = f"arms.{arm}.resources"
            raise ConfigError(f"{where}.{error}".replace("set ", f"set {where}.", 1)) from None


def _checked(raw: dict[str, Any]) -> Cluster:
    """Check plain containers against the schema of their kind."""
    schema = executor_class(raw.get("kind")).schema
    try:
        cluster = validate(schema, raw)
    except ConfigError as error:
        raise ConfigError(f"cluster.{error}".replace("set ", "set cluster.", 1)) from None
    cluster.check()
    return cluster
