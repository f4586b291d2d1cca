"""What a run counts as: from what the scheduler knows, what its status file says, and what was asked for. Pure functions.

A run is done only when its status file says so and its artefacts are sound, which is known before. What the scheduler knows
of its job comes next; where it knows nothing, a fresh heartbeat means running, and a stale one that the run is lost.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kv_align.runs.run_dir import Status
from launch.executors.base import JobState
from launch.journal.ledger import Ledger

Found = Literal[
    "missing",
    "pending",
    "held",
    "blocked",
    "running",
    "preempted",
    "done",
    "failed",
    "diverged",
    "lost",
    "cancelled",
]
STATES: tuple[Found, ...] = (
    "done",
    "running",
    "pending",
    "preempted",
    "held",
    "blocked",
    "failed",
    "diverged",
    "lost",
    "cancelled",
    "missing",
)
WAITING: tuple[Found, ...] = ("pending", "held", "blocked", "running", "preempted")
STUCK: tuple[Found, ...] = ("held", "blocked")
"""These wait, and nothing comes of it until somebody does something."""
_LAG_S = 20.0  # accounting may say that a job waits some seconds after it began to run


@dataclass(frozen=True)
class RunState:
    """One run as it is now.

    Attributes
    ----------
    state
        `missing`: never submitted; `preempted`: interrupted, and its job waits for its next turn; `held`: somebody must let
        it go; `blocked`: it can never start as it is; `lost`: its job is gone without a result. The others say what they
        mean.
    reason
        One sentence where there is something to say.
    step, total_steps, eta_s
        Progress; 0 and None where it is not known.
    attempt, job, host
        Of the last start.
    training_s, overhead_s
        Of one that is done: time in training steps, and time that was none; 0 where it is not known.
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
    training_s: float = 0.0
    overhead_s: float = 0.0


@dataclass(frozen=True)
class HelperState:
    """A job of the sweep that is no run, as it is now; see `RunState`."""

    id: str
    state: Found
    reason: str
    job: str


@dataclass(frozen=True)
class Overview:
    """A sweep as it is now.

    Attributes
    ----------
    planned
        False for a plain Hydra multirun.
    helpers
        Its jobs that are no runs.
    notes
        What there is to say of the sweep as a whole, such as that it is paused.
    """

    path: str
    name: str
    planned: bool
    runs: tuple[RunState, ...]
    helpers: tuple[HelperState, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def jobs(self) -> list[RunState | HelperState]:
        """The runs, and the jobs that are no runs."""
        return [*self.runs, *self.helpers]

    def counts(self) -> dict[str, int]:
        """Return how many runs are in each state, without the states that none is in."""
        numbers = Counter(run.state for run in self.runs)
        return {state: numbers[state] for state in STATES if numbers[state]}

    def as_json(self) -> dict[str, Any]:
        """Return what `status --json` prints."""
        return {
            "sweep": self.path,
            "name": self.name,
            "planned": self.planned,
            "counts": self.counts(),
            "notes": list(self.notes),
            "helpers": [asdict(helper) for helper in self.helpers],
            "runs": [asdict(run) for run in self.runs],
        }


_ANY = "any"
_SIGNS = ("just now", "fresh")
_NOT_THERE = "its status file says finished, but its artefacts are not there: resume does it again"
_RULES: tuple[tuple[str, tuple[str, ...], str, Found, str], ...] = (
    # the scheduler's phase, the status file, the journal -> state, and its reason from what each of them says
    ("running", ("stale",), _ANY, "running", "no sign of life for {age}"),
    ("running", (), _ANY, "running", ""),
    (_ANY, _SIGNS, "cancelled", "cancelled", "leaving"),
    (_ANY, (), "cancelled", "cancelled", ""),
    (_ANY, ("none",), "not submitted", "missing", "not submitted"),
    ("unknown", ("none",), "not arrived", "missing", "its submission did not reach the scheduler"),
    ("held", (), _ANY, "held", "{job}"),
    ("blocked", (), _ANY, "blocked", "{job}"),
    ("pending", ("just now",), _ANY, "running", ""),  # accounting learns late that a job has begun to run
    ("pending", ("interrupted", "stale", *_SIGNS), _ANY, "preempted", "{job, or file}"),
    ("pending", (), _ANY, "pending", "{job}"),
    (_ANY, ("diverged",), _ANY, "diverged", "{file}"),
    (_ANY, ("failed",), _ANY, "failed", "{file}"),
    (_ANY, ("finished",), _ANY, "failed", _NOT_THERE),
    ("ended", (), _ANY, "failed", "{job and file}"),
    ("unknown", _SIGNS, _ANY, "running", "its job is unknown; it still gives signs of life"),
    (_ANY, ("none",), _ANY, "lost", "{job; }it never started"),
    (_ANY, (), _ANY, "lost", "{job; }last sign of life {age} ago"),
)
"""The first row that fits is the truth; no status file, `()`, fits any."""


def judge(
    name: str, status: Status | None, job: JobState | None, ledger: Ledger, stale_after_s: float
) -> tuple[Found, str]:
    """Return the state of a run that is not done, and why: the first row of `_RULES` that fits.

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
    phase, of_job = ("unknown", "") if job is None else (job.phase, job.reason)
    age_s, of_file = (0.0, "") if status is None else (time.time() - status.updated, status.reason)
    file, submitted = _as_file_says(status, age_s, stale_after_s), _as_journal_says(name, ledger)
    reasons = {
        "{age}": _duration(age_s),
        "{job}": of_job,
        "{file}": of_file,
        "{job, or file}": of_job or of_file,
        "{job and file}": " and ".join(reason for reason in (of_job, of_file) if reason),
        "{job; }": f"{of_job}; " if of_job else "",
    }
    for phases, files, journal, state, reason in _RULES:
        if phases in (_ANY, phase) and (not files or file in files) and journal in (_ANY, submitted):
            return state, re.sub(r"\{.*?\}", lambda match: reasons[match[0]], reason)
    raise AssertionError("the last row fits all")


def _as_file_says(status: Status | None, age_s: float, stale_after_s: float) -> str:
    """Return the state in a status file, `none` without one; of a run that is running, how old its heartbeat is."""
    if status is None:
        return "none"
    if status.state != "running":
        return status.state
    return "stale" if age_s >= stale_after_s else "just now" if age_s < _LAG_S else "fresh"


def _as_journal_says(name: str, ledger: Ledger) -> str:
    if name in ledger.cancelled:
        return "cancelled"
    if name not in ledger.jobs:
        return "not submitted"
    return "not arrived" if ledger.jobs[name].job is None else "submitted"


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
        # They wait for somebody to mend what is wrong, which is what asking for a resume says.
        return run.state in STUCK
    return run.state in ("missing", "failed", "lost", "cancelled") or (retry == "all" and run.state == "diverged")


def counts_in_words(counts: dict[str, int]) -> str:
    """Return `3 done, 1 running`."""
    return ", ".join(f"{number} {state}" for state, number in counts.items()) or "no runs"


def select(names: Sequence[str], wanted: str) -> list[str]:
    """Return the name that this is, else those that have it as their first words, else the one that starts so.

    `baseline-kv-seed1` is not the start of `baseline-kv-seed10-...` in that sense: words end where a `-` follows.
    """
    starts = [name for name in names if name.startswith(wanted)]
    words = [name for name in starts if wanted.endswith("-") or name.startswith(f"{wanted}-")]
    return [wanted] if wanted in names else words or (starts if len(starts) == 1 else [])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
