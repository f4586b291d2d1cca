"""Which runs wait for somebody: those of an arm with an error in the code, and those behind a job that must succeed first."""

from __future__ import annotations

from collections.abc import Collection

from kv_align.runs.program import program
from kv_align.runs.sweep_dir import Plan
from launch.journal.journal import Journal
from launch.journal.ledger import PREPARE, Ledger
from launch.journal.retry import ending, given_up


def held_runs(
    plan: Plan, journal: Journal, ledger: Ledger, *, hold_arm: bool, among: Collection[str] | None = None
) -> dict[str, str]:
    """Return the runs that are held, with the reason; submitting a run again lets it go.

    Parameters
    ----------
    plan, journal, ledger
        Of the sweep.
    hold_arm
        Whether a code error holds the runs of its arm that were submitted before it.
    among
        The runs that are asked about; None: all. Of few, few files are read.
    """
    asked = [run for run in plan.runs if (among is None or run.id in among) and run.id in ledger.jobs]
    arms = {run.arm for run in asked}
    canaries = {
        name
        for run in asked
        for after in [ledger.jobs[run.id].submission.after]
        if after is not None
        for name in ledger.submissions[after].names
    }
    failed, attempted = {}, journal.attempted()
    for run in plan.runs:
        if run.id in attempted and run.id in ledger.jobs and (run.arm in arms or run.id in canaries):
            attempts = journal.attempts(run.id, ledger.jobs[run.id].uid)
            if given_up(attempts):
                failed[run.id] = ending(attempts)
    broken = {
        run.arm: (int(failed[run.id].get("submissions", 0)), run.id)
        for run in plan.runs
        if run.id in failed and failed[run.id]["cause"] in ("code_error", "bad_input")
    }
    order = {uid: number for number, uid in enumerate(ledger.submissions)}
    held = {}
    for run in asked:
        submission = ledger.jobs[run.id].submission
        if run.id in failed:
            continue
        # By what the failing run could see of the journal, since its clock may be another one.
        if hold_arm and run.arm in broken and order[submission.uid] < broken[run.arm][0]:
            held[run.id] = f"{broken[run.arm][1]} ended with an error in the code: mend it and resume"
        if submission.after is not None:
            lost = [
                name
                for name in ledger.submissions[submission.after].names
                if name in failed or name in ledger.cancelled
            ]
            if lost:
                held[run.id] = f"the canary {lost[0]} did not finish: resume queues both again"
        if submission.prepare is not None:
            reason = _prepare_failed(journal, ledger, submission.prepare)
            if reason:
                held[run.id] = reason
    return held


def _prepare_failed(journal: Journal, ledger: Ledger, uid: str) -> str:
    attempts = journal.attempts(PREPARE, uid)
    if given_up(attempts):
        return (
            f"its prepare job ended with exit code {ending(attempts)['exit_code']} (see: {program('launch')} logs "
            f"{journal.sweep.path} {PREPARE}); mend cluster.prepare and resume"
        )
    if PREPARE in ledger.cancelled and ledger.jobs[PREPARE].uid == uid:
        return "its prepare job was cancelled; resume queues both again"
    return ""
