"""How an attempt gets into the journal: its start, and its end with the decision whether another one follows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kv_align.runs.run_dir import RunDirectory, Status
from kv_align.runs.sweep_dir import SweepDirectory
from launch.cluster.schema import RetryPolicy
from launch.journal.journal import Journal
from launch.journal.pause import tell
from launch.journal.processes import this_process
from launch.journal.retry import DISK_FULL, Cause, cause_of, may_retry, vanished


def start_attempt(journal: Journal, name: str, uid: str) -> None:
    """Append the start of an attempt that this process makes."""
    journal.add_attempt(name, "start", uid, **this_process(), restarts=_restarts())


def started_since_requeue(attempts: Sequence[dict[str, Any]]) -> bool:
    """Whether the last attempt started after Slurm had started this job last, and not before it was queued again."""
    starts = [row for row in attempts if row["event"] == "start"]
    return any(row.get("restarts", _restarts()) == _restarts() for row in starts[-1:])


def _restarts() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def end_attempt(
    sweep: SweepDirectory,
    journal: Journal,
    name: str,
    uid: str,
    cause: Cause,
    policy: RetryPolicy,
    exit_code: int | None = None,
    *,
    shared: bool = False,
) -> bool:
    """Append the end of a run's attempt for a submission; whether another one follows.

    Parameters
    ----------
    sweep, journal, name, uid
        The run, and the submission that it was done for.
    cause, exit_code
        How it ended.
    policy
        How often each cause is retried.
    shared
        Whether other runs were on its GPU: then it is no fault of the run that memory was out.
    """
    status = RunDirectory(sweep.runs / name).status()
    step = 0 if status is None else status.step
    shared = shared and cause == "out_of_memory"
    retry = shared or may_retry(cause, journal.attempts(name, uid), policy, step)
    facts = {
        "cause": cause,
        "exit_code": exit_code,
        "retry": retry,
        "step": step,
        **({"shared": True} if shared else {}),
    }
    journal.add_attempt(name, "end", uid, **facts, submissions=len(journal.ledger().submissions))
    return retry


def end_open_attempt(journal: Journal, name: str, uid: str, exit_code: int, *, shared: bool = False) -> Cause | None:
    """Append the end of the attempt that a process made which did a run and has ended; see `end_attempt`.

    For a job that goes on with other runs, since its last line knows one exit code only.

    Returns
    -------
    What ended it; None where the process made no attempt, and where it found the disk full, which ends none.
    """
    setting = journal.setting()
    attempts = journal.attempts(name, uid)
    if setting is None or exit_code == DISK_FULL or not vanished(attempts):
        return None
    directory = RunDirectory(journal.sweep.runs / name)
    cause: Cause = "finished" if directory.is_complete() else cause_of(exit_code, own_status(directory, attempts))
    try:
        end_attempt(journal.sweep, journal, name, uid, cause, setting.cluster.retry, exit_code, shared=shared)
    except OSError as error:  # the job's last line tries it once more
        tell(f"kv-align: the end of {name} ({cause}) could not be noted: {error}")
    return cause


def own_status(directory: RunDirectory, attempts: Sequence[dict[str, Any]]) -> Status | None:
    """Return the status that the attempt which started last has written; None where an earlier one did, and it none yet.

    Both its start and its status are noted by one process, so that the same clock has made their times.
    """
    status = directory.status()
    start = next((row for row in reversed(attempts) if row["event"] == "start"), None)
    if status is None or start is None:
        return None
    same = (status.host, status.pid) == (start.get("host", status.host), start.get("pid", status.pid))
    return status if same and status.started >= start["time"] else None


def cause_of_vanished(directory: RunDirectory, attempts: Sequence[dict[str, Any]]) -> Cause:
    """Return what ended an attempt that went away with its node, or with its job."""
    if directory.is_complete():
        return "finished"
    status = own_status(directory, attempts)
    by_status = cause_by_status(status)
    known = status is not None and (status.state == "interrupted" or by_status == "disk_full")
    return by_status if known else "node_failure"


def cause_by_status(status: Status | None) -> Cause:
    """Return what ended an attempt whose exit code nobody saw."""
    if status is None or status.state == "running":
        return "killed"
    return cause_of(1, status) if status.state == "failed" else status.state
