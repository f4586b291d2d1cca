"""The detached process behind `cluster=local`: keeps the slots busy until nothing is left to do, and then ends.

It knows nothing that is not in the sweep's files, so after a kill the next one takes over, workers that still run included.
`python -m launch.executors.local.supervisor SWEEP`; a second one for the same sweep ends at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from kv_align.config.schema import validate
from kv_align.runs.run_dir import RunDirectory, write_json
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.setting import Setting
from launch.executors.local.device import Devices
from launch.executors.local.executor import Queue, waits_for_other
from launch.executors.local.schema import LocalCluster, slots_of
from launch.executors.local.slot import GONE, Worker, start_process
from launch.journal.attempts import cause_by_status, end_attempt, own_status
from launch.journal.holds import held_runs
from launch.journal.journal import Journal
from launch.journal.ledger import Ledger
from launch.journal.pause import tell
from launch.journal.processes import Identity, identify, is_alive, living, send, visible_gpus
from launch.journal.retry import Cause, cause_of, delay_s, given_up, vanished
from launch.worker.sharing import Sharing, cores, is_put_back, shared_out

_BEAT_S = 0.2
_LOCK_WAIT_S = 2.0


class Supervisor:
    """Works on the queue of one sweep.

    Parameters
    ----------
    path
        The sweep directory.
    """

    def __init__(self, path: Path) -> None:
        self.sweep = SweepDirectory(path)
        self.journal = Journal(self.sweep)
        setting = self.journal.frozen_setting()
        self.queue, self.gpus = Queue(self.journal), visible_gpus()
        self._asked_per_gpu, self._sharing = 1, Sharing(1)
        self._use(setting)
        self.workers: dict[str, Worker] = {}
        self._not_before: dict[str, float] = {}
        self._paused_until = 0.0
        self._devices = Devices()
        self.leaving, self._read_at = False, (0, 0)

    def _use(self, setting: Setting) -> None:
        self.setting, self.cluster = setting, validate(LocalCluster, setting.cluster.model_dump())
        per_gpu = self.cluster.runs_per_gpu
        if per_gpu != self._asked_per_gpu:
            self._sharing.most = self._asked_per_gpu = per_gpu
        self.slots = slots_of(self.cluster, len(self.gpus))

    def work(self) -> None:
        """Take over what still runs, then fill slots until nothing is left, or until asked to leave."""
        signal.signal(signal.SIGTERM, self._leave)
        self._take_over()
        self._write()
        while True:
            self._read()
            self._reap()
            self._stop_cancelled()
            if not self.leaving:
                self._fill()
            elif not self.workers:
                self._write(host="")
                return
            if not self.workers and not self._waiting() and self._nothing_new():
                return
            time.sleep(_BEAT_S)

    def _read(self) -> None:
        """Read journal and plan anew if the journal has grown; both change only under the sweep's lock."""
        stat = (self.journal.folder / "journal.jsonl").stat()
        if (stat.st_mtime_ns, stat.st_size) == self._read_at:
            return
        self.plan: Plan = self.sweep.frozen_plan()
        self._use(self.journal.frozen_setting())
        self.ledger: Ledger = self.journal.ledger()
        self._read_at = (stat.st_mtime_ns, stat.st_size)
        self.over: set[str] = set()
        self._alone: set[str] = set()
        for name, ref in self.ledger.jobs.items():
            attempts = self.journal.attempts(name, ref.uid)
            if given_up(attempts) or RunDirectory(self.sweep.runs / name).is_complete():
                self.over.add(name)
            elif is_put_back(attempts):
                self._alone.add(name)
        self._find_held()

    def _find_held(self) -> None:
        self.held = held_runs(self.plan, self.journal, self.ledger, hold_arm=self.cluster.hold_arm)

    def _take_over(self) -> None:
        self._read()
        slots, uids = self.queue.slots(), self.queue.uids()
        for name, identity in self.queue.workers().items():
            self._adopt(name, Worker(identity, slots[name], uids[name], None))
        for name in self.ledger.jobs.keys() - self.workers.keys():  # started just before its supervisor was killed
            attempts = self.journal.attempts(name)
            process = living(attempts)
            if process is not None:
                taken = {worker.slot for worker in self.workers.values()}
                slot = min(set(range(len(taken) + 1)) - taken)
                uid = next(row["uid"] for row in reversed(attempts) if row["event"] == "start")
                self._adopt(name, Worker(process, slot, uid, None))

    def _adopt(self, name: str, worker: Worker) -> None:
        if is_alive(worker.identity):
            tell(f"taking over {name} (process {worker.identity.pid})")
        self.workers[name] = worker

    def _reap(self) -> None:
        for name, worker in list(self.workers.items()):
            code = worker.exit_code()
            if code is None:
                continue
            beside = self._on(self._gpu(worker.slot))
            del self.workers[name]
            if len(beside) == 1:
                self._devices.release(self._gpu(worker.slot))
            self._write()
            directory = RunDirectory(self.sweep.runs / name)
            self._sharing.observe(name, directory.status(), ended=True)
            if directory.is_complete():
                self.over.add(name)
                continue
            if name in self.over or name in self.ledger.cancelled or worker.uid != self.ledger.jobs[name].uid:
                continue
            attempts = self.journal.attempts(name, worker.uid)
            own = own_status(directory, attempts) if vanished(attempts) else None
            cause = cause_by_status(own) if worker.process is None else cause_of(code, own)
            wait_s = delay_s(cause, attempts, self.cluster.retry)
            self._not_before[name] = time.monotonic() + wait_s
            if cause == "disk_full":  # nothing is written, and nobody else need try
                self._pause(wait_s, f"{name} found the disk full")
                continue
            shared = worker.shared and bool(self.gpus) and self.cluster.runs_per_gpu > 1
            again = self._end(name, worker.uid, cause, code, shared=shared)
            tell(f"{name} ended: {cause}{', once more' if again else ''}")
            if shared and cause == "out_of_memory":
                self._alone.add(name)
                self._sharing.did_not_fit(len(beside))
            if not again:
                self.over.add(name)
                self._find_held()

    def _stop_cancelled(self) -> None:
        for name, worker in self.workers.items():
            if not self.leaving and name not in self.ledger.cancelled:
                continue
            now = time.monotonic()
            if worker.asked_to_leave is None:
                worker.asked_to_leave = now
                send(worker.identity, signal.SIGTERM)
            elif now - worker.asked_to_leave > self.cluster.grace_s:
                send(worker.identity, signal.SIGKILL)

    def _waiting(self) -> list[str]:
        """Runs that are to be started, in the order in which they were submitted."""
        return [
            name
            for name, ref in self.ledger.jobs.items()
            if name not in self.over
            and name not in self.workers
            and name not in self.ledger.cancelled
            and name not in self.held
            and self._allowed(ref.submission.after)
        ]

    def _allowed(self, after: str | None) -> bool:
        """Whether the submission that must succeed first did."""
        if after is None:
            return True
        first = [name for batch in self.ledger.submissions[after].batches for name in batch]
        return all(RunDirectory(self.sweep.runs / name).is_complete() for name in first)

    def _fill(self) -> None:
        now = time.monotonic()
        free = sorted(set(range(self.slots)) - {worker.slot for worker in self.workers.values()})
        if not free or waits_for_other(self.setting):
            return
        ready = [name for name in self._waiting() if now >= self._not_before.get(name, 0.0)]
        for slot in free:
            if now < self._paused_until:
                return
            gpu = self._gpu(slot)
            running = self._on(gpu) if gpu else []
            for name in running if ready and self.cluster.runs_per_gpu > 1 else ():
                self._sharing.observe(name, RunDirectory(self.sweep.runs / name).status())
            allowed = [name for name in ready if self._sharing.admits(name, running, self._alone)]
            if not allowed or not self._devices.take(gpu):
                continue  # those on the GPU leave no room, or another sweep has it
            name = allowed[0]
            ready.remove(name)
            for other in running:
                self.workers[other].shared = True
            self._start(name, slot)

    def _gpu(self, slot: int) -> str:
        """What CUDA_VISIBLE_DEVICES calls the GPU of a slot; empty without one."""
        return self.gpus[slot % len(self.gpus)] if self.gpus else ""

    def _on(self, gpu: str) -> list[str]:
        return [name for name, worker in self.workers.items() if self._gpu(worker.slot) == gpu]

    def _start(self, name: str, slot: int) -> None:
        gpu, uid = self._gpu(slot), self.ledger.jobs[name].uid
        variables = shared_out(cores(), self.slots, self.cluster.threads_per_run)
        if gpu:
            variables["CUDA_VISIBLE_DEVICES"] = gpu
        try:
            process = start_process(self.sweep.path, uid, name, self.setting, variables, self._devices.descriptors(gpu))
        except OSError as error:
            if not self._on(gpu):
                self._devices.release(gpu)
            self._cannot_start(name, uid, error)
            return
        identity = identify(process.pid) or Identity(process.pid, "")
        self.workers[name] = Worker(identity, slot, uid, process, shared=bool(self._on(gpu)))
        self._write()

    def _cannot_start(self, name: str, uid: str, error: OSError) -> None:
        reason = f"its process cannot be started: {error}"
        if error.errno not in GONE:  # too many processes, or too little memory, just now
            self._pause(self.cluster.retry.backoff_s, f"{name}: {reason}")
            return
        with contextlib.suppress(OSError):
            self.journal.add_attempt(name, "note", uid, reason=reason)
        if not self._end(name, uid, "bad_input"):
            self.over.add(name)
            self._find_held()

    def _end(self, name: str, uid: str, cause: Cause, code: int | None = None, *, shared: bool = False) -> bool:
        """Note an end; where that cannot be written the sweep is paused, and the run done again rather than forgotten."""
        try:
            return end_attempt(self.sweep, self.journal, name, uid, cause, self.cluster.retry, code, shared=shared)
        except OSError as error:
            self._pause(self.cluster.retry.pause_s, f"the end of {name} ({cause}) could not be noted: {error}")
            return True

    def _pause(self, seconds: float, why: str) -> None:
        self._paused_until = time.monotonic() + seconds
        tell(f"{why}: paused for {seconds:.0f} s")

    def _nothing_new(self) -> bool:
        """Whether the queue is empty with the sweep's lock held; then no submitter counts on this process any more."""
        with self.journal.lock():
            self._read()
            if self._waiting():
                return False
            self._write(host="")
            self._lock.close()
            return True

    def _write(self, host: str | None = None) -> None:
        workers = {
            name: {**asdict(worker.identity), "slot": worker.slot, "uid": worker.uid}
            for name, worker in self.workers.items()
        }
        content = {"host": socket.gethostname() if host is None else host, "workers": workers}
        with contextlib.suppress(OSError):  # on a full disk the runs go on without it
            write_json(self.queue.file, content)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self.leaving = True

    def begin(self) -> bool:
        """Become the sweep's supervisor; False if there is one."""
        self._lock = self.queue.lock_file.open("a")
        deadline = time.monotonic() + _LOCK_WAIT_S  # one who only asks whether it is held holds it for a moment
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)


if __name__ == "__main__":
    supervisor = Supervisor(Path(sys.argv[1]))
    if supervisor.begin():
        supervisor.work()
