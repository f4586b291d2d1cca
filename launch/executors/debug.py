"""In this process, one run after the other: when a command returns, they are over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO, cast

from kv_align.runs.run_dir import EXIT_CODES, RunDirectory, read_json, write_json
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.schema import OwnCluster
from launch.cluster.setting import Setting
from launch.executors.base import Executor, JobState
from launch.journal.attempts import end_attempt, own_status
from launch.journal.ledger import JobRef
from launch.journal.processes import Identity, is_alive, living, this_process, visible_gpus
from launch.journal.retry import DISK_FULL, cause_of
from launch.worker.worker import execute


class DebugCluster(OwnCluster):
    """The keys of a debug cluster, which has none of its own."""


class DebugExecutor(Executor[DebugCluster]):
    """Executes runs here and now; see `Executor`."""

    schema = DebugCluster

    def __init__(self, sweep: SweepDirectory, setting: Setting, plan: Plan | None = None) -> None:
        super().__init__(sweep, setting, plan)
        self._process_file = self.journal.folder / "debug.json"

    def gpus_per_run(self) -> int:
        """Return 1 where this process sees a GPU, else 0."""
        return min(1, len(visible_gpus()))

    def most_at_once(self) -> int:
        """Return 1."""
        return 1

    def preflight(self, plan: Plan, runs: Collection[str]) -> list[str]:
        """Ask for nothing."""
        return []

    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> None:
        """Note the runs as queued here; `work` does them."""
        write_json(self._process_file, this_process())
        submission = self.journal.submitting([[run] for run in runs], uuid.uuid4().hex[:12])
        self.journal.submitted(submission.uid, submission.uid)
        self._uid, self._canary = submission.uid, canary

    def work(self, runs: Sequence[str]) -> list[str]:
        """Do the runs; a failing canary keeps the others from being done, an interruption ends the sweep."""
        for number, name in enumerate(runs):
            print(f"run {number + 1} of {len(runs)}: {name}", flush=True)
            with _also_to(self.journal.log_file(name)):
                code = execute(str(self.sweep.path), [name], self._uid, to_log=False)
            attempts = self.journal.attempts(name, self._uid)
            cause = cause_of(code, own_status(RunDirectory(self.sweep.runs / name), attempts))
            if code or attempts:  # else it was cancelled before its turn
                end_attempt(self.sweep, self.journal, name, self._uid, cause, self.cluster.retry, code)
            interrupted = code == EXIT_CODES["interrupted"] and name not in self.journal.ledger().cancelled
            if interrupted or code == DISK_FULL or (code and self._canary and number == 0):
                break
        return [name for name in runs if not RunDirectory(self.sweep.runs / name).is_complete()]

    def states(self, jobs: Mapping[str, JobRef], silent: Collection[str] = ()) -> dict[str, JobState]:
        """Answer from the attempts, and from whether the process that does them lives."""
        states = {}
        at_it = self._is_done_elsewhere()
        for name, ref in jobs.items():
            attempts = self.journal.attempts(name, ref.uid)
            if living(attempts) is not None:
                states[name] = JobState("running")
            elif attempts:
                states[name] = JobState("ended")
            elif at_it:
                states[name] = JobState("pending")
        return states

    def cancel(self, jobs: Mapping[str, JobRef]) -> None:
        """Ask the run that is being done to leave; the process that does them passes over the others."""
        for name, ref in jobs.items():
            process = living(self.journal.attempts(name, ref.uid))
            if process is not None:
                os.kill(process.pid, signal.SIGTERM)

    def _is_done_elsewhere(self) -> bool:
        """Whether another process of this machine does the sweep now."""
        holder = read_json(self._process_file)
        if holder is None or holder["host"] != socket.gethostname() or holder["pid"] == os.getpid():
            return False
        return is_alive(Identity(holder["pid"], holder["born"]))


class _Both:
    """A text stream whose text goes to a file too; opened anew each time, since logging keeps it longer than the run."""

    def __init__(self, stream: TextIO, file: Path) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _also_to(file: Path) -> Iterator[None]:
    """Write what this process prints to a run's log too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    out, err = cast(TextIO, _Both(sys.stdout, file)), cast(TextIO, _Both(sys.stderr, file))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


EXECUTOR = DebugExecutor
