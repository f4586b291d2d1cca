"""What Slurm says about jobs and about itself: the only place that reads the output of its commands."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launch.executors.base import JobState, Phase, SchedulerUnavailable
from launch.executors.slurm.reasons import pending_state

TIMEOUT_S = 60.0
"""So long Slurm has for an answer."""
_OF_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_DEBUG")
_VARIABLES = {  # by which sbatch is told an option, where it is not called as that is, and by which the opposite
    "array": ("ARRAY_INX",),
    "cpus-per-task": ("CPUS_PER_TASK", "CPUS_PER_GPU"),
    "gpus-per-node": ("GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK"),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "output": ("OUTPUT", "ERROR"),
    "requeue": ("REQUEUE", "NO_REQUEUE"),
    "time": ("TIMELIMIT",),
}
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
_WAITING = ("pending", "held", "blocked")
ENDING = "its job is ending"
_REQUEUED = JobState("pending", "its job was requeued")


def call(*command: str, text: str | None = None, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; a missing one, or one that takes too long, is like one that fails."""
    limit_s = TIMEOUT_S if timeout_s is None else timeout_s
    # Without the limit that Slurm sets, `12_[0-2,5]` is cut in the middle where it is long.
    environment = {**outside_of_jobs(os.environ, text or ""), "SLURM_BITSTR_LEN": "0"}
    options: dict[str, Any] = {
        "encoding": "utf-8",
        "errors": "replace",
        "capture_output": True,
    }  # a site says what it likes
    try:
        return subprocess.run(command, check=False, timeout=limit_s, input=text, env=environment, **options)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 127, "", f"nothing within {limit_s:.0f} s (timed out)")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"{error.strerror} ({error.filename})")


def outside_of_jobs(environment: Mapping[str, str], script: str = "") -> dict[str, str]:
    """Return an environment without what Slurm tells a job about itself: a job that is submitted from one is another.

    With SLURM_MEM_PER_CPU of a batch job, for example, srun refuses to start in a job that asks for memory by node.

    Parameters
    ----------
    environment
        Of this process.
    script
        That sbatch is given, if it is: SBATCH_ACCOUNT, for example, would overrule the account that stands there. What it
        leaves open, such as one where cluster.account is null, is decided by such variables as everywhere on that site.
    """
    stated = set(re.findall(r"^#SBATCH --(?!wckey=submitit$)([\w-]+)", script, re.MULTILINE))  # that is submitit's own
    if script:  # without such lines it is no array, and has no GPU
        stated |= {"array", "gpus-per-node"}
    names = {name for option in stated for name in _VARIABLES.get(option, (option.upper().replace("-", "_"),))}
    overruling = {f"SBATCH_{name}" for name in names}
    if "gpu" in environment.get("SBATCH_GRES", "") and script:
        overruling.add("SBATCH_GRES")
    return {
        name: value
        for name, value in environment.items()
        if (not name.startswith("SLURM_") or name in _OF_CLUSTER) and name not in overruling
    }


def ask(*command: str, timeout_s: float | None = None) -> str:
    """Return what one of Slurm's commands prints; nothing where it does not know the job that it is asked about.

    Raises
    ------
    SchedulerUnavailable
        If it fails otherwise, or takes too long.
    """
    result = call(*command, timeout_s=timeout_s)
    if result.returncode == 0:
        return result.stdout
    if "invalid job id" in result.stderr.lower():
        return ""
    raise no_answer(command[0], result.stderr or f"exit code {result.returncode}")


def no_answer(command: str, message: str) -> SchedulerUnavailable:
    """Return the sentence for a command of Slurm that gave no answer."""
    last = (message.strip().splitlines() or ["nothing"])[-1].strip().rstrip(".")
    return SchedulerUnavailable(f"Slurm does not answer: {command} says: {last}; try again when it does.")


