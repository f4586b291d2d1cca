"""The truth about each run: what the scheduler knows, what the status file says, and whether the artefacts are there.

A run is done only when its status file says so and its artefacts are sound. What the scheduler knows of its job comes next;
where it knows nothing, a fresh heartbeat in the status file means running, and a stale one that the run is lost.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kv_align.plans import SweepDirectory
from kv_align.runs import RunDirectory, Status, read_rows
from launch.executors.executor import JobState, make_executor
from launch.journal import Journal, Ledger
from launch.retry import IN_WORDS, given_up

Found = Literal["missing", "pending", "held", "running", "preempted", "done", "failed", "diverged", "lost", "cancelled"]
STATES: tuple[Found, ...] = (
    "done",
    "running",
    "pending",
    "preempted",
    "held",
    "failed",
    "diverged",
    "lost",
    "cancelled",
    "missing",
)
WAITING: tuple[Found, ...] = ("pending", "held", "running", "preempted")
_MULTIRUN_STALE_S = 600.0
_LAG_S = 20.0  # accounting may say that a job waits some seconds after it began to run


@dataclass(frozen=True)
class RunState:
    """One run as it is now.

    Attributes
    ----------
    state
        `missing`: never submitted; `preempted`: interrupted, and its job waits for its next turn; `lost`: its job is gone
        without a result. The others say what they mean.
    reason
        One sentence where there is something to say.
    step, total_steps, eta_s
        Progress; 0 and None where it is not known.
    attempt, job, host
        Of the last start.
    """

    id: str
    arm: str
    loss: str
    seed: int
    state: Found
    reason: str
    step: int
    total_steps: int
    eta_s: float | None
    attempt: int
    job: str
    host: str


@dataclass(frozen=True)
class Overview:
    """A sweep as it is now; `planned` is False for a plain Hydra multirun."""

    path: str
    name: str
    planned: bool
    runs: tuple[RunState, ...]

    def counts(self) -> dict[str, int]:
        """Return how many runs are in each state, without the states that none is in."""
        found = Counter(run.state for run in self.runs)
        return {state: found[state] for state in STATES if found[state]}

    def as_json(self) -> dict[str, Any]:
        """Return what `status --json` prints."""
        return {
            "sweep": self.path,
            "name": self.name,
            "planned": self.planned,
            "counts": self.counts(),
            "runs": [asdict(run) for run in self.runs],
        }


def overview(sweep: SweepDirectory) -> Overview:
    """Look at a sweep, with at most one call of the scheduler."""
    plan = sweep.plan()
    if plan is None:
        return _of_multirun(sweep)
    journal = Journal(sweep)
    setting, ledger = journal.setting(), journal.ledger()
    runs = []
    statuses = {run.id: sweep.run(run).observed() for run in plan.runs}
    complete = {run.id for run in plan.runs if _finished(statuses[run.id]) and sweep.run(run).is_complete()}
    states: dict[str, JobState] = {}
    if setting is not None:
        open_places = {name: place for name, place in ledger.places.items() if name not in complete}
        states = make_executor(sweep, setting).states(open_places) if open_places else {}
    for run in plan.runs:
        status = statuses[run.id]
        if run.id in complete:
            state: Found = "done"
            reason = ""
        else:
            stale_after_s = _MULTIRUN_STALE_S if setting is None else setting.cluster.stale_after_s
            state, reason = judge(run.id, status, states.get(run.id), ledger, stale_after_s)
            if state in ("failed", "lost") and not reason:
                reason = _noted(journal, run.id) or f"see: python -m launch logs {sweep.path} {run.id}"
        place = ledger.places.get(run.id)
        job = (place.job or "") if place is not None else ""
        runs.append(_row(run.id, run.arm, run.loss, run.seed, state, reason, status, job, sweep.run(run)))
    return Overview(str(sweep.path), plan.name, True, tuple(runs))


def judge(
    name: str, status: Status | None, job: JobState | None, ledger: Ledger, stale_after_s: float
) -> tuple[Found, str]:
    """Return the state of a run that is not done, and why.

    Parameters
    ----------
    name
        The run's id.
    status
        Its status file; None where there is none that can be read.
    job
        What the scheduler knows of it; None: nothing.
    ledger
        What was submitted and cancelled.
    stale_after_s
        The age from which a heartbeat counts as none.
    """
    phase = None if job is None else job.phase
    said = "" if status is None else status.reason
    age_s = None if status is None else time.time() - status.updated
    fresh = status is not None and status.state == "running" and age_s is not None and age_s < stale_after_s
    if phase == "running":
        if status is not None and status.state == "running" and not fresh:
            return "running", f"no sign of life for {_duration(age_s or 0.0)}"
        return "running", ""
    if name in ledger.cancelled:
        return "cancelled", "" if not fresh else "leaving"
    if status is None and name not in ledger.places:
        return "missing", "not submitted"
    if status is None and job is None and ledger.places[name].job is None:
        return "missing", "its submission did not reach the scheduler"
    if job is not None and phase == "held":
        return "held", job.reason
    if job is not None and phase == "pending":
        if fresh and age_s is not None and age_s < _LAG_S:
            return "running", ""
        if status is not None and status.state in ("interrupted", "running"):
            return "preempted", job.reason or said
        return "pending", job.reason
    if status is not None and status.state == "diverged":
        return "diverged", said
    if status is not None and status.state == "failed":
        return "failed", said
    if status is not None and status.state == "finished":
        return "failed", "its status file says finished, but its artefacts are not there: resume does it again"
    if job is not None and phase == "ended":
        return "failed", " and ".join(each for each in (job.reason, said) if each)
    if fresh and phase != "gone":
        return "running", "its job is unknown; it still gives signs of life"
    why = f"{job.reason}; " if job is not None and job.reason else ""
    since = f"last sign of life {_duration(age_s)} ago" if age_s is not None else "it never started"
    return "lost", f"{why}{since}"


def needs(run: RunState, retry: str | None) -> bool:
    """Whether `resume` submits a run again.

    Parameters
    ----------
    run
        As it is now.
    retry
        None: whatever is not done, without diverged ones; `failed` or `diverged`: these alone; `all`: both.
    """
    if retry in ("failed", "diverged"):
        return run.state == retry
    if run.state in WAITING:
        # Held runs wait for somebody to mend their arm, which is what asking for a resume says.
        return run.state == "held"
    return run.state in ("missing", "failed", "lost", "cancelled") or (retry == "all" and run.state == "diverged")


def _of_multirun(sweep: SweepDirectory) -> Overview:
    """A plain Hydra multirun: the run directories that are there, and what Slurm knows of their jobs."""
    from launch.executors.slurm_query import job_states

    found = [(directory, directory.observed()) for directory in sweep.found_runs()]
    unfinished = [status.job for directory, status in found if status and status.job and not directory.is_complete()]
    known = job_states(unfinished, accounting=True) if unfinished else {}
    runs = []
    for directory, status in found:
        if status is None:
            continue
        name = str(directory.path.relative_to(sweep.path))
        if directory.is_complete():
            state: Found = "done"
            reason = ""
        else:
            state, reason = judge(name, status, known.get(status.job), Ledger(), _MULTIRUN_STALE_S)
        runs.append(_row(name, status.arm, status.loss, status.seed, state, reason, status, status.job, directory))
    return Overview(str(sweep.path), sweep.path.name, False, tuple(runs))


def _row(
    name: str,
    arm: str,
    loss: str,
    seed: int,
    state: Found,
    reason: str,
    status: Status | None,
    job: str,
    directory: RunDirectory,
) -> RunState:
    if status is None:
        return RunState(name, arm, loss, seed, state, reason, 0, 0, None, 0, job, "")
    eta_s = _eta_s(directory, status) if state == "running" else None
    progress = (status.step, status.total_steps, eta_s, status.attempt)
    return RunState(name, arm, loss, seed, state, reason, *progress, job or status.job, status.host)


def _eta_s(directory: RunDirectory, status: Status) -> float | None:
    """Time that the steps left will take, at the pace of those done, from the last logged row."""
    if not directory.metrics_file.exists():
        return None
    rows = read_rows(directory.metrics_file)[-1:]
    if not rows or "elapsed_s" not in rows[0] or not rows[0]["step"]:
        return None
    return (status.total_steps - status.step) * float(rows[0]["elapsed_s"]) / int(rows[0]["step"])


def _finished(status: Status | None) -> bool:
    return status is not None and status.state == "finished"


def _noted(journal: Journal, name: str) -> str:
    """What the run's attempts say about their end, where its status file could not."""
    attempts = journal.attempts(name)
    notes = [row["reason"] for row in attempts if row["event"] == "note"]
    if notes:
        return str(notes[-1])
    place = journal.ledger().places.get(name)
    if place is not None and given_up(attempts, place.submission.created):
        return IN_WORDS.get(attempts[-1]["cause"], "")
    return ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def counts_in_words(counts: dict[str, int]) -> str:
    """Return `3 done, 1 running`."""
    return ", ".join(f"{number} {state}" for state, number in counts.items()) or "no runs"


def select(runs: Sequence[RunState], wanted: str) -> list[RunState]:
    """Return the runs whose id is, or starts with, what was asked for."""
    exact = [run for run in runs if run.id == wanted]
    return exact or [run for run in runs if run.id.startswith(wanted)]
