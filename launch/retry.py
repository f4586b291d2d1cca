"""What ended an attempt, and whether the declared policy starts the run again. Pure functions of facts; no scheduler."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, Literal

from kv_align.runs import EXIT_CODES, Status
from launch.cluster import RetryPolicy

Cause = Literal[
    "finished",
    "interrupted",
    "node_failure",
    "killed",
    "out_of_memory",
    "code_error",
    "bad_input",
    "diverged",
]
BAD_INPUT = 2
_KILLS = (signal.SIGKILL, signal.SIGHUP, signal.SIGINT)
_ASKED = (signal.SIGTERM, signal.SIGUSR2)
IN_WORDS: dict[str, str] = {
    "interrupted": "interrupted",
    "node_failure": "its node failed, or it could not start there",
    "killed": "killed from outside",
    "out_of_memory": "out of memory",
    "code_error": "an error in the code",
    "bad_input": "bad input",
    "diverged": "diverged",
}


def cause_of(exit_code: int, status: Status | None) -> Cause:
    """Return what ended an attempt.

    Parameters
    ----------
    exit_code
        Of the process, negative or above 128 where a signal ended it.
    status
        What its status file says; None where there is none.
    """
    by_code: dict[int, Cause] = {
        EXIT_CODES["finished"]: "finished",
        EXIT_CODES["interrupted"]: "interrupted",
        EXIT_CODES["diverged"]: "diverged",
        BAD_INPUT: "bad_input",
    }
    if exit_code in by_code:
        return by_code[exit_code]
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number in _KILLS:
        return "killed"
    if number in _ASKED:  # it was asked to leave before it could listen
        return "interrupted"
    if status is not None and status.state == "failed" and status.reason.startswith("out of memory"):
        return "out_of_memory"
    return "code_error"


def may_retry(cause: Cause, attempts: Sequence[dict[str, Any]], since: float, policy: RetryPolicy) -> bool:
    """Whether an attempt that ended so is followed by another one.

    Parameters
    ----------
    cause
        Of the attempt that just ended, whose `end` row is not among the attempts yet.
    attempts
        All rows of the run (`launch.journal`).
    since
        When the run was submitted last; earlier ends do not count.
    policy
        How often each cause is retried.
    """
    if cause in ("finished", "bad_input"):
        return False
    allowed = int(getattr(policy, cause))
    ends = [row for row in attempts if row["event"] == "end" and row["cause"] == cause and row["time"] >= since]
    return len(ends) < allowed


def given_up(attempts: Sequence[dict[str, Any]], since: float) -> bool:
    """Whether the last attempt since the submission ended for good."""
    ends = [row for row in attempts if row["event"] == "end" and row["time"] >= since]
    return any(row["cause"] != "finished" and not row["retry"] for row in ends[-1:])


def vanished(attempts: Sequence[dict[str, Any]], since: float) -> bool:
    """Whether the last attempt started and its end was never noted: its node went away with it."""
    rows = [row for row in attempts if row["event"] in ("start", "end") and row["time"] >= since]
    return bool(rows) and rows[-1]["event"] == "start"
