"""What a run counts as: from what the scheduler knows, what its status file says, and what was asked for. Pure functions.

A run is done only when its status file says so and its artefacts are sound, which is known before. What the scheduler knows
of its job comes next; where it knows nothing, a fresh heartbeat means running, and a stale one that the run is lost.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kv_align.runs.run_dir import Status
from launch.executors.base import JobState
from launch.journal.ledger import Ledger

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


def counts_in_words(counts: dict[str, int]) -> str:
    """Return `3 done, 1 running`."""
    return ", ".join(f"{number} {state}" for state, number in counts.items()) or "no runs"


def select(runs: Sequence[RunState], wanted: str) -> list[RunState]:
    """Return the run with this id, else those whose id has it as its first words, else the one that starts so.

    `baseline-kv-seed1` is not the start of `baseline-kv-seed10-...` in that sense: words end where a `-` follows.
    """
    exact = [run for run in runs if run.id == wanted]
    starts = [run for run in runs if run.id.startswith(wanted)]
    words = [run for run in starts if wanted.endswith("-") or run.id.startswith(f"{wanted}-")]
    return exact or words or (starts if len(starts) == 1 else [])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
