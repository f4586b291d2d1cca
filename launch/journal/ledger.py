"""What the journal of a sweep says: which runs were submitted where, and which were cancelled since. A pure function."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

UNDER_WAY_S = 120.0
"""So long a call of the scheduler may still be on its way after whoever made it was killed."""


@dataclass(frozen=True)
class Submission:
    """One call of the scheduler: `batches[i]` are the ids of the runs that its element i does one after the other.

    `job` is the scheduler's id, None while that is not known; a single batch is no array, so it has no index. `after` is the
    submission whose runs must have succeeded first. `invalid_value` where the scheduler said that it takes none of it.
    """

    uid: str
    created: float
    batches: tuple[tuple[str, ...], ...]
    after: str | None = None
    job: str | None = None
    refused: bool = False

    def job_of(self, index: int) -> str:
        """Return the scheduler's id of one element."""
        assert self.job is not None
        return self.job if len(self.batches) == 1 else f"{self.job}_{index}"

    @property
    def under_way(self) -> bool:
        """Whether it may still become a job that nobody has heard of."""
        return self.job is None and not self.refused and abs(time.time() - self.created) < UNDER_WAY_S


@dataclass(frozen=True)
class JobRef:
    """Where a run was submitted last."""

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
    """The journal, read: where each run was submitted last, and the runs that were cancelled after it."""

    submissions: dict[str, Submission] = field(default_factory=dict)
    jobs: dict[str, JobRef] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)


def read_ledger(rows: Iterable[dict[str, Any]]) -> Ledger:
    """Read the rows of a journal, in the order in which they were written."""
    ledger = Ledger()
    for row in rows:
        if row["event"] == "cancelled":
            ledger.cancelled.update(row["runs"])
        elif row["event"] == "submitting":
            batches = tuple(tuple(batch) for batch in row["batches"])
            submission = Submission(row["uid"], row["time"], batches, row["after"])
            ledger.submissions[submission.uid] = submission
            for index, batch in enumerate(batches):
                for run in batch:
                    ledger.jobs[run] = JobRef(submission, index)
                    ledger.cancelled.discard(run)
        elif row["event"] in ("submitted", "refused"):
            known = ledger.submissions[row["uid"]]
            submission = replace(known, job=row.get("job"), refused=row["event"] == "refused")
            ledger.submissions[submission.uid] = submission
            for run in (name for batch in submission.batches for name in batch):
                # It may have been submitted again before the job of this one was found out.
                if ledger.jobs[run].uid == submission.uid:
                    ledger.jobs[run] = replace(ledger.jobs[run], submission=submission)
    return ledger
