"""Which runs wait for somebody: those of an arm with an error in the code, and those behind a canary that failed."""

from __future__ import annotations

from kv_align.runs.sweep_dir import Plan
from launch.journal.journal import Journal
from launch.journal.ledger import Ledger
from launch.journal.retry import ending, given_up


def held_runs(plan: Plan, journal: Journal, ledger: Ledger, *, hold_arm: bool) -> dict[str, str]:
    """Return the runs that are held, with the reason; submitting a run again lets it go.

    Parameters
    ----------
    plan, journal, ledger
        Of the sweep.
    hold_arm
        Whether a code error holds the runs of its arm that were submitted before it.
    """
    failed = {}
    for name, ref in ledger.jobs.items():
        attempts = journal.attempts(name, ref.uid)
        if given_up(attempts):
            failed[name] = ending(attempts)
    broken = {
        run.arm: (int(failed[run.id].get("submissions", 0)), run.id)
        for run in plan.runs
        if run.id in failed and failed[run.id]["cause"] in ("code_error", "bad_input")
    }
    order = {uid: number for number, uid in enumerate(ledger.submissions)}
    held = {}
    for run in plan.runs:
        at = ledger.jobs.get(run.id)
        if at is None or run.id in failed:
            continue
        # By what the failing run could see of the journal, since its clock may be another one.
        if hold_arm and run.arm in broken and order[at.uid] < broken[run.arm][0]:
            held[run.id] = f"held: {broken[run.arm][1]} ended with an error in the code"
        if at.submission.after is not None:
            canaries = [name for batch in ledger.submissions[at.submission.after].batches for name in batch]
            lost = [name for name in canaries if name in failed or name in ledger.cancelled]
            if lost:
                held[run.id] = f"held: the canary {lost[0]} did not finish"
    return held
