"""Where runs are executed and with what: the typed schema of `conf/cluster/`, frozen into the sweep when it is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from kv_align.config.options import NonNegativeInt, PositiveFloat, PositiveInt
from kv_align.config.schema import Section, validate
from kv_align.config.targets import config_directory
from kv_align.runs.errors import ConfigError, invalid_value, unknown_key


class RetryPolicy(Section):
    """How often a run is started again by itself, by what ended it; 0: never. A submission starts the count anew."""

    interrupted: NonNegativeInt
    node_failure: NonNegativeInt
    killed: NonNegativeInt
    out_of_memory: NonNegativeInt
    code_error: NonNegativeInt
    diverged: NonNegativeInt


class Cluster(Section):
    """What every kind of cluster has.

    Attributes
    ----------
    name
        Of the file in `conf/cluster/`.
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

    name: str
    offline: bool
    snapshot_code: bool
    stale_after_s: PositiveFloat
    hold_arm: bool
    retry: RetryPolicy


class DebugCluster(Cluster):
    """In this process, one run after the other."""

    kind: Literal["debug"]


class LocalCluster(Cluster):
    """A queue with slots on this machine; `slots` null: one per GPU, else as many as the cores allow.

    `grace_s` is what a cancelled run has for its checkpoint before it is killed.
    """

    kind: Literal["local"]
    slots: PositiveInt | None
    threads_per_run: PositiveInt
    grace_s: PositiveFloat


class SlurmCluster(Cluster):
    """Job arrays. Names follow sbatch and submitit; null leaves it to the cluster's own default.

    Attributes
    ----------
    throttle
        How many runs may run at once.
    runs_per_job
        Runs that one array element does one after the other: for short runs.
    setup
        Shell lines before each job, such as `module load cuda` or the activation of an environment.
    python
        Command of the interpreter on the nodes; null: the one that submits.
    prepare
        A shell command that a job of its own runs before all others; null: none.
    require_gpu
        Whether a job that was given GPUs and whose trainer sees none is a failure of its node, instead of a run on the CPU.
    signal_delay_s
        A job is asked to leave this long before its time limit; less than that limit.
    report
        Whether a last job writes the report, also when some runs failed.
    additional_parameters
        Any other sbatch option, by its long name.
    """

    kind: Literal["slurm"]
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    time_min: PositiveInt
    mem_gb: PositiveFloat
    cpus_per_task: PositiveInt
    gpus_per_node: NonNegativeInt
    nodes: PositiveInt
    tasks_per_node: PositiveInt
    throttle: PositiveInt
    runs_per_job: PositiveInt
    signal_delay_s: PositiveInt
    require_gpu: bool
    setup: list[str]
    python: str | None
    prepare: str | None
    report: bool
    additional_parameters: dict[str, Any]


AnyCluster = DebugCluster | LocalCluster | SlurmCluster
_KINDS: dict[str, type[DebugCluster | LocalCluster | SlurmCluster]] = {
    "debug": DebugCluster,
    "local": LocalCluster,
    "slurm": SlurmCluster,
}
PER_ARM = ("partition", "constraint", "time_min", "mem_gb", "cpus_per_task", "gpus_per_node", "nodes", "tasks_per_node")


def load_cluster(name: str, changes: dict[str, Any], config_dir: str | None = None) -> AnyCluster:
    """Read `conf/cluster/<name>.yaml`, change single keys (`retry.killed` for a nested one) and check it.

    Raises
    ------
    ConfigError
        If there is no such cluster, or a key or value that it does not allow.
    """
    raw = read_choice("cluster", name, config_dir)
    _change(raw, changes, f"cluster={name}")
    return validate_cluster({"name": name, **raw})


def change_cluster(cluster: AnyCluster, changes: dict[str, Any]) -> AnyCluster:
    """Return a frozen cluster with single keys changed, as in `load_cluster`.

    Raises
    ------
    ConfigError
        For a key or value that it does not allow, or one that a sweep which was submitted cannot change.
    """
    for key in ("kind", "name", "snapshot_code"):
        if key in changes:
            raise ConfigError(
                f"cluster.{key}={changes[key]} is not allowed: {key} stays as it was when the sweep was submitted; change "
                "what jobs ask for, such as cluster.mem_gb=64."
            )
    raw = cluster.model_dump()
    _change(raw, changes, f"cluster={cluster.name}")
    return validate_cluster(raw)


def _change(raw: dict[str, Any], changes: dict[str, Any], where: str) -> None:
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = raw
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                raise unknown_key(f"cluster.{key}", raw, where)
            section = section[parent]
        if last not in section and parents != ["additional_parameters"]:
            raise unknown_key(f"cluster.{key}", section, where)
        section[last] = value


def validate_cluster(raw: dict[str, Any]) -> AnyCluster:
    """Check plain containers against the schema of their kind."""
    kind = raw.get("kind")
    if kind not in _KINDS:
        raise invalid_value("cluster.kind", kind, f"one of {', '.join(_KINDS)}")
    try:
        cluster = validate(_KINDS[kind], raw)
    except ConfigError as error:
        raise ConfigError(f"cluster.{error}".replace("set ", "set cluster.", 1)) from None
    if isinstance(cluster, SlurmCluster):
        check_signal(cluster.signal_delay_s, cluster.time_min)
    return cluster


def check_signal(signal_delay_s: int, time_min: int) -> None:
    """Refuse to ask a job to leave before it has begun."""
    if signal_delay_s >= time_min * 60:
        raise invalid_value(
            "cluster.signal_delay_s", signal_delay_s, f"less than the {time_min * 60} s of cluster.time_min={time_min}"
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
        raise ConfigError(f"--config-dir={config_dir} is not allowed: there is no such folder; correct the path.")
    for folder in folders:
        file = folder / group / f"{name}.yaml"
        if file.is_file():
            try:
                raw = yaml.safe_load(file.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}; correct it.") from None
            if not isinstance(raw, dict):
                raise ConfigError(f"{file} is not allowed: it must be a mapping of keys to values; correct it.")
            return raw
    names = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
    raise ConfigError(f"{group}={name} is not allowed: {group} must be one of {', '.join(names)}; choose one of these.")
