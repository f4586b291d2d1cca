"""A driver of random faults over one sweep: counts the runs that were lost, done twice, or done differently.

Every fault is one that happens to clusters: a preemption, a signal before the time limit, a killed process, a requeue, a node
that dies and comes back, a restarted controller, a cancelled job, two people who resume at once, a submitter that is killed
while sbatch is at it, a Slurm that does not answer.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launch.journal.journal import Journal
from tests.launch.sweeps import Sweep, launch, undisturbed
from tests.slurm.real_slurm import RealSlurm


@dataclass
class Tally:
    """What came of it."""

    faults: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    doubled: dict[str, str] = field(default_factory=dict)
    different: int = 0


class FaultDriver:
    """Disturbs a sweep that was submitted until `count` faults have happened, then lets it be resumed to its end.

    A sweep that is done before is extended by a seed.
    """

    def __init__(self, slurm: RealSlurm, sweep: Sweep, seed: int) -> None:
        self.slurm, self.sweep, self.random = slurm, sweep, random.Random(seed)
        self.tally = Tally()
        self._kinds = {
            "killed process": (6, self._kill),
            "signal before the time limit": (4, self._signal),
            "preemption": (3, self._preempt),
            "requeue": (3, self._requeue),
            "cancelled job": (2, self._cancel),
            "controller restarted": (2, self._restart_controller),
            "node died": (1, self._node_dies),
            "two resumers": (2, self._resume_twice),
            "submitter killed in sbatch": (1, self._kill_submitter),
            "squeue and sacct fail": (2, self._silence),
        }
        self._twice: dict[str, str] = {}

    def drive(self, count: int, timeout_s: float) -> Tally:
        deadline = time.monotonic() + timeout_s
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        while sum(self.tally.faults.values()) < count and time.monotonic() < deadline:
            self._look()
            running = self._running()
            if not running:
                if set(self.sweep.counts()) <= {"done"}:
                    seeds = len({run.seed for run in self.sweep.runs()}) + 1
                    launch("extend", str(self.sweep.path), f"seeds={seeds}")  # refused while a node is down
                self._resume_if_idle()
                time.sleep(0.3)
                continue
            kind = self.random.choices(names, weights)[0]
            if self._kinds[kind][1](self.random.choice(running)):
                self.tally.faults[kind] = self.tally.faults.get(kind, 0) + 1
            time.sleep(self.random.uniform(0.0, 0.8))
        while set(self.sweep.counts()) != {"done"} and time.monotonic() < deadline:
            self._look()
            self._resume_if_idle()
            time.sleep(0.5)
        return self._count()

    def _look(self) -> None:
        """Note the runs that two processes do now, or that two jobs have before them."""
        processes: Counter[str] = Counter()
        for run in self.sweep.runs():
            found = (self.sweep.path / "runs" / run.id).glob("working.*")
            processes[run.id] = sum(_works(file.suffix[1:]) for file in found)
        jobs: Counter[str] = Counter()
        live = set(self.slurm.out("squeue", "-h", "-r", "-t", "pending,running", "-o", "%i").split())
        ledger = Journal(self.sweep.directory).ledger()
        for submission in ledger.submissions.values():
            for index, batch in enumerate(submission.batches):
                if submission.job is not None and submission.job_of(index) in live:
                    jobs.update(batch)
        for what, found in (("processes", processes), ("jobs", jobs)):
            self._twice |= {name: f"{number} {what}" for name, number in found.items() if number > 1}

    def _count(self) -> Tally:
        for run in self.sweep.runs():
            if not self.sweep.directory.run(run).is_complete():
                self.tally.lost += 1
            elif self.sweep.weights_of(run.id) != undisturbed(run):
                self.tally.different += 1
            finished = self.sweep.path / "runs" / run.id / "finished.txt"
            if finished.exists() and len(finished.read_text().splitlines()) > 1:
                self._twice[run.id] = "finished twice"
            if run.id in self._twice:
                self.tally.doubled[run.id] = self._twice[run.id]
        return self.tally

    def _running(self) -> list[str]:
        runs = []
        for run in self.sweep.runs():
            status = self.sweep.directory.run(run).status()
            if status is not None and status.state == "running" and 0 < status.step < status.total_steps:
                runs.append(run.id)
        return runs

    def _job(self, name: str) -> str:
        return self.sweep.state(name).job

    def _kill(self, name: str) -> bool:
        file = self.sweep.path / "launch" / "attempts" / f"{name}.jsonl"
        row = [json.loads(line) for line in file.read_text().splitlines()][-1]
        if row["event"] != "start":
            return False
        try:
            os.kill(row["pid"], signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _signal(self, name: str) -> bool:
        try:
            self.slurm.ask_to_leave(self._job(name))
        except subprocess.CalledProcessError:
            return False  # it has ended meanwhile
        return True

    def _preempt(self, name: str) -> bool:
        return bool(self.slurm.preempt(self._job(name)))

    def _requeue(self, name: str) -> bool:
        return self.slurm.call("scontrol", "requeue", self._job(name)).returncode == 0

    def _cancel(self, name: str) -> bool:
        return self.slurm.call("scancel", self._job(name)).returncode == 0

    def _restart_controller(self, name: str) -> bool:
        self.slurm.restart_controller()  # killed instead, it gives numbers of running jobs to new ones and drains the nodes
        return True

    def _node_dies(self, name: str) -> bool:
        node = self.slurm.kill_node_of(self._job(name))
        if node is None:
            return False
        time.sleep(1.0)
        self.slurm.start_node(node)
        return True

    def _resume_twice(self, name: str) -> bool:
        threads = [threading.Thread(target=launch, args=("resume", str(self.sweep.path))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return True

    def _kill_submitter(self, name: str) -> bool:
        """Cancel a run, and kill who queues it again when sbatch has given it to Slurm and has not said so yet."""
        if launch("cancel", str(self.sweep.path), name).code:
            return False
        return die_in_sbatch(self.sweep.path / "slow", "resume", str(self.sweep.path))

    def _silence(self, name: str) -> bool:
        """Resume while Slurm does not answer: refused, and nothing is queued for it."""
        before = (self.sweep.path / "launch" / "journal.jsonl").read_text()
        broken = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
        with _instead(self.sweep.path / "broken", {"squeue": broken, "sacct": broken}) as environment:
            command = [sys.executable, "-m", "launch", "resume", str(self.sweep.path)]
            told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (self.sweep.path / "launch" / "journal.jsonl").read_text() == before
        if told.returncode == 0:  # all had been done by then, and nobody was asked
            assert told.stderr == "nothing to queue\n"
            return False
        assert told.returncode == 2, told.stderr
        return True

    def _resume_if_idle(self) -> None:
        counts = self.sweep.counts()
        if any(state in counts for state in ("failed", "lost", "cancelled", "held", "missing")):
            launch("resume", str(self.sweep.path))


def die_in_sbatch(folder: Path, *words: str) -> bool:
    """Run `launch`, and kill it when sbatch has given its job to Slurm and has not said so yet; whether it came to that."""
    sbatch = shutil.which("sbatch")
    slow = f'case " $* " in *--test-only*) exec {sbatch} "$@" ;; esac\n{sbatch} "$@" > /dev/null; touch done; sleep 60'
    with _instead(folder, {"sbatch": slow}) as environment:
        done = folder / "done"
        submitter = subprocess.Popen(
            [sys.executable, "-m", "launch", *words],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not done.exists() and submitter.poll() is None:
            time.sleep(0.05)
        if submitter.poll() is None:
            os.killpg(submitter.pid, signal.SIGKILL)
        submitter.wait()
        return done.exists()


@contextmanager
def _instead(folder: Path, scripts: dict[str, str]) -> Iterator[dict[str, str]]:
    """Give an environment in which these commands are other ones; they work in `folder`, which is gone afterwards."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{text}\n")
        (folder / name).chmod(0o755)
    try:
        yield dict(os.environ, PATH=f"{folder}:{os.environ['PATH']}")
    finally:
        shutil.rmtree(folder)


def _works(pid: str) -> bool:
    """Whether this is the process of a job, and no later one with its number."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
