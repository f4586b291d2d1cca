"""What a Slurm job does: the callables that submitit pickles, and what a task of a job knows of its place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from kv_align.runs.sweep_dir import PlannedRun
from launch.journal.journal import Journal
from launch.worker.worker import execute


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
        sys.exit(execute(self.sweep, self.runs, self.uid, node_problem=missing_gpu))


@dataclass(frozen=True)
class Shell:
    """A shell command as a job; its exit code is the job's."""

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
        MASTER_ADDR=task.hostnames[0],
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
