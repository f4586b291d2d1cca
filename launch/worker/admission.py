"""Whether a run may start here and now: still wanted, an attempt left, and nobody writing it. Imports no trainer."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Collection

from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.journal.attempts import cause_of_vanished, end_attempt
from launch.journal.holds import held_runs
from launch.journal.journal import Journal
from launch.journal.pause import tell
from launch.journal.retry import given_up, vanished

LOCK_WAIT_S = 600.0


def is_wanted(journal: Journal, name: str, uid: str) -> bool:
    """Whether a run is still to be done for this submission."""
    ledger = journal.ledger()
    ref = ledger.jobs.get(name)
    if name in ledger.cancelled:
        return False
    if ref is not None and ref.uid != uid:
        tell(f"kv-align: {name} was submitted again since: left to its new job")
        return False
    return True


def is_held(plan: Plan, journal: Journal, name: str, broken: Collection[str] = ()) -> bool:
    """Whether a run that was never started waits for somebody (`launch.journal.holds`); it is left alone then.

    Parameters
    ----------
    plan, journal
        Of the sweep.
    name
        The run.
    broken
        Arms whose code failed and of which the journal does not know yet.
    """
    setting = journal.setting()
    if setting is None or RunDirectory(journal.sweep.runs / name).status_file.exists():
        return False
    hold_arm = setting.cluster.hold_arm
    reason = held_runs(plan, journal, journal.ledger(), hold_arm=hold_arm, among=[name]).get(name)
    if hold_arm and any(run.id == name and run.arm in broken for run in plan.runs):
        reason = "a run of its arm ended with an error in the code"
    if reason is not None:
        tell(f"kv-align: {name} is not started: {reason}")
    return reason is not None


def has_attempt_left(sweep: SweepDirectory, journal: Journal, name: str, uid: str) -> bool:
    """Whether the policy has an attempt left; notes how the last one ended if it vanished with its node."""
    setting = journal.setting()
    if setting is None:
        return True
    attempts = journal.attempts(name, uid)
    if vanished(attempts):
        cause = cause_of_vanished(RunDirectory(sweep.runs / name), attempts)
        return end_attempt(sweep, journal, name, uid, cause, setting.cluster.retry)
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
