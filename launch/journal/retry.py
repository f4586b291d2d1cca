"""What ended an attempt, and whether the declared policy starts the run again. Pure functions of facts; no scheduler."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Any, Literal

from kv_align.runs.run_dir import EXIT_CODES, Status
from launch.cluster.schema import RetryPolicy

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
NODE_FAILURE = 74
"""Exit code (EX_IOERR) of a worker that found its node, its disk or its GPU broken."""
_KILLS = (signal.SIGKILL, signal.SIGHUP, signal.SIGINT)
_ASKED = (signal.SIGTERM, signal.SIGUSR2)
_NODE_FAILURES = re.compile(
    r"\[Errno (5|28|116)\]|os error (5|28|116)\b|No space left on device|Input/output error|Stale file handle"
    r"|uncorrectable ECC|NCCL error|\bnccl[A-Z]\w*Error|DistBackendError"
    r"|No CUDA GPUs are available|no CUDA-capable device is detected|CUDA-capable device\(s\) is/are busy or unavailable"
)
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
        NODE_FAILURE: "node_failure",
    }
    if exit_code in by_code:
        return by_code[exit_code]
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number in _KILLS:
        return "killed"
    if number in _ASKED:  # it was asked to leave before it could listen
        return "interrupted"
    if status is not None and status.state == "failed":
        if status.reason.startswith("out of memory"):
            return "out_of_memory"
        if is_node_failure(status.reason):
            return "node_failure"
    return "code_error"


def is_node_failure(reason: str) -> bool:
    """Whether an error speaks of its node, disk, network or GPU, and not of the code: elsewhere it may go well."""
    return _NODE_FAILURES.search(reason) is not None


def may_retry(cause: Cause, attempts: Sequence[dict[str, Any]], policy: RetryPolicy, step: int = 0) -> bool:
    """Whether an attempt that ended so is followed by another one.

    Parameters
    ----------
    cause
        Of the attempt that just ended, whose `end` row is not among the attempts yet.
    attempts
        Rows of the run (`launch.journal.journal`) since it was submitted last.
    policy
        How often each cause is retried.
    step
        That the run has come to: a run that gets on has not spent its node failures.
    """
    if cause in ("finished", "bad_input"):
        return False
    allowed = int(getattr(policy, cause))
    ends = [row for row in attempts if row["event"] == "end" and row["cause"] == cause]
    if cause == "node_failure":
        ends = [row for row in ends if row.get("step", 0) >= step]
    return len(ends) < allowed


def given_up(attempts: Sequence[dict[str, Any]]) -> bool:
    """Whether the last attempt of a submission ended for good."""
    ends = [row for row in attempts if row["event"] == "end"]
    return any(row["cause"] != "finished" and not row["retry"] for row in ends[-1:])


def ending(attempts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the last `end` row; empty without one."""
    return next((row for row in reversed(attempts) if row["event"] == "end"), {})


def vanished(attempts: Sequence[dict[str, Any]]) -> bool:
    """Whether the last attempt of a submission started and its end was never noted: its node went away with it."""
    rows = [row for row in attempts if row["event"] in ("start", "end")]
    return bool(rows) and rows[-1]["event"] == "start"
