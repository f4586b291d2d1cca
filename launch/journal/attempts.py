"""How the end of an attempt gets into the journal, with the decision whether another one follows."""

from __future__ import annotations

from kv_align.runs.run_dir import RunDirectory, Status
from kv_align.runs.sweep_dir import SweepDirectory
from launch.cluster.schema import RetryPolicy
from launch.journal.journal import Journal
from launch.journal.retry import Cause, cause_of, may_retry


def end_attempt(
    sweep: SweepDirectory,
    journal: Journal,
    name: str,
    uid: str,
    cause: Cause,
    policy: RetryPolicy,
    exit_code: int | None = None,
) -> bool:
    """Append the end of a run's attempt for a submission; whether another one follows."""
    status = RunDirectory(sweep.runs / name).status()
    step = 0 if status is None else status.step
    retry = may_retry(cause, journal.attempts(name, uid), policy, step)
    seen = len(journal.ledger().submissions)
    journal.add_attempt(name, "end", uid, cause=cause, exit_code=exit_code, retry=retry, step=step, submissions=seen)
    return retry


def cause_by_status(status: Status | None) -> Cause:
    """Return what ended an attempt whose exit code nobody saw."""
    if status is None or status.state == "running":
        return "killed"
    return cause_of(1, status) if status.state == "failed" else status.state
