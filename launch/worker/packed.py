"""Several runs at once in one job: `cluster.runs_per_gpu` of them on each GPU that the job was given.

Each run is a process of its own, which is started by the words that the caller gives. This one only looks after them: who
may start (`launch.worker.sharing`), who ran out of memory beside others and is tried again alone, and who must be asked to
leave because the job is. It notes how each of them ended; the job's last line does that for those that were killed with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from kv_align.runs.run_dir import EXIT_CODES, RunDirectory
from kv_align.runs.sweep_dir import SweepDirectory
from launch.journal.attempts import end_open_attempt
from launch.journal.journal import Journal
from launch.journal.pause import tell
from launch.journal.processes import visible_gpus
from launch.journal.retry import DISK_FULL, NODE_FAILURE
from launch.worker.sharing import Sharing, is_put_back, shared_out

_BEAT_S = 0.2


@dataclass
class _Started:
    process: subprocess.Popen[bytes]
    gpu: str
    shared: bool
    """Whether another run was on its GPU at any time."""


class PackedJob:
    """Does runs of one sweep, several at once.

    Parameters
    ----------
    sweep_path, runs, uid
        As `launch.worker.worker.execute` takes them.
    per_gpu
        Runs on one GPU at most, or in the job where it has no GPU.
    cores
        Of the job.
    command
        The words that start one run.
    """

    def __init__(
        self,
        sweep_path: str,
        runs: Sequence[str],
        uid: str,
        *,
        per_gpu: int,
        cores: int,
        command: Callable[[str], Sequence[str]],
    ) -> None:
        self.sweep, self.uid, self._command = SweepDirectory(sweep_path), uid, command
        self.journal, self._sharing = Journal(self.sweep), Sharing(per_gpu)
        self._gpus, self._cores = visible_gpus() or [""], cores
        # Without a GPU, a run takes a core at least.
        self._at_once = len(self._gpus) * per_gpu if any(self._gpus) else min(per_gpu, cores)
        self._waiting, self._started = list(runs), dict[str, _Started]()
        self._alone = {name for name in runs if is_put_back(self.journal.attempts(name, uid))}
        self._codes: list[int] = []
        self._leaving = False

    def execute(self) -> int:
        """Do the runs; returns the exit code of the job, as `launch.worker.worker.execute` does."""
        before = {number: signal.signal(number, self._leave) for number in (signal.SIGTERM, signal.SIGUSR2)}
        try:
            while self._started or (self._waiting and not self._leaving):
                self._reap()
                if not self._leaving:
                    self._fill()
                time.sleep(_BEAT_S)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if DISK_FULL in self._codes:
            return DISK_FULL
        if self._leaving:
            return EXIT_CODES["interrupted"]
        return next((code for code in self._codes if code), 0)

    def _fill(self) -> None:
        for gpu in sorted(self._gpus, key=lambda gpu: len(self._on(gpu))):
            if len(self._started) >= self._at_once:
                return
            for name, each in self._started.items():
                if each.gpu == gpu:
                    self._sharing.observe(name, self._directory(name).status())
            running = self._on(gpu)
            for name in [each for each in self._waiting if self._sharing.admits(each, running, self._alone)][:1]:
                self._waiting.remove(name)
                if not self._directory(name).is_complete():
                    self._start(name, gpu)  # one that is held or was given up passes over itself

    def _start(self, name: str, gpu: str) -> None:
        at_once = min(self._at_once, self._sharing.most * len(self._gpus))
        environment = {**os.environ, **shared_out(self._cores, at_once, self._cores)}
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        neighbours = self._on(gpu)
        for other in neighbours:
            self._started[other].shared = True
        try:
            process = subprocess.Popen(self._command(name), env=environment, stdin=subprocess.DEVNULL)
        except OSError as error:  # the others go on, and its turn comes again with the job's
            tell(f"kv-align: the process of {name} cannot be started: {error}")
            self._codes.append(NODE_FAILURE)
            return
        self._started[name] = _Started(process, gpu, bool(neighbours))

    def _reap(self) -> None:
        for name, each in list(self._started.items()):
            code = each.process.poll()
            if code is None:
                continue
            at_once = len(self._on(each.gpu))
            del self._started[name]
            code = code if code >= 0 else 128 - code
            self._sharing.observe(name, self._directory(name).status(), ended=True)
            cause = end_open_attempt(self.journal, name, self.uid, code, shared=each.shared)
            if cause == "out_of_memory" and each.shared and not self._leaving:
                tell(f"kv-align: {name} ran out of memory beside others: it is tried again alone")
                self._sharing.did_not_fit(at_once)
                self._alone.add(name)
                self._waiting.append(name)
                continue
            self._codes.append(code)
            if code in (DISK_FULL, EXIT_CODES["interrupted"]):
                self._ask_to_leave()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self._ask_to_leave()

    def _ask_to_leave(self) -> None:
        """Ask all runs to leave between steps, once."""
        if self._leaving:
            return
        self._leaving = True
        for each in self._started.values():
            if each.process.poll() is None:
                each.process.send_signal(signal.SIGUSR2)

    def _on(self, gpu: str) -> list[str]:
        return [name for name, each in self._started.items() if each.gpu == gpu]

    def _directory(self, name: str) -> RunDirectory:
        return RunDirectory(self.sweep.runs / name)
