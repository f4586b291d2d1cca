"""What Slurm says about jobs and about itself: the only place that reads the output of its commands."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator

from launch.executors.base import JobState, Phase, SchedulerUnavailable

_TIMEOUT_S = 60
_PHASES: dict[str, Phase] = {
    "PENDING": "pending",
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
ENDING = "its job is ending"
_REQUEUED = JobState("pending", "its job was requeued")
_QUIET_REASONS = ("None", "Priority", "Resources", "BeginTime", "")


def call(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; a missing one is like one that fails."""
    # Without the limit that Slurm sets, `12_[0-2,5]` is cut in the middle where it is long.
    environment = dict(os.environ, SLURM_BITSTR_LEN="0")
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, input=text, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def ask(*command: str) -> str:
    """Return what one of Slurm's commands prints; nothing where it does not know the job that it is asked about.

    Raises
    ------
    SchedulerUnavailable
        If it fails otherwise, or takes too long.
    """
    told = call(*command)
    if told.returncode == 0:
        return told.stdout
    if "invalid job id" in told.stderr.lower():
        return ""
    raise no_answer(command[0], told.stderr or f"exit code {told.returncode}")


def no_answer(command: str, said: str) -> SchedulerUnavailable:
    """Return the sentence for a command of Slurm that gave no answer."""
    last = (said.strip().splitlines() or ["nothing"])[-1].strip().rstrip(".")
    return SchedulerUnavailable(f"Slurm does not answer: {command} says: {last}; try again when it does.")


def job_states(jobs: Iterable[str], *, accounting: bool, silent: Collection[str] = ()) -> dict[str, JobState]:
    """Return what is known of jobs or array elements, by id.

    One call of sacct, and one of squeue for what sacct does not know or calls ended: it may lag behind, or keep the jobs of
    others to itself. It says for ever that a job was requeued which was cancelled in that moment, so squeue is asked whether
    it still knows these. Without accounting, one call of squeue.

    Parameters
    ----------
    jobs
        Their ids.
    accounting
        Whether there is sacct.
    silent
        Those that should give signs of life and do not: a job that ended while the accounting was down runs there for ever.

    Raises
    ------
    SchedulerUnavailable
        If Slurm does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    known: dict[str, JobState] = {}
    if accounting:
        format_ = ("-X", "-n", "-P", "-o", "JobID,State,Reason")
        known = dict(_read(ask("sacct", "--allusers", *format_, "-j", _bases(wanted))))
    requeued = {job for job in wanted if known.get(job) == _REQUEUED}
    unclear = {job for job in wanted if job not in known or known[job].phase == "ended" or job in silent} | requeued
    if not unclear:
        return known
    live = dict(_read(ask("squeue", "-h", "-t", "all", "-o", "%i|%T|%r", "-j", _bases(unclear))))
    for job in unclear:
        if job in requeued and job in live:
            continue  # it may come back whatever squeue calls it, so who wants it gone must still cancel it
        if job in live:
            known[job] = live[job]
        elif job in requeued:
            known[job] = JobState(
                "gone", "accounting says that its job was requeued, but Slurm no longer knows that job"
            )
        elif job in silent and job in known and known[job].phase == "running":
            known[job] = JobState("gone", "accounting says that its job runs, but Slurm no longer knows that job")
    return known


def _bases(jobs: Iterable[str]) -> str:
    return ",".join(sorted({job.partition("_")[0] for job in jobs}))


def _read(text: str) -> Iterator[tuple[str, JobState]]:
    """Read lines of job, state and reason; others, such as a message of the site, are skipped."""
    for line in text.splitlines():
        parts = line.split("|", 2)
        if len(parts) < 3 or not parts[1].split():
            continue
        job, state, reason = parts
        word = state.split()[0].rstrip("+")
        for each in expand(job):
            yield each, as_job_state(word, reason)


def as_job_state(word: str, reason: str) -> JobState:
    """Return what one of Slurm's states means here."""
    if word == "REQUEUED":
        return _REQUEUED
    phase = _PHASES.get(word, "ended")
    if phase == "ended":
        return JobState("ended", _ENDS.get(word, word.lower().replace("_", " ")))
    if phase == "pending" and ("held" in reason.lower() or reason == "DependencyNeverSatisfied"):
        return JobState("held", f"held in Slurm: {reason}")
    if word == "COMPLETING":
        return JobState(phase, ENDING)
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
    pairs = (line.partition("|") for line in ask("sinfo", "-h", "-o", "%R|%l").splitlines())
    return {name: limit for name, bar, limit in pairs if bar}


def default_partition() -> str:
    """Return the partition of jobs that name none."""
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


def find_by_name(name: str, since: float, *, accounting: bool) -> str | None:
    """Return the id of the job, or the array, that was submitted under a name; None if there is none.

    Parameters
    ----------
    name
        Of the job.
    since
        When it was submitted, in seconds since the epoch; sacct looks no further back than it is told.
    accounting
        Whether there is sacct.

    Raises
    ------
    SchedulerUnavailable
        If Slurm does not answer.
    """
    found = ask("squeue", "-h", "-t", "all", "-o", "%F", "--name", name).split()
    if not found and accounting:
        day_before = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 86400))
        format_ = ("-X", "-n", "-P", "-o", "JobID")
        found = ask("sacct", "--allusers", *format_, "-S", day_before, "--name", name).split()
    return found[0].partition("_")[0] if found else None


def scancel(jobs: Collection[str], *options: str) -> str:
    """Cancel jobs, or signal them; returns what Slurm complained of, which is nothing where they had ended already."""
    if not jobs:
        return ""
    told = call("scancel", *options, *dict.fromkeys(jobs))
    if told.returncode == 0:
        return ""
    over = ("invalid job id", "already completing or completed", "job/step already")
    lines = [line.strip() for line in told.stderr.splitlines() if line.strip()]
    said = [line for line in lines if not any(word in line.lower() for word in over)]
    return said[-1].rstrip(".") if said else "" if lines else f"exit code {told.returncode}"
