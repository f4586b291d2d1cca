"""Whether a run may start here and now: still wanted, an attempt left, and nobody writing it. Imports no trainer."""

from __future__ import annotations

import fcntl
import time

from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import SweepDirectory
from launch.journal.attempts import end_attempt
from launch.journal.journal import Journal
from launch.journal.retry import given_up, vanished

LOCK_WAIT_S = 600.0


def is_wanted(journal: Journal, name: str, uid: str) -> bool:
    """Whether a run is still to be done for this submission."""
    ledger = journal.ledger()
    ref = ledger.jobs.get(name)
    if name in ledger.cancelled:
        return False
    if ref is not None and ref.uid != uid:
        print(f"kv-align: {name} was submitted again since: left to its new job", flush=True)
        return False
    return True


def has_attempt_left(sweep: SweepDirectory, journal: Journal, name: str, uid: str) -> bool:
    """Whether the policy has an attempt left; notes how the last one ended if it vanished with its node."""
    setting = journal.setting()
    if setting is None:
        return True
    attempts = journal.attempts(name, uid)
    if vanished(attempts):
        status = RunDirectory(sweep.runs / name).status()
        left = status is not None and status.state == "interrupted"
        return end_attempt(sweep, journal, name, uid, "interrupted" if left else "node_failure", setting.cluster.retry)
    return not given_up(attempts)


def await_writer(directory: RunDirectory) -> bool:
    """Wait for an earlier attempt that still writes, on a node that was given up for dead but is not; whether it ended."""
    directory.path.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_WAIT_S
    with (directory.path / "run.lock").open("a") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.2)
    return False
