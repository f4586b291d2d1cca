"""What ended an attempt, and whether the declared policy starts the run again. Pure functions of facts; no scheduler."""

from __future__ import annotations

import errno
import os
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
    "disk_full",
    "killed",
    "out_of_memory",
    "code_error",
    "bad_input",
    "diverged",
]
BAD_INPUT = 2
NODE_FAILURE = 74
"""Exit code (EX_IOERR) of a worker that found its node, its disk or its GPU broken."""
DISK_FULL = 73
"""Exit code (EX_CANTCREAT) of a worker that found the disk full."""
_LONGEST_BACKOFF_S = 1800.0
_KILLS = (signal.SIGKILL, signal.SIGHUP, signal.SIGINT)
_ASKED = (signal.SIGTERM, signal.SIGUSR2)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EROFS, errno.ENODEV, errno.ENXIO),
    *(errno.ENOTCONN, errno.ETIMEDOUT, errno.EADDRINUSE, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EPIPE),
)


def _errors(numbers: tuple[int, ...]) -> str:
    """Return what Python, Rust and C call these errors in a message, as a pattern."""
    codes = "|".join(map(str, numbers))
    return rf"\[Errno ({codes})\]|os error ({codes})\b|errno: ({codes})\b|" + "|".join(
        re.escape(os.strerror(number)) for number in numbers
    )


_DISK_FULL = re.compile(_errors(_FULL), re.IGNORECASE)
_NODE_FAILURES = re.compile(
    _errors(_BROKEN) + r"|uncorrectable ECC|NCCL error|\bnccl[A-Z]\w*Error|DistBackendError|DistNetworkError"
    r"|connection (was )?closed by|closed the connection|address already in use|remote end closed"
    r"|No CUDA GPUs are available|no CUDA-capable device is detected|CUDA-capable device\(s\) is/are busy or unavailable",
    re.IGNORECASE,
)
IN_WORDS: dict[str, str] = {
    "interrupted": "interrupted",
    "node_failure": "its node failed, or it could not start there",
    "disk_full": "the disk is full",
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
        DISK_FULL: "disk_full",
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
        return cause_of(exit_code_of(status.reason), None)
    return "code_error"


def exit_code_of(reason: str) -> int:
    """Return the exit code for an error: `DISK_FULL`; `NODE_FAILURE` where it speaks of its node, disk, network or GPU and
    may go well elsewhere; else that of a failed run, since its code is to blame.
    """
    if _DISK_FULL.search(reason):
        return DISK_FULL
    return NODE_FAILURE if _NODE_FAILURES.search(reason) else EXIT_CODES["failed"]


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
    if cause == "disk_full":
        return True  # the sweep is paused, and no run has failed
    allowed = int(getattr(policy, cause))
    ends = [row for row in attempts if row["event"] == "end" and row["cause"] == cause and not row.get("shared")]
    if cause == "node_failure":
        ends = [row for row in ends if row.get("step", 0) >= step]
    return len(ends) < allowed


def delay_s(cause: Cause, attempts: Sequence[dict[str, Any]], policy: RetryPolicy) -> float:
    """Return how long the next attempt waits; see `may_retry` for the parameters."""
    if cause == "disk_full":
        return policy.pause_s
    if cause != "node_failure":
        return 0.0
    before = sum(row["event"] == "end" and row["cause"] == "node_failure" for row in attempts)
    return float(min(policy.backoff_s * 2.0**before, _LONGEST_BACKOFF_S))


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
