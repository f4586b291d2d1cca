"""A queue with slots on this machine: submit and cancel write the journal, a detached supervisor does the rest."""

from __future__ import annotations

import fcntl
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_json
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.setting import Setting
from launch.executors.base import Executor, JobState
from launch.executors.local.schema import LocalCluster, slots_of
from launch.journal.holds import held_runs
from launch.journal.journal import Journal, no_locks
from launch.journal.ledger import JobRef
from launch.journal.processes import Identity, is_alive, living, processes_with, send, visible_gpus
from launch.journal.retry import IN_WORDS, ending, given_up
from launch.worker.code import with_code_first
from launch.worker.sharing import cores, shared_out

_START_WAIT_S = 30.0
_SUPERVISOR = "launch.executors.local.supervisor"


class LocalExecutor(Executor[LocalCluster]):
    """Executes runs in slots of this machine; see `Executor`."""

    schema = LocalCluster
    can_follow = True

    def gpus_per_run(self) -> int:
        """Return 1 where this machine has a GPU, else 0."""
        return min(1, len(visible_gpus()))

    def most_at_once(self) -> int:
        """Return the slots."""
        return slots_of(self.cluster, len(visible_gpus()))

    def preflight(self, plan: Plan, runs: Collection[str]) -> list[str]:
        """Refuse more slots than the GPUs have; say which other sweeps are at work here, and where cores are too few."""
        gpus, slots, per_gpu = visible_gpus(), self.cluster.slots, self.cluster.runs_per_gpu
        if gpus and slots is not None and slots > len(gpus) * per_gpu:
            each = "one slot" if per_gpu == 1 else f"cluster.runs_per_gpu={per_gpu} slots"
            raise ConfigError(
                f"cluster.slots={slots} is not allowed: this machine has {len(gpus)} GPUs with {each} each; set "
                f"cluster.slots to at most {len(gpus) * per_gpu}, or cluster.runs_per_gpu to more."
            )
        notes, threads = [], self.cluster.threads_per_run
        if slots is not None and slots * threads > cores():
            share = shared_out(cores(), slots, threads)["OMP_NUM_THREADS"]
            notes.append(
                f"cluster.slots={slots} and cluster.threads_per_run={threads} ask for more than the {cores()} cores of this "
                f"machine: each run has {share} {'thread' if share == '1' else 'threads'}"
            )
        others = [pid for pid in processes_with(_SUPERVISOR) if pid not in processes_with(str(self.sweep.path))]
        if others:
            shared = "they share its cores: set cluster.slots accordingly"
            if gpus:
                shared = "each GPU goes to one sweep at a time"
            there = "1 other sweep is" if len(others) == 1 else f"{len(others)} other sweeps are"
            notes.append(f"{there} at work on this machine; {shared}")
        return notes

    def recover(self) -> None:
        """Refuse to touch a sweep that is supervised on another machine, whose processes cannot be seen from here."""
        host = self._other_host(Queue(self.journal))
        if host:
            raise ConfigError(
                f"{self.sweep.path} is supervised on {host}: run this there, or, if that machine is gone for good, delete "
                "launch/workers.json in it first."
            )

    def _other_host(self, queue: Queue) -> str:
        return queue.host if queue.host != socket.gethostname() else ""

    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> None:
        """Write the queue and see that a supervisor works on it."""
        parts = [runs[:1], runs[1:]] if canary else [runs]
        after = None
        for part in parts:
            if part:
                submission = self.journal.submitting([[run] for run in part], uuid.uuid4().hex[:12], after=after)
                self.journal.submitted(submission.uid, submission.uid)
                after = submission.uid
        start_supervisor(self.sweep.path, Path(self.setting.code))

    def states(self, jobs: Mapping[str, JobRef], silent: Collection[str] = ()) -> dict[str, JobState]:
        """Answer from what the supervisor and its workers wrote, and from whether they live."""
        queue = Queue(self.journal)
        host = self._other_host(queue)
        if host:
            return self._as_files_say(jobs, host)
        supervised, workers = queue.is_supervised(), queue.workers()
        held = held_runs(self.plan, self.journal, self.journal.ledger(), hold_arm=self.cluster.hold_arm)
        states = {}
        for name, ref in jobs.items():
            attempts = self.journal.attempts(name)
            own = [row for row in attempts if row.get("uid") == ref.uid]
            # One that was started just before its supervisor was killed is in no list but its own.
            if (name in workers and is_alive(workers[name])) or living(attempts) is not None:
                states[name] = JobState("running")
            elif given_up(own):
                states[name] = JobState("ended", IN_WORDS.get(ending(own)["cause"], ""))
            # By its files alone, one that is to be done again since its artefacts are gone would have ended.
            elif ending(own).get("cause") == "finished" or RunDirectory(self.sweep.runs / name).is_complete():
                states[name] = JobState("ended")
            elif name in held:
                states[name] = JobState("held", held[name])
            elif supervised:
                states[name] = JobState(
                    "pending", f"waits for {self.setting.after}" if waits_for_other(self.setting) else ""
                )
            elif is_written(RunDirectory(self.sweep.runs / name)):
                states[name] = JobState("running")
            elif not self._may_live_elsewhere(name):
                states[name] = JobState("gone", "the local supervisor is gone")
        return states

    def _may_live_elsewhere(self, name: str) -> bool:
        """Whether the status file is of another machine, where it cannot be seen that the process is gone."""
        status = RunDirectory(self.sweep.runs / name).status()
        return status is not None and status.state == "running" and status.host != socket.gethostname()

    def _as_files_say(self, jobs: Mapping[str, JobRef], host: str) -> dict[str, JobState]:
        """What can be known of a sweep that another machine works on; the heartbeats tell the rest."""
        states = {}
        for name, ref in jobs.items():
            attempts = self.journal.attempts(name, ref.uid)
            if given_up(attempts):
                states[name] = JobState("ended", IN_WORDS.get(ending(attempts)["cause"], ""))
            elif not attempts or attempts[-1]["event"] == "end":
                states[name] = JobState("pending", f"supervised on {host}")
            elif not self.sweep.runs.joinpath(name, "status.json").exists():
                states[name] = JobState("running")
        return states

    def cancel(self, jobs: Mapping[str, JobRef]) -> None:
        """Wait until the supervisor has ended the runs; without one, end them here."""
        queue, began = Queue(self.journal), time.monotonic()
        while True:
            workers = queue.workers()
            processes = [living(self.journal.attempts(name)) or workers.get(name) for name in jobs]
            left = [identity for identity in processes if identity is not None and is_alive(identity)]
            waited = time.monotonic() - began
            if not left or waited > self.cluster.grace_s + 10:
                return
            if not queue.is_supervised():
                for identity in left:
                    send(identity, signal.SIGKILL if waited > self.cluster.grace_s else signal.SIGTERM)
            time.sleep(0.2)


