"""What launch itself keeps in a sweep directory: what was submitted as which job, what was cancelled, how attempts ended.

    launch/cluster.json       the cluster's settings, frozen with the plan (`Setting`)
    launch/journal.jsonl      append-only, written with the sweep's lock held: submitting, submitted, refused, cancelled,
                              changed
    launch/attempts/<id>.jsonl  append-only, written by whoever runs that run: start, note, end, each with its submission
    launch/lock               held by the command that changes the sweep, and says which that is or was; released by the
                              operating system if it dies
    logs/<id>.log             what a run printed, all attempts one after the other

A `submitting` row is written before the scheduler is called and `submitted` after it, so that a submitter that dies between
the two leaves a trace by which the next one finds the job.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from kv_align.runs.errors import ConfigError
from kv_align.runs.files import append_row, rows_of
from kv_align.runs.program import program
from kv_align.runs.sweep_dir import SweepDirectory
from launch.cluster.setting import Setting, read_setting, write_setting
from launch.journal.ledger import Ledger, Submission, read_ledger
from launch.journal.processes import this_process

_WAIT_S = 120.0
_MOMENT_S = 0.5
_SHOWN = 120  # characters of a command line
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on a file system without locks."""


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
            If that takes longer than two minutes, or the sweep cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            opened = (self.folder / "lock").open("a+")
        except OSError as error:
            raise ConfigError(
                f"{self.sweep.path} cannot be changed: {error.strerror} ({error.filename}); make it writable."
            ) from None
        with opened as file:
            self._take(file)
            with contextlib.suppress(OSError):  # on a full disk it is held all the same
                file.truncate(0)
                file.write(_this_command())
                file.flush()
            yield

    def _take(self, file: TextIO) -> None:
        """Lock a file; says who has it where that takes more than a moment."""
        began, holder = time.monotonic(), ""
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited_s = time.monotonic() - began
                if waited_s > _MOMENT_S and not holder:
                    file.seek(0)
                    holder = file.read() or "another launch command"
                    print(f"launch: waiting for {holder}, which is changing {self.sweep.path}", file=sys.stderr)
                if waited_s > _WAIT_S:
                    raise ConfigError(
                        f"{self.sweep.path} is being changed by {holder} for more than {_WAIT_S:.0f} s: wait for it, or end "
                        "it."
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise no_locks(self.sweep.path, error) from None

    def setting(self) -> Setting | None:
        """Return how the sweep is executed; None before it was submitted."""
        return read_setting(self._setting_file, self.sweep.path)

    def frozen_setting(self) -> Setting:
        """Return how the sweep is executed, of one that was submitted.

        Raises
        ------
        ConfigError
            If it never was.
        """
        setting = self.setting()
        lost = "" if setting is not None else self.lost_setting()
        if lost:
            raise ConfigError(f"{lost}.")
        setting = setting or self.setting()
        if setting is None:
            raise ConfigError(
                f"{self.sweep.path} was never submitted: run the same {program('launch')} submit command again."
            )
        return setting

    def lost_setting(self) -> str:
        """Say that how the sweep is executed is lost, of one that was submitted; empty where it was not."""
        # In this order: who submits writes the setting first.
        if not _rows(self._file) or self.setting() is not None:
            return ""
        file = self._setting_file
        return f"{file} is damaged or gone, and jobs were queued with it: restore it, or submit the sweep elsewhere"

    def write_setting(self, setting: Setting) -> None:
        """Freeze how the sweep is executed."""
        write_setting(self._setting_file, self.sweep.path, setting)

    def submitting(
        self,
        batches: Sequence[Sequence[str]],
        uid: str,
        *,
        after: str | None = None,
        prepare: str | None = None,
        command: str | None = None,
    ) -> Submission:
        """Note that the scheduler is about to be called, with what `Submission` holds; the lock is held."""
        submission = Submission(
            uid, time.time(), tuple(tuple(batch) for batch in batches), after, prepare, command, this_process()
        )
        row = asdict(submission)
        del row["job"], row["refused"]
        row["time"] = row.pop("created")
        self._append({"event": "submitting", **row})
        return submission

    def submitted(self, uid: str, job: str) -> None:
        """Note what the scheduler calls it; the lock is held."""
        self._append({"event": "submitted", "uid": uid, "time": time.time(), "job": job})

    def refused(self, uid: str) -> None:
        """Note that the scheduler took nothing of it; the lock is held."""
        self._append({"event": "refused", "uid": uid, "time": time.time()})

    def changed(self, cluster: dict[str, Any]) -> None:
        """Note keys of the cluster that were changed after they were frozen; the lock is held."""
        self._append({"event": "changed", "time": time.time(), "cluster": cluster})

    def cancelled(self, runs: Sequence[str]) -> None:
        """Note that runs are not to be done; the lock is held."""
        self._append({"event": "cancelled", "time": time.time(), "runs": list(runs)})

    def ledger(self) -> Ledger:
        """Read the journal."""
        try:
            return read_ledger(_rows(self._file))
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{self._file} is damaged: a line of it lacks what belongs to it; restore it, or submit the sweep elsewhere."
            ) from None

    def log_file(self, run: str) -> Path:
        """Return where the output of a run is written."""
        return self.logs / f"{run}.log"

    def attempts(self, run: str, uid: str | None = None) -> list[dict[str, Any]]:
        """Return the rows of a run's attempts (`event` start, note or end; `time`; `uid`), or those of one submission."""
        rows = _rows(self._attempts_file(run))
        return rows if uid is None else [row for row in rows if row.get("uid") == uid]

    def attempted(self) -> set[str]:
        """Return the runs and helper jobs of which there are attempts: one look at a folder instead of one at each file."""
        folder = self.folder / "attempts"
        return {file.stem for file in folder.glob("*.jsonl")}

    def add_attempt(self, run: str, event: str, uid: str, **facts: Any) -> None:
        """Append a row to a run's attempts; which clock made its `time` is not known, so nothing is decided by that."""
        file = self._attempts_file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        append_row(file, {"event": event, "time": time.time(), "uid": uid, **facts}, durable=True)

    def _append(self, row: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        append_row(self._file, row, durable=True)

    def _attempts_file(self, run: str) -> Path:
        return self.folder / "attempts" / f"{run}.jsonl"


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; a last line without an end is one that is being written."""
    try:
        content = file.read_bytes()  # once: what is appended meanwhile must not be taken for what could not be read
    except FileNotFoundError:
        return []
    rows = rows_of(content, "event")
    if not rows and b"\n" in content.lstrip(b"\n"):
        raise ConfigError(
            f"{file} is damaged: none of its lines can be read; restore it, or submit the sweep elsewhere."
        )
    return rows


def _this_command() -> str:
    """Return who this process is, for one who waits for it."""
    program, *words = sys.argv
    name = Path(program).parent.name if Path(program).stem == "__main__" else Path(program).stem
    return f"process {os.getpid()} on {socket.gethostname()} ({' '.join([name, *words])[:_SHOWN]})"


def no_locks(path: Path, error: OSError) -> Exception:
    """Return what to raise where flock fails: a sentence on a file system without locks, else the error itself."""
    if error.errno not in NO_LOCKS:
        return error
    return ConfigError(
        f"output_dir={path} is not allowed: its file system has no locks (flock: {error.strerror}), which keep two commands "
        "from running a run twice; choose another."
    )
