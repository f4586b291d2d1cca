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


def cause_by_status(status: Status | None) -> Cause:
    """Return what ended an attempt whose exit code nobody saw."""
    if status is None or status.state == "running":
        return "killed"
    return cause_of(1, status) if status.state == "failed" else status.state