class Queue:
    """What a supervisor tells others: that it lives, and its workers.

    Parameters
    ----------
    journal
        Of the sweep.
    """

    def __init__(self, journal: Journal) -> None:
        self.lock_file = journal.folder / "supervisor.lock"
        self.file = journal.folder / "workers.json"
        self.log_file = journal.folder / "supervisor.log"
        self.host = str((read_json(self.file) or {}).get("host", ""))

    def workers(self) -> dict[str, Identity]:
        """Return the processes that were started last, by run; they may have ended since."""
        raw = (read_json(self.file) or {}).get("workers", {})
        return {name: Identity(row["pid"], row["born"]) for name, row in raw.items()}

    def slots(self) -> dict[str, int]:
        """Return the slots of those processes."""
        raw = (read_json(self.file) or {}).get("workers", {})
        return {name: int(row["slot"]) for name, row in raw.items()}

    def uids(self) -> dict[str, str]:
        """Return the submissions that those processes work for."""
        raw = (read_json(self.file) or {}).get("workers", {})
        return {name: str(row["uid"]) for name, row in raw.items()}

    def is_supervised(self) -> bool:
        """Whether a supervisor lives: whether its lock is held."""
        try:
            with self.lock_file.open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def waits_for_other(setting: Setting) -> bool:
    """Whether the sweep that goes first is still worked on."""
    return bool(setting.after) and Queue(Journal(SweepDirectory(setting.after))).is_supervised()


def is_written(directory: RunDirectory) -> bool:
    """Whether a living process holds a run directory for writing."""
    try:
        with (directory.path / "run.lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise no_locks(directory.path, error) from None
    return False


def start_supervisor(sweep: Path, code: Path) -> None:
    """Start a supervisor that outlives this process and its terminal; one that runs already goes on alone.

    Raises
    ------
    ConfigError
        If none comes up.
    """
    queue = Queue(Journal(SweepDirectory(sweep)))
    if queue.is_supervised():
        return
    # It must not hold this process's standard streams, or what waits for them would wait for the whole sweep.
    with queue.log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", _SUPERVISOR, str(sweep)],
            cwd=code,
            env=with_code_first(code),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_WAIT_S
    while time.monotonic() < deadline:
        if queue.is_supervised() or process.poll() == 0:
            process.returncode = 0  # it is not waited for
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise ConfigError(f"{sweep}: its supervisor does not start; see {queue.log_file}, then run resume.")
