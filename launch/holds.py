"""Which runs wait for somebody: those of an arm with an error in the code, and those behind a canary that failed."""

from __future__ import annotations

from kv_align.plans import Plan
from launch.journal import Journal, Ledger
from launch.retry import given_up


def held_runs(plan: Plan, journal: Journal, ledger: Ledger, *, hold_arm: bool) -> dict[str, str]:
    """Return the runs that are held, with the reason; submitting a run again lets it go.

    Parameters
    ----------
    plan, journal, ledger
        Of the sweep.
    hold_arm
        Whether a code error holds the runs of its arm that were submitted before it.
    """
    failed: dict[str, dict[str, object]] = {}
    for name, at in ledger.places.items():
        attempts = journal.attempts(name)
        if given_up(attempts, at.submission.created):
            failed[name] = attempts[-1]
    broken = {
        run.arm: (failed[run.id]["time"], run.id)
        for run in plan.runs
        if run.id in failed and failed[run.id].get("cause") in ("code_error", "bad_input")
    }
    held = {}
    for run in plan.runs:
        place = ledger.places.get(run.id)
        if place is None or run.id in failed:
            continue
        if hold_arm and run.arm in broken and place.submission.created < float(str(broken[run.arm][0])):
            held[run.id] = f"held: {broken[run.arm][1]} ended with an error in the code"
        if place.submission.after is not None:
            canaries = [name for batch in ledger.submissions[place.submission.after].batches for name in batch]
            lost = [name for name in canaries if name in failed or name in ledger.cancelled]
            if lost:
                held[run.id] = f"held: the canary {lost[0]} did not finish"
    return held
