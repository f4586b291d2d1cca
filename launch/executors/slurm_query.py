"""What Slurm says about jobs and about itself: the only place that reads the output of its commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator

from launch.executors.executor import JobState, Phase

_TIMEOUT_S = 60
_PHASES: dict[str, Phase] = {
    "PENDING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_FED": "pending",
    "REQUEUE_HOLD": "held",
    "SPECIAL_EXIT": "held",
    "RESV_DEL_HOLD": "held",
    "RUNNING": "running",
    "COMPLETING": "running",
    "CONFIGURING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "STOPPED": "running",
    "SUSPENDED": "running",
}
_ENDS = {
    "BOOT_FAIL": "its node failed",
    "CANCELLED": "its job was cancelled in Slurm",
    "COMPLETED": "its job completed without a result",
    "DEADLINE": "its job passed its deadline",
    "FAILED": "",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "its job was preempted and not requeued",
    "TIMEOUT": "its job ran into the time limit",
}
_QUIET_REASONS = ("None", "Priority", "Resources", "BeginTime", "")


def call(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; a missing one is like one that fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, input=text)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def job_states(jobs: Iterable[str], *, accounting: bool) -> dict[str, JobState]:
    """Return what is known of jobs or array elements, by id, with one call of sacct, or of squeue where that is no use."""
    bases = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    if not bases:
        return {}
    if accounting:
        told = call("sacct", "-X", "-n", "-P", "-o", "JobID,State,Reason", "-j", bases)
        if told.returncode == 0:
            return dict(_read(told.stdout))
    return dict(_read(call("squeue", "-h", "-t", "all", "-o", "%i|%T|%r", "-j", bases).stdout))


def _read(text: str) -> Iterator[tuple[str, JobState]]:
    for line in text.splitlines():
        job, state, reason = line.split("|", 2)
        word = state.split()[0].rstrip("+")
        for each in expand(job):
            yield each, as_job_state(word, reason)


def as_job_state(word: str, reason: str) -> JobState:
    """Return what one of Slurm's states means here."""
    phase = _PHASES.get(word, "ended")
    if phase == "ended":
        return JobState("ended", _ENDS.get(word, word.lower().replace("_", " ")))
    if phase == "pending" and ("held" in reason.lower() or reason == "DependencyNeverSatisfied"):
        return JobState("held", f"held in Slurm: {reason}")
    return JobState(phase, "" if reason in _QUIET_REASONS or phase == "running" else reason)


def expand(job: str) -> list[str]:
    """Return the elements that `12_[0-2,5%4]` stands for; anything else is itself."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job)
    if match is None:
        return [job]
    base, ranges = match.groups()
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [f"{base}_{index}" for index in range(int(first), int(last or first) + 1)]
    return found


def settings() -> dict[str, str]:
    """Return the controller's configuration (`scontrol show config`); empty where it does not answer."""
    pairs = (line.partition("=") for line in call("scontrol", "show", "config").stdout.splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def partitions() -> dict[str, str]:
    """Return the time limit of each partition, as Slurm writes it."""
    lines = call("sinfo", "-h", "-o", "%R|%l").stdout.splitlines()
    return dict(line.split("|", 1) for line in lines)


def default_partition() -> str:
    """Return the partition of jobs that name none."""
    names = [line for line in call("sinfo", "-h", "-o", "%P").stdout.split() if line.endswith("*")]
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


def find_by_name(name: str) -> str | None:
    """Return the id of the job, or the array, that was submitted under a name; None if there is none."""
    found = call("squeue", "-h", "-t", "all", "-o", "%F", "--name", name).stdout.split()
    found = found or call("sacct", "-X", "-n", "-P", "-o", "JobID", "--name", name).stdout.split()
    return found[0].partition("_")[0] if found else None
