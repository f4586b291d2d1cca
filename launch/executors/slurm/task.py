"""What a Slurm job does: the callables that submitit pickles, and what a task of a job knows of its place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

from kv_align.runs.run_dir import EXIT_CODES
from kv_align.runs.sweep_dir import PlannedRun, SweepDirectory
from launch.journal.journal import Journal
from launch.journal.processes import this_process
from launch.worker.admission import is_wanted
from launch.worker.packed import PackedJob
from launch.worker.worker import execute, print_to


@dataclass(frozen=True)
class Worker:
    """Does runs: names only, so that it means the same after every requeue.

    Attributes
    ----------
    sweep
        Path of the sweep directory.
    runs
        Ids of the runs.
    uid
        Of the submission that they are done for.
    """

    sweep: str
    runs: tuple[str, ...]
    uid: str

    def __call__(self) -> None:
        """Do the runs and leave the process with their exit code."""
        join_tasks()
        packed = self._packed() if len(self.runs) > 1 else None
        sys.exit(packed.execute() if packed else execute(self.sweep, self.runs, self.uid, node_problem=missing_gpu))

    def _packed(self) -> PackedJob | None:
        """Return who does the runs where several are done at once, each as a job of it alone would do it."""
        sweep = SweepDirectory(self.sweep)
        setting, plan = Journal(sweep).setting(), sweep.plan()
        if setting is None or plan is None:
            return None
        arm = next((run.arm for run in plan.runs if run.id in self.runs), "")
        options = {**setting.cluster.model_dump(), **setting.resources.get(arm, {})}
        if options.get("runs_per_gpu", 1) == 1 or options["nodes"] * options["tasks_per_node"] > 1:
            return None
        own = (sys.executable, "-m", "launch.executors.slurm", self.sweep, self.uid)
        return PackedJob(
            self.sweep,
            self.runs,
            self.uid,
            per_gpu=options["runs_per_gpu"],
            cores=options["cpus_per_task"],
            command=lambda name: (*own, name),
        )


@dataclass(frozen=True)
class Helper:
    """A shell command that is a job of the sweep: its attempts are on record, and its exit code is the job's.

    Attributes
    ----------
    sweep
        Path of the sweep directory.
    name
        Its name in the journal.
    uid
        Of its submission.
    command
        What the shell does.
    """

    sweep: str
    name: str
    uid: str
    command: str

    def __call__(self) -> None:
        """Run the command and leave the process with its exit code."""
        journal = Journal(SweepDirectory(self.sweep))
        if not is_wanted(journal, self.name, self.uid):
            sys.exit(EXIT_CODES["failed"])
        print_to(journal.log_file(self.name))
        journal.add_attempt(self.name, "start", self.uid, **this_process())
        code = subprocess.run(self.command, shell=True, check=False).returncode
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):  # with its job, which may be queued again
            sys.exit(EXIT_CODES["interrupted"])
        cause = "code_error" if code else "finished"
        journal.add_attempt(self.name, "end", self.uid, cause=cause, exit_code=code, retry=False)
        sys.exit(code if 0 <= code < 256 else EXIT_CODES["failed"])


@dataclass(frozen=True)
class Shell:
    """A shell command as a job of version 0.1.0; its exit code is the job's."""

    command: str

    def __call__(self) -> None:
        """Run the command and leave the process with its exit code."""
        sys.exit(subprocess.run(self.command, shell=True, check=False).returncode)


def join_tasks() -> None:
    """Tell this process its place among the tasks of its job, by the variables that torch and Accelerate read."""
    if int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return
    from submitit import JobEnvironment

    task = JobEnvironment()
    os.environ.update(
        RANK=str(task.global_rank),
        WORLD_SIZE=str(task.num_tasks),
        LOCAL_RANK=str(task.local_rank),
        LOCAL_WORLD_SIZE=str(task.num_tasks // task.num_nodes),
        # A node may not know its own name; between several it must be known.
        MASTER_ADDR="127.0.0.1" if task.num_nodes == 1 else task.hostnames[0],
        MASTER_PORT=str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
    )


def missing_gpu(journal: Journal, planned: PlannedRun) -> str:
    """Say so where this job was given GPUs and torch sees none: on the CPU a run would take the whole of its time limit."""
    setting = journal.setting()
    if setting is None:
        return ""
    options = {**setting.cluster.model_dump(), **setting.resources.get(planned.arm, {})}
    if not options.get("require_gpu") or not options["gpus_per_node"]:
        return ""
    import torch

    if torch.cuda.device_count():
        return ""
    host, visible = socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return (
        f"its job was given cluster.gpus_per_node={options['gpus_per_node']}, but torch sees no GPU on {host} "
        f"(CUDA_VISIBLE_DEVICES is {visible}): mend the node or cluster.setup, or set cluster.require_gpu=false"
    )
