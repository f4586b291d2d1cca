"""What sbatch says when it refuses, as one sentence that names the key to correct."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kv_align.runs.errors import ConfigError
from launch.executors.base import ClusterFull
from launch.executors.slurm.query import no_answer
from launch.executors.slurm.schema import SlurmCluster

_UNAVAILABLE = ("socket timed out", "unable to contact", "connection refused", "transport endpoint")
_KEYS = (  # what is looked for comes before what is part of it
    ("account/partition combination", "account"),
    ("partition", "partition"),
    ("invalid account", "account"),
    ("qos", "qos"),
    ("feature", "constraint"),
    ("array", "throttle"),
    ("time limit", "time_min"),
    ("gres", "gpus_per_node"),
)
_LIMITS = (
    ("wall", "time_min"),
    ("gres", "gpus_per_node"),
    ("mem", "mem_gb"),
    ("cpu", "cpus_per_task"),
    ("node", "nodes"),
)


def complaint(cluster: SlurmCluster, resources: Mapping[str, Any], text: str) -> ConfigError:
    """Return the sentence for what sbatch printed.

    Parameters
    ----------
    cluster, resources
        What was asked for; `resources` by the arm.
    text
        Its standard error; the sentence is a `SchedulerUnavailable` where no controller answered.
    """
    lines = [re.sub(r"^\s*(sbatch|allocation)?:?\s*(error|failure):\s*", "", line) for line in text.splitlines()]
    message = next((line.strip() for line in reversed(lines) if line.strip()), "nothing").rstrip(".")
    values = {**cluster.model_dump(), **resources}
    if any(word in text.lower() for word in _UNAVAILABLE):
        return no_answer("sbatch", message)
    if "submit limit" in text.lower() or "submitlimit" in text.lower():
        # The sentence is the same for every limit of an account or a QOS; the line before it names the one that is meant.
        limit = next((match[0] for match in (re.search(r"\b(QOS|Assoc)\w+", line) for line in lines) if match), "")
        key = next((key for word, key in _LIMITS if word in limit.lower() and "submit" not in limit.lower()), None)
        if key is None:
            return ClusterFull(
                f"cluster={cluster.name} takes no more jobs of yours now: sbatch says: {limit or message}; wait until some "
                "have ended, then run resume, or raise cluster.runs_per_job."
            )
        return _refused(key, values, f"{message} [{limit}]")
    key = next((key for word, key in _KEYS if word in message.lower()), None)
    if key is None:
        asked = ("mem_gb", "cpus_per_task", "gpus_per_node", "nodes", "time_min")
        shown = ", ".join(f"cluster.{name}={values[name]}" for name in asked)
        return ConfigError(f"{shown} is not allowed: sbatch says: {message}; ask for what a node has (sinfo -N -l).")
    return _refused(key, values, message)


def _refused(key: str, values: Mapping[str, Any], message: str) -> ConfigError:
    return ConfigError(f"cluster.{key}={values[key]} is not allowed: sbatch says: {message}; correct cluster.{key}.")
