"""What launch itself keeps in a sweep directory: what was submitted as which job, what was cancelled, how attempts ended.

    launch/cluster.json       the cluster's settings, frozen with the plan (`Setting`)
    launch/journal.jsonl      append-only, written with the sweep's lock held: submitting, submitted, cancelled
    launch/attempts/<id>.jsonl  append-only, written by whoever runs that run: start, note, end
    launch/lock               held by the command that changes the sweep; released by the operating system if that dies
    logs/<id>.log             what a run printed, all attempts one after the other

A `submitting` row is written before the scheduler is called and `submitted` after it, so that a submitter that dies between
the two leaves a trace by which the next one finds the job.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kv_align.errors import ConfigError
from kv_align.plans import SweepDirectory
from kv_align.runs import read_json, write_json
from launch.cluster import AnyCluster, validate_cluster

_WAIT_S = 120.0


@dataclass(frozen=True)
class Setting:
    """How a sweep is executed.

    Attributes
    ----------
    cluster
        The settings.
    resources
        What single arms have otherwise, by arm.
    accounting
        Whether the scheduler keeps finished jobs (sacct); found out when the sweep was submitted.
    code
        The folder that jobs import the packages from.
    """

    cluster: AnyCluster
    resources: dict[str, dict[str, Any]]
    accounting: bool
    code: str


@dataclass(frozen=True)
class Submission:
    """One call of the scheduler: `batches[i]` are the ids of the runs that its element i does one after the other.

    `job` is the scheduler's id, None while that is not known; a single batch is no array, so it has no index. `after` is the
    submission whose runs must have succeeded first.
    """

    uid: str
    created: float
    batches: tuple[tuple[str, ...], ...]
    after: str | None = None
    job: str | None = None

    def job_of(self, index: int) -> str:
        """Return the scheduler's id of one element."""
        assert self.job is not None
        return self.job if len(self.batches) == 1 else f"{self.job}_{index}"


@dataclass(frozen=True)
class Place:
    """Where a run was submitted last."""

    submission: Submission
    index: int

    @property
    def job(self) -> str | None:
        """The scheduler's id; None where it is not known."""
        return None if self.submission.job is None else self.submission.job_of(self.index)


@dataclass
class Ledger:
    """The journal, read: the last place of each run, and the runs that were cancelled after it."""

    submissions: dict[str, Submission] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)


class Journal:
    """Reads and writes what is described above; creates nothing until something is written.

    Parameters
    ----------
    sweep
        The sweep directory.
    """

    def __init__(self, sweep: SweepDirectory) -> None:
        self.sweep = sweep
        self.folder = sweep.path / "launch"
        self.logs = sweep.path / "logs"
        self._file = self.folder / "journal.jsonl"
        self._setting_file = self.folder / "cluster.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the sweep for a change; waits for another command that holds it.

        Raises
        ------
        ConfigError
            If that takes longer than two minutes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _WAIT_S
        with (self.folder / "lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ConfigError(
                            f"{self.sweep.path} is being changed by another launch command for more than "
                            f"{_WAIT_S:.0f} s: wait for it, or end it."
                        ) from None
                    time.sleep(0.1)
            yield

    def setting(self) -> Setting | None:
        """Return how the sweep is executed; None before it was submitted."""
        raw = read_json(self._setting_file)
        if raw is None:
            return None
        return Setting(validate_cluster(raw["cluster"]), raw["resources"], raw["accounting"], raw["code"])

    def write_setting(self, setting: Setting) -> None:
        """Freeze how the sweep is executed."""
        content = {"resources": setting.resources, "accounting": setting.accounting, "code": setting.code}
        write_json(self._setting_file, {"cluster": setting.cluster.model_dump(), **content})

    def submitting(self, batches: Sequence[Sequence[str]], uid: str, after: str | None = None) -> Submission:
        """Note that the scheduler is about to be called; the lock is held."""
        submission = Submission(uid, time.time(), tuple(tuple(batch) for batch in batches), after)
        row = {"event": "submitting", "uid": uid, "time": submission.created, "after": after}
        append(self._file, {**row, "batches": submission.batches})
        return submission

    def submitted(self, uid: str, job: str) -> None:
        """Note what the scheduler calls it; the lock is held."""
        append(self._file, {"event": "submitted", "uid": uid, "time": time.time(), "job": job})

    def cancelled(self, runs: Sequence[str]) -> None:
        """Note that runs are not to be done; the lock is held."""
        append(self._file, {"event": "cancelled", "time": time.time(), "runs": list(runs)})

    def ledger(self) -> Ledger:
        """Read the journal."""
        ledger = Ledger()
        for row in read(self._file):
            if row["event"] == "cancelled":
                ledger.cancelled.update(row["runs"])
                continue
            if row["event"] == "submitting":
                batches = tuple(tuple(batch) for batch in row["batches"])
                submission = Submission(row["uid"], row["time"], batches, row["after"])
            else:
                submission = replace(ledger.submissions[row["uid"]], job=row["job"])
            ledger.submissions[submission.uid] = submission
            for index, batch in enumerate(submission.batches):
                for run in batch:
                    ledger.places[run] = Place(submission, index)
                    ledger.cancelled.discard(run)
        return ledger

    def log_file(self, run: str) -> Path:
        """Return where the output of a run is written."""
        return self.logs / f"{run}.log"

    def attempts(self, run: str) -> list[dict[str, Any]]:
        """Return the rows of a run's attempts: `event` start, note or end, and `time`."""
        return read(self._attempts_file(run))

    def add_attempt(self, run: str, event: str, **facts: Any) -> None:
        """Append a row to a run's attempts."""
        append(self._attempts_file(run), {"event": event, "time": time.time(), **facts})

    def _attempts_file(self, run: str) -> Path:
        return self.folder / "attempts" / f"{run}.jsonl"


def append(file: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and see that it reaches the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    with file.open("ab") as stream:
        if stream.tell() and not _ends_line(file):
            line = b"\n" + line  # a writer was killed within its line; only that line is lost
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file, without a line that a kill left incomplete."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "event" in row:
            rows.append(row)
    return rows


def _ends_line(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
