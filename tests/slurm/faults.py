"""A driver of random faults over one sweep: counts the runs that were lost, done twice, done differently, or stuck.

Every fault is one that happens to clusters: a preemption, a signal before the time limit, a killed process, a requeue, a node
that dies and comes back, a restarted controller, a cancelled job, two people who resume at once, a submitter that is killed
while sbatch is at it, a Slurm that does not answer or is slow to, an administrator who holds a job, a prepare job that fails
late, a canary that is cancelled, a full disk, a limit on jobs, an accounting that is down, a second checkout.
"""

import contextlib
import json
import os
import random
import re
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
from launch.status.overview import overview
from tests.launch.sweeps import Sweep, launch, undisturbed
from tests.slurm.real_slurm import RealSlurm

_ROOT = Path(__file__).parents[2]


@dataclass
class Tally:
    """What came of it."""

    faults: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    doubled: dict[str, str] = field(default_factory=dict)
    queued_twice: dict[str, str] = field(default_factory=dict)
    different: int = 0
    stuck: dict[str, str] = field(default_factory=dict)
    """Runs that cannot start and are not said to be so: why Slurm says that they wait."""


class FaultDriver:
    """Disturbs a sweep that was submitted until `count` faults have happened, then lets it be resumed to its end.

    A sweep that is done before is extended by a seed.
    """

    def __init__(self, slurm: RealSlurm, sweep: Sweep, seed: int, folder: Path, disk: Path | None) -> None:
        self.slurm, self.sweep, self.random = slurm, sweep, random.Random(seed)
        self.folder, self.disk = folder, disk
        self._suspects: dict[str, str] = {}
        self._serial = 0
        self._last = ""
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
            "held by an administrator": (3, self._hold),
            "prepare fails late": (2, self._prepare_fails),
            "canary cancelled": (1, self._cancel_canary),
            "submit limit": (2, self._submit_limit),
            "accounting down": (1, self._accounting_down),
            "slow squeue": (1, self._slow_squeue),
            "second checkout": (2, self._second_checkout),
            **({} if disk is None else {"disk full": (2, self._fill_disk)}),
        }
        self._twice: dict[str, str] = {}
        self._due = self.random.sample(list(self._kinds), len(self._kinds))

    def drive(self, count: int, timeout_s: float) -> Tally:
        """Do so; every kind happens once before any of them happens again."""
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
            kind = self._last = self._due.pop(0) if self._due else self.random.choices(names, weights)[0]
            if self._kinds[kind][1](self.random.choice(running)):
                self.tally.faults[kind] = self.tally.faults.get(kind, 0) + 1
            elif kind not in self.tally.faults:  # there was nothing that it could happen to
                self._due.append(kind)
            time.sleep(self.random.uniform(0.0, 0.8))
        while set(self.sweep.counts()) != {"done"} and time.monotonic() < deadline:
            self._look()
            self._resume_if_idle()
            time.sleep(0.5)
        launch("resume", str(self.sweep.path))  # nothing is left in the queue that nobody needs
        return self._count()

    def _look(self) -> None:
        """Note the runs that two processes do now, or that two jobs have before them."""
        processes: Counter[str] = Counter()
        for run in self.sweep.runs():
            found = (self.sweep.path / "runs" / run.id).glob("working.*")
            processes[run.id] = sum(_works(file.suffix[1:]) for file in found)
        jobs: dict[str, list[str]] = {}
        lines = self.slurm.out("squeue", "-h", "-r", "-t", "pending,running", "-o", "%i|%T %r").splitlines()
        live = dict(line.split("|", 1) for line in lines)
        ledger = Journal(self.sweep.directory).ledger()
        for submission in ledger.submissions.values():
            for index, batch in enumerate(submission.batches):
                job = None if submission.job is None else submission.job_of(index)
                for name in batch if job in live else ():
                    jobs.setdefault(name, []).append(f"{job} {live[job]}")
        self._twice |= {name: f"{number} processes" for name, number in processes.items() if number > 1}
        # A second job passes over a run that is not its own any more, but has no business in the queue.
        for name, each in jobs.items():
            if len(each) > 1 and name not in self.tally.queued_twice:
                events = Journal(self.sweep.directory).attempts(name, ledger.jobs[name].uid)
                self.tally.queued_twice[name] = f"{'; '.join(each)}; after {self._last}; {events[-3:]}"
        self._look_for_stuck(ledger)

    def _look_for_stuck(self, ledger) -> None:
        """Note the runs that Slurm will never start, twice in a row, and that are shown as if they waited for their turn."""
        lines = self.slurm.out("squeue", "-h", "-r", "-t", "pending", "-o", "%i|%r").splitlines()
        never = dict(line.split("|") for line in lines)
        never = {job: reason for job, reason in never.items() if re.search(r"[Hh]eld|Never|BadConstraints", reason)}
        suspects = {name: never[ref.job] for name, ref in ledger.runs.items() if ref.job in never}
        if suspects:
            shown = {run.id: run.state for run in overview(self.sweep.directory).runs}
            suspects = {name: reason for name, reason in suspects.items() if shown[name] in ("pending", "preempted")}
        self.tally.stuck |= {name: reason for name, reason in suspects.items() if self._suspects.get(name) == reason}
        self._suspects = suspects

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

    def _hold(self, name: str) -> bool:
        """Hold a job that waits, or queue one that runs again and hold it; whoever resumes queues it anew."""
        waiting = [run.job for run in overview(self.sweep.directory).runs if run.state == "pending" and run.job]
        if waiting:
            return self.slurm.call("scontrol", "hold", self.random.choice(waiting)).returncode == 0
        return self.slurm.call("scontrol", "requeuehold", self._job(name)).returncode == 0

    def _prepare_fails(self, name: str) -> bool:
        """Queue a run behind a prepare job that takes its time to fail, and mend what was wrong."""
        flag = self.sweep.path / "prepare_fails"
        flag.touch()
        self._serial += 1
        command = f"test ! -e {flag} || (sleep 1; exit 7) # {self._serial}"
        if launch("cancel", str(self.sweep.path), name).code:
            return False
        queued = launch("resume", str(self.sweep.path), name, f"cluster.prepare={command}").code == 0
        journal = Journal(self.sweep.directory)
        deadline = time.monotonic() + 20
        while queued and time.monotonic() < deadline:
            ref = journal.ledger().jobs["prepare"]
            if any(row["event"] == "end" for row in journal.attempts("prepare", ref.uid)):
                break
            time.sleep(0.2)
        flag.unlink()
        return queued

    def _cancel_canary(self, name: str) -> bool:
        """Cancel the canary of another sweep; the others of it must not wait for ever."""
        self._serial += 1
        words = [word for word in self.sweep.words[1:] if not word.startswith(("output_dir=", "seeds="))]
        folder = self.folder / f"canary{self._serial}"
        other = Sweep(
            *words[:-2], "seeds=1", f"output_dir={folder}", behaviour={"step_s": 0.05}, config_dir=Path(words[-1])
        )
        other.submit("--canary")
        self.slurm.call("scancel", other.state("baseline").job)
        deadline = time.monotonic() + 60
        while {"pending", "running"} & set(other.counts()) and time.monotonic() < deadline:
            time.sleep(0.5)
        if "pending" in other.counts():  # that they wait in vain is not said
            self.tally.stuck[str(other.path)] = str(other.counts())
        resumed = launch("resume", str(other.path))
        assert (resumed.code, "queueing 3 runs" in resumed.out) == (0, True), resumed
        launch("cancel", str(other.path))  # they would wait for the nodes behind the sweep that is disturbed
        return True

    def _submit_limit(self, name: str) -> bool:
        """Resume a run where the cluster takes no more jobs."""
        if launch("cancel", str(self.sweep.path), name).code:
            return False
        limit = ("sacctmgr", "-i", "modify", "user", "root", "set")
        self.slurm.call(*limit, "maxsubmitjobs=0")
        told = launch("resume", str(self.sweep.path), name)
        self.slurm.call(*limit, "maxsubmitjobs=-1")
        return told.code == 2 and "takes no more jobs" in told.err

    def _accounting_down(self, name: str) -> bool:
        self.slurm.kill("slurmdbd", signal.SIGTERM)
        launch("status", str(self.sweep.path))
        cancelled = launch("cancel", str(self.sweep.path), name)
        self.slurm.start_accounting()
        assert cancelled.code == 0, cancelled.err
        return True

    def _slow_squeue(self, name: str) -> bool:
        """Cancel a run while squeue takes a minute and more."""
        with _instead(self.folder / "slow_squeue", {"squeue": "sleep 70"}) as environment:
            command = [sys.executable, "-m", "launch", "cancel", str(self.sweep.path), name]
            began = time.monotonic()
            told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        assert time.monotonic() - began < 55
        return True

    def _second_checkout(self, name: str) -> bool:
        """Submit the same plan from another checkout, and resume from it."""
        copy = self.folder / "checkout"
        if not copy.exists():
            for package in ("kv_align", "launch", "analysis", "conf"):
                shutil.copytree(_ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        setting = self.sweep.path / "launch" / "cluster.json"
        code = json.loads(setting.read_text())["code"]
        environment = dict(os.environ, PYTHONPATH=f"{os.environ['PYTHONPATH']}:{copy}")
        for words in (self.sweep.words, ("resume", str(self.sweep.path))):
            command = [sys.executable, "-P", "-m", "launch", *words]
            told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert json.loads(setting.read_text())["code"] == code, told
        return True

    def _fill_disk(self, name: str) -> bool:
        """Fill the disk that the sweep lies on, for some seconds."""
        fill_disk(self.disk)
        time.sleep(3.0)
        assert "failed" not in self.sweep.counts(), self.sweep.counts()
        (self.disk / "filler").unlink()
        return True

    def _resume_if_idle(self) -> None:
        counts = self.sweep.counts()
        if any(state in counts for state in ("failed", "lost", "cancelled", "held", "blocked", "missing")):
            launch("resume", str(self.sweep.path))


def fill_disk(folder: Path) -> None:
    """Leave no byte free on a disk: `filler` takes all of it."""
    with (folder / "filler").open("wb", buffering=0) as filler:
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(folder).free - 2_000_000)
        filler.seek(0, os.SEEK_END)
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))


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
