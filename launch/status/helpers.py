"""What there is to see of a sweep beside its runs: its helper jobs, what they and failed starts printed, and what to know."""

from __future__ import annotations

from pathlib import Path

from kv_align.runs.program import program
from launch.cluster.setting import Setting
from launch.executors.base import JobState
from launch.journal.journal import Journal
from launch.journal.ledger import Ledger
from launch.journal.pause import pause_in_words
from launch.journal.retry import ending
from launch.status.judgement import Found, HelperState


def notes(journal: Journal, setting: Setting | None) -> tuple[str, ...]:
    """Return what there is to say of a sweep as a whole."""
    path = journal.sweep.path
    moved = ""
    if setting is not None and setting.home and Path(setting.home) != path:
        moved = (
            f"the sweep was moved from {setting.home}, where the jobs that were queued before look for it: run "
            f"{program('launch')} resume {path}"
        )
    gone = ""
    if setting is not None and not Path(setting.code, "kv_align").is_dir():
        gone = (
            f"the code that its jobs run is not in {setting.code} any more: put it back, or run resume from a checkout"
        )
    lost = "" if setting is not None else journal.lost_setting()
    return tuple(note for note in (pause_in_words(journal), lost, moved, gone) if note)


def helper_state(journal: Journal, ledger: Ledger, name: str, job: JobState | None) -> HelperState:
    """What a job that is no run counts as: by what it noted, else by what the scheduler knows of it."""
    ref = ledger.jobs[name]
    end = ending(journal.attempts(name, ref.uid))
    state: Found
    if end:
        state = "done" if end["cause"] == "finished" else "failed"
        reason = (
            ""
            if state == "done"
            else f"exit code {end['exit_code']}; see: {program('launch')} logs {journal.sweep.path} {name}"
        )
    elif job is not None and job.phase in ("pending", "held", "blocked", "running"):
        state, reason = job.phase, job.reason
    elif name in ledger.cancelled:
        state, reason = "cancelled", ""
    elif job is not None and job.phase == "ended":
        state, reason = "failed", job.reason or last_words(journal, ref.job)
    else:
        state, reason = "lost", "" if job is None else job.reason
    return HelperState(name, state, reason, ref.job or "")


def last_words(journal: Journal, job: str | None) -> str:
    """Return the last line that a job printed itself, where it did not get as far as its run."""
    for file in sorted((journal.folder / "jobs").glob(f"{job}_*_log.*")) if job else ():
        lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
        own = [line for line in lines if not line.startswith("kv-align: ")]
        if own:
            return f"its job ended before it could start: {own[-1]}"
    return ""
