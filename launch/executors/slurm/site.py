"""What Slurm says about itself: its configuration, its partitions, its nodes."""

from __future__ import annotations

import os
import re

from launch.executors.slurm.query import ask, call


def settings() -> dict[str, str]:
    """Return the controller's configuration (`scontrol show config`); empty where it does not answer."""
    pairs = (line.partition("=") for line in call("scontrol", "show", "config").stdout.splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def partitions() -> dict[str, str]:
    """Return the time limit of each partition, as Slurm writes it."""
    pairs = (line.partition("|") for line in ask("sinfo", "-h", "-o", "%R|%l").splitlines())
    return {name: limit for name, bar, limit in pairs if bar}


def nodes_out_of_service(partitions: str) -> bool:
    """Whether partitions have nodes, and every one of them is down, drained or draining."""
    states = ask("sinfo", "-h", "-N", "-o", "%T", "-p", partitions).split()
    return bool(states) and all(re.match(r"down|drain|fail|maint|reboot|unk", state) for state in states)


def default_partition() -> str:
    """Return the partition of jobs that name none: what the environment names, else the cluster's own."""
    if os.environ.get("SBATCH_PARTITION"):
        return os.environ["SBATCH_PARTITION"]
    names = [line for line in ask("sinfo", "-h", "-o", "%P").split() if line.endswith("*")]
    return names[0].rstrip("*") if names else ""


def minutes(limit: str) -> float:
    """Return Slurm's `1-12:30:00`, `30:00` (minutes and seconds), `30` or `infinite` in minutes."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 1:
        hours, mins, seconds = 0, parts[0], 0
    else:
        hours, mins, seconds = [*([0] * (3 - len(parts))), *parts]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60
