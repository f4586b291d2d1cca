"""What the journal of a sweep says: what was submitted where, and what was cancelled since. A pure function of its rows."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

PREPARE, REPORT = "prepare", "report"
HELPERS = (PREPARE, REPORT)
"""Jobs of a sweep that are no runs: names in the journal as the ids of runs are, which these cannot be."""
UNDER_WAY_S = 120.0
"""So long a call of the scheduler may still be on its way after whoever made it was killed."""


@dataclass(frozen=True)
class Submission:
    """One call of the scheduler.

    Attributes
    ----------
    uid
        Its name in the journal, and part of its jobs' names.
    created
        Seconds since the epoch.
    batches
        `batches[i]` are the ids of the runs that its element i does one after the other; or the name of one helper job.
    after
        The submission whose runs must have succeeded first (a canary).
    prepare
        The submission of the prepare job that must have succeeded first.
    command
        Of a helper job.
    submitter
        `host`, `pid` and `born` of the process that called the scheduler; empty in journals of version 0.1.0.
    job
        The scheduler's id, None while that is not known; a single batch is no array, so it has no index.
    refused
        Whether the scheduler said that it takes none of it.
    """

    uid: str
    created: float
    batches: tuple[tuple[str, ...], ...]
    after: str | None = None
    prepare: str | None = None
    command: str | None = None
    submitter: dict[str, Any] = field(default_factory=dict)
    job: str | None = None
    refused: bool = False

    def job_of(self, index: int) -> str:
        """Return the scheduler's id of one element."""
        assert self.job is not None
        return self.job if len(self.batches) == 1 else f"{self.job}_{index}"

    @property
    def names(self) -> list[str]:
        """The runs, or the helper job, that it is for."""
        return [name for batch in self.batches for name in batch]

    @property
    def under_way(self) -> bool:
        """Whether it may still become a job that nobody has heard of."""
        return self.job is None and not self.refused and abs(time.time() - self.created) < UNDER_WAY_S


@dataclass(frozen=True)
class JobRef:
    """Where a run, or a helper job, was submitted last."""

    submission: Submission
    index: int

    @property
    def job(self) -> str | None:
        """The scheduler's id; None where it is not known."""
        return None if self.submission.job is None else self.submission.job_of(self.index)

    @property
    def uid(self) -> str:
        """Of the submission."""
        return self.submission.uid


@dataclass
class Ledger:
    """The journal, read: where each run and helper job was submitted last, and which of them were cancelled after it."""

    submissions: dict[str, Submission] = field(default_factory=dict)
    jobs: dict[str, JobRef] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)

    @property
    def runs(self) -> dict[str, JobRef]:
        """Where each run was submitted last."""
        return {name: ref for name, ref in self.jobs.items() if name not in HELPERS}


def read_ledger(rows: Iterable[dict[str, Any]]) -> Ledger:
    """Read the rows of a journal, in the order in which they were written."""
    ledger = Ledger()
    for row in rows:
        if row["event"] == "cancelled":
            ledger.cancelled.update(row["runs"])
        elif row["event"] == "submitting":
            submission = Submission(
                row["uid"],
                row["time"],
                tuple(tuple(batch) for batch in row["batches"]),
                row["after"],
                row.get("prepare"),
                row.get("command"),
                row.get("submitter", {}),
            )
            ledger.submissions[submission.uid] = submission
            for index, batch in enumerate(submission.batches):
                for name in batch:
                    ledger.jobs[name] = JobRef(submission, index)
                    ledger.cancelled.discard(name)
        elif row["event"] in ("submitted", "refused"):
            known = ledger.submissions[row["uid"]]
            submission = replace(known, job=row.get("job"), refused=row["event"] == "refused")
            ledger.submissions[submission.uid] = submission
            for name in submission.names:
                # It may have been submitted again before the job of this one was found out.
                if ledger.jobs[name].uid == submission.uid:
                    ledger.jobs[name] = replace(ledger.jobs[name], submission=submission)
    return ledger
