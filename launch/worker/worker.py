"""What a job executes: the frozen configuration of each of its runs, one after the other.

The one module of launch that imports the trainer, and only when a run is about to start. Its exit code tells the scheduler
the truth (`kv_align.runs.run_dir.EXIT_CODES`). `python -m launch.worker SWEEP UID RUN...` is the same from a shell; UID is
the submission that it works for, and a run that was submitted again since is left to its new job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from kv_align.config.config import Config
from kv_align.config.schema import validate
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import EXIT_CODES, RunDirectory, State
from kv_align.runs.sweep_dir import PlannedRun, SweepDirectory
from launch.cluster import SlurmCluster
from launch.journal.journal import Journal
from launch.journal.processes import Identity, identify
from launch.journal.retry import BAD_INPUT, NODE_FAILURE, is_node_failure
from launch.worker.admission import await_writer, has_attempt_left, is_wanted

_LEAVE = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class Worker:
    """The callable that submitit pickles: names only, so that it means the same after every requeue.

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
        sys.exit(execute(self.sweep, self.runs, self.uid))


@dataclass(frozen=True)
class Shell:
    """A shell command as a submitit job; its exit code is the job's."""

    command: str

    def __call__(self) -> None:
        """Run the command and leave the process with its exit code."""
        sys.exit(subprocess.run(self.command, shell=True, check=False).returncode)


class Left(SystemExit):
    """The process was asked to leave between steps: nothing but unsaved work is lost."""


def execute(sweep_path: str, runs: Sequence[str], uid: str, *, to_log: bool = True) -> int:
    """Do runs of a frozen plan one after the other; returns the exit code, the worst of them.

    An interrupted run ends the whole job, since all of it was asked to leave. A run that was given up since it was
    submitted is not tried again when the job is requeued for another one; one that was cancelled, or submitted again, is
    not done here.

    Parameters
    ----------
    sweep_path, runs, uid
        See `Worker`.
    to_log
        Whether what this process prints goes to the runs' log files.
    """
    sweep = SweepDirectory(sweep_path)
    journal = Journal(sweep)
    before = {number: signal.signal(number, _leave) for number in _LEAVE}
    try:
        plan = sweep.plan()
        if plan is None:
            raise ConfigError(f"{sweep_path} has no frozen plan: submit the sweep with python -m launch submit.")
        planned = {run.id: run for run in plan.runs}
        unknown = [name for name in runs if name not in planned]
        if unknown:
            raise ConfigError(f"{unknown[0]} is not a run of {sweep_path}: use one of the ids that plan shows.")
        codes = []
        for name in runs:
            if not is_wanted(journal, name, uid):
                continue
            if to_log:
                _print_to(journal.log_file(name))
            codes.append(_one(sweep, journal, planned[name], uid))
            if codes[-1] == EXIT_CODES["interrupted"]:
                return codes[-1]
        return next((code for code in codes if code), 0)
    except Left:
        return EXIT_CODES["interrupted"]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one(sweep: SweepDirectory, journal: Journal, planned: PlannedRun, uid: str) -> int:
    directory, rank, name = sweep.run(planned), _distribute(), planned.id
    if rank == 0:
        if not has_attempt_left(sweep, journal, name, uid):
            return EXIT_CODES["failed"]
        me = {"host": socket.gethostname(), **asdict(identify(os.getpid()) or Identity(os.getpid(), ""))}
        journal.add_attempt(name, "start", uid, job=os.environ.get("SLURM_JOB_ID", ""), **me)
    try:
        if rank == 0 and not await_writer(directory):
            return _left(f"{directory.path} is still written by an earlier attempt: this one leaves")
        if rank == 0 and not is_wanted(journal, name, uid):
            return EXIT_CODES["finished"]
        no_gpu = _missing_gpu(journal, planned)
        if no_gpu:
            return _broken(journal, name, uid, no_gpu)
        state = _run(directory, planned)
    except Left as left:
        state = "interrupted"
        status = directory.status()
        if rank == 0 and status is not None and status.state == "running":
            directory.update(status, state=state, reason=f"{left.code}; run it again to go on")
    except ConfigError as error:
        if "is being written by another process" in str(error):  # it came between the wait and the trainer's own lock
            return _left(str(error))
        print(f"kv-align: {error}", file=sys.stderr, flush=True)
        journal.add_attempt(name, "note", uid, reason=str(error))
        return BAD_INPUT
    except Exception as error:
        logging.exception("%s failed", name)
        reason = f"{type(error).__name__}: {error}"
        if is_node_failure(reason):
            return _broken(journal, name, uid, reason)
        journal.add_attempt(name, "note", uid, reason=reason)
        return EXIT_CODES["failed"]
    if state == "finished" and rank == 0:
        # The student and the aligner are kept in folders of their own; what is left is mostly optimizer state.
        shutil.rmtree(directory.checkpoints, ignore_errors=True)
    return EXIT_CODES[state]


def _left(why: str) -> int:
    print(f"kv-align: {why}", file=sys.stderr, flush=True)
    return EXIT_CODES["interrupted"]


def _broken(journal: Journal, name: str, uid: str, why: str) -> int:
    print(f"kv-align: {why}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # the disk may be what is broken
        journal.add_attempt(name, "note", uid, reason=why)
    return NODE_FAILURE


def _missing_gpu(journal: Journal, planned: PlannedRun) -> str:
    """Say so where this job was given GPUs and torch sees none: on the CPU a run would take the whole of its time limit."""
    setting = journal.setting()
    if setting is None or not isinstance(setting.cluster, SlurmCluster) or not setting.cluster.require_gpu:
        return ""
    given = setting.resources.get(planned.arm, {}).get("gpus_per_node", setting.cluster.gpus_per_node)
    if not given:
        return ""
    import torch

    if torch.cuda.device_count():
        return ""
    host, seen = socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return (
        f"its job was given cluster.gpus_per_node={given}, but torch sees no GPU on {host} (CUDA_VISIBLE_DEVICES is {seen}): "
        "mend the node or cluster.setup, or set cluster.require_gpu=false"
    )


def _run(directory: RunDirectory, planned: PlannedRun) -> State:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
    config = validate(Config, planned.config)
    from kv_align.experiment.experiment import run

    return run(config, directory.path)


def _leave(number: int, frame: FrameType | None) -> None:
    raise Left(f"asked to leave by {signal.Signals(number).name} between steps")


def _distribute() -> int:
    """Tell Accelerate its place among the tasks of the job, if there are several; returns the rank."""
    tasks = int(os.environ.get("SLURM_NTASKS", "1")) if "SUBMITIT_EXECUTOR" in os.environ else 1
    if tasks == 1:
        return 0
    from submitit import JobEnvironment

    place = JobEnvironment()
    os.environ.update(
        RANK=str(place.global_rank),
        WORLD_SIZE=str(place.num_tasks),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.num_tasks // place.num_nodes),
        MASTER_ADDR=place.hostnames[0],
        MASTER_PORT=str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
    )
    return int(place.global_rank)


def _print_to(file: Path) -> None:
    """Append what this process and its children print to a file."""
    rank = int(os.environ.get("SLURM_PROCID", "0")) if "SUBMITIT_EXECUTOR" in os.environ else 0
    target = file if rank == 0 else file.with_suffix(f".rank{rank}.log")
    target.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with target.open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