def job_states(
    jobs: Iterable[str], *, accounting: bool, silent: Collection[str] = (), timeout_s: float | None = None
) -> dict[str, JobState]:
    """Return what is known of jobs or array elements, by id.

    One call of sacct, and one of squeue for what sacct does not know or calls ended: it may lag behind, or keep the jobs of
    others to itself. It says for ever that a job was requeued which was cancelled in that moment, so squeue is asked whether
    it still knows these; and it does not know why a job waits now. Without accounting, one call of squeue.

    Parameters
    ----------
    jobs
        Their ids.
    accounting
        Whether there is sacct.
    silent
        Those that should give signs of life and do not: a job that ended while the accounting was down runs there for ever.
    timeout_s
        So long each of the two has for its answer; None: as long as usual.

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
        known = dict(_read(ask("sacct", "--allusers", *format_, "-j", _bases(wanted), timeout_s=timeout_s)))
    requeued = {job for job in wanted if known.get(job) == _REQUEUED}
    waiting = {job for job in wanted if job in known and known[job].phase in _WAITING} - requeued
    unclear = {job for job in wanted if job not in known or known[job].phase == "ended" or job in silent}
    unclear |= requeued | waiting
    if not unclear:
        return known
    # One line for each element (-r): in that of several Slurm writes the reasons of all of them.
    command = ("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j", _bases(unclear))
    live = dict(_read(ask(*command, timeout_s=timeout_s)))
    for job in unclear:
        if job in requeued and job in live:
            if live[job].phase in ("held", "blocked"):
                known[job] = live[job]
            continue  # it may come back whatever squeue calls it, so who wants it gone must still cancel it
        if job in waiting and job in live and live[job].reason == ENDING:
            known[job] = _REQUEUED  # it ends to come back: who wants it gone must cancel it
        elif job in live:
            known[job] = live[job]
        elif job in requeued:
            known[job] = JobState(
                "gone", "accounting says that its job was requeued, but Slurm no longer knows that job"
            )
        elif job in waiting:
            known[job] = JobState("gone", "accounting says that its job waits, but Slurm no longer knows that job")
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
        for element in expand(job):
            yield element, as_job_state(word, reason)


def as_job_state(word: str, reason: str) -> JobState:
    """Return what one of Slurm's states means here."""
    if word == "REQUEUED":
        return _REQUEUED
    phase = _PHASES.get(word, "ended")
    if phase == "ended":
        return JobState("ended", _ENDS.get(word, word.lower().replace("_", " ")))
    if word == "COMPLETING":
        return JobState(phase, ENDING)
    return pending_state(reason) if phase == "pending" else JobState(phase, "" if phase == "running" else reason)


@dataclass(frozen=True)
class ArrayLeft:
    """What is left of a job or an array: how many elements have not ended, and the ids of those that run."""

    elements: int
    running: tuple[str, ...]


def arrays_left(jobs: Collection[str]) -> dict[str, ArrayLeft]:
    """Return what is left of each of these jobs and arrays, the first that was queued first; without those that have ended.

    Raises
    ------
    SchedulerUnavailable
        If Slurm does not answer.
    """
    if not jobs:
        return {}
    lines = [
        line.split("|") for line in ask("squeue", "-h", "-r", "-o", "%F|%i|%T", "-j", ",".join(sorted(jobs))).split()
    ]
    return {
        job: ArrayLeft(len(own), tuple(element for _, element, state in own if _PHASES.get(state) == "running"))
        for job in sorted(jobs, key=lambda job: (len(job), job))  # 99 was queued before 100
        for own in [[line for line in lines if len(line) == 3 and line[0] == job]]
        if own
    }


def expand(job: str) -> list[str]:
    """Return the elements that `12_[0-2,5%4]` stands for; anything else is itself."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job)
    if match is None:
        return [job]
    base, ranges = match.groups()
    elements = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        elements += [f"{base}_{index}" for index in range(int(first), int(last or first) + 1)]
    return elements


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
    jobs = ask("squeue", "-h", "-t", "all", "-o", "%F", "--name", name).split()
    if not jobs and accounting:
        day_before = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 86400))
        format_ = ("-X", "-n", "-P", "-o", "JobID")
        jobs = ask("sacct", "--allusers", *format_, "-S", day_before, "--name", name).split()
    return jobs[0].partition("_")[0] if jobs else None


def scancel(jobs: Collection[str], *options: str) -> str:
    """Cancel jobs, or signal them; returns what Slurm complained of, which is nothing where they had ended already."""
    if not jobs:
        return ""
    result = call("scancel", *options, *dict.fromkeys(jobs))
    if result.returncode == 0:
        return ""
    over = ("invalid job id", "already completing or completed", "job/step already")
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    complaints = [line for line in lines if not any(word in line.lower() for word in over)]
    return complaints[-1].rstrip(".") if complaints else "" if lines else f"exit code {result.returncode}"
