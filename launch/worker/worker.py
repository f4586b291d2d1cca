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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from kv_align.config.config import Config
from kv_align.config.schema import validate
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import EXIT_CODES, RunDirectory, State
from kv_align.runs.stopwatch import process_began
from kv_align.runs.sweep_dir import PlannedRun, SweepDirectory
from launch.journal.attempts import end_open_attempt, own_status, start_attempt
from launch.journal.journal import Journal
from launch.journal.pause import finds_space, pause, tell
from launch.journal.retry import BAD_INPUT, DISK_FULL, NODE_FAILURE, cause_of, exit_code_of, given_up
from launch.worker.admission import await_writer, has_attempt_left, is_held, is_wanted
from launch.worker.code import refuse_changed_code

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
NodeProblem = Callable[[Journal, PlannedRun], str]
"""Says in words why this node cannot do a run; empty where it can."""


class Preempted(SystemExit):
    """The process was asked to leave between steps: nothing but unsaved work is lost."""


def execute(
    sweep_path: str,
    runs: Sequence[str],
    uid: str,
    *,
    to_log: bool = True,
    node_problem: NodeProblem | None = None,
) -> int:
    """Do runs of a frozen plan one after the other; returns the exit code, the worst of them.

    An interrupted run ends the whole job, since all of it was asked to leave; so does a full disk. A run that is complete, or
    was given up since it was submitted, is not tried again when the job is requeued for another one; one that was cancelled,
    submitted again, or is held, is not done here. Of several runs, the end of each is noted here as soon as it has ended; of
    one alone, and of one that is killed, by whoever sees this process end. Of the processes of one run, that with RANK=0 (or
    without RANK) keeps the journal.

    Parameters
    ----------
    sweep_path
        Path of the sweep directory.
    runs
        Ids of the runs.
    uid
        Of the submission that they are done for.
    to_log
        Whether what this process prints goes to the runs' log files.
    node_problem
        What is asked before each run starts; a problem is a failure of the node.
    """
    sweep = SweepDirectory(sweep_path)
    journal = Journal(sweep)
    before = {number: signal.signal(number, _leave) for number in _SIGNALS}
    try:
        plan = sweep.frozen_plan()
        planned = {run.id: run for run in plan.runs}
        unknown = [name for name in runs if name not in planned]
        if unknown:
            raise ConfigError(f"{unknown[0]} is not a run of {sweep_path}: use one of the ids that plan shows.")
        codes: list[int] = []
        broken: set[str] = set()  # arms whose code failed just now: all processes of a run must know that at once
        for name in runs:
            directory = sweep.run(planned[name])
            if directory.is_complete():
                _drop_checkpoints(directory)
                continue
            if not is_wanted(journal, name, uid) or is_held(plan, journal, name, broken):
                continue
            attempt = _Attempt(sweep, journal, planned[name], uid, plan.criteria_hash)
            codes.append(attempt.execute(to_log, node_problem))
            if len(runs) > 1 and attempt.rank == 0:
                end_open_attempt(journal, name, uid, codes[-1])
            if codes[-1] in (EXIT_CODES["interrupted"], DISK_FULL):
                return codes[-1]
            status = own_status(directory, journal.attempts(name, uid))
            if attempt.began and cause_of(codes[-1], status) in ("code_error", "bad_input"):
                broken.add(planned[name].arm)
        return next((code for code in codes if code), 0)
    except Preempted:
        return EXIT_CODES["interrupted"]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Attempt:
    """One attempt at one run, in this process."""

    def __init__(
        self, sweep: SweepDirectory, journal: Journal, planned: PlannedRun, uid: str, criteria_hash: str
    ) -> None:
        self.sweep, self.journal, self.planned, self.uid = sweep, journal, planned, uid
        self.criteria_hash = criteria_hash
        self.directory, self.rank = sweep.run(planned), int(os.environ.get("RANK", "0"))
        self.began = False  # stays so where the run was given up before

    def execute(self, to_log: bool, node_problem: NodeProblem | None) -> int:
        """Do the run; whatever goes wrong becomes an exit code and, where that can be written, a note."""
        name = self.planned.id
        try:
            if self.rank == 0 and not finds_space(self.journal):
                tell(f"kv-align: {name} waits: the disk of {self.sweep.path} is full")
                return DISK_FULL
            if to_log:
                print_to(self.journal.log_file(name), self.rank)
            return self._execute(to_log, node_problem)
        except Preempted as preempted:
            status = self.directory.status()
            if self.rank == 0 and status is not None and status.state == "running":  # it could not say so itself
                self.directory.update(status, state="interrupted", reason=f"{preempted}; run it again to go on")
            return _interrupted(f"{name} {preempted}")
        except ConfigError as error:
            if "is being written by another process" in str(
                error
            ):  # it came between the wait and the trainer's own lock
                return _interrupted(str(error))
            return self._note(BAD_INPUT, str(error))
        except Exception as error:
            logging.exception("%s failed", name)
            reason = f"{type(error).__name__}: {error}"
            return self._note(exit_code_of(reason), reason)

    def _execute(self, to_log: bool, node_problem: NodeProblem | None) -> int:
        name, first = self.planned.id, self.rank == 0
        if not first and given_up(self.journal.attempts(name, self.uid)):
            return EXIT_CODES["failed"]
        if first and not has_attempt_left(self.sweep, self.journal, name, self.uid):
            return EXIT_CODES["failed"]
        self.began = True
        if first:
            start_attempt(self.journal, name, self.uid)
            if not await_writer(self.directory):
                return _interrupted(f"{self.directory.path} is still written by an earlier attempt: this one leaves")
            if not is_wanted(self.journal, name, self.uid):
                return EXIT_CODES["finished"]
        refuse_changed_code(self.journal)
        problem = node_problem(self.journal, self.planned) if node_problem is not None else ""
        if problem:
            return self._note(NODE_FAILURE, problem)
        state = _train(self.directory, self.planned, self.criteria_hash, own_process=to_log)
        if state == "finished" and first:
            _drop_checkpoints(self.directory)
        return EXIT_CODES[state]

    def _note(self, code: int, reason: str) -> int:
        tell(f"kv-align: {reason}")
        if code == DISK_FULL:
            pause(self.journal)
        with contextlib.suppress(OSError):  # the disk may be what is broken
            self.journal.add_attempt(self.planned.id, "note", self.uid, reason=reason)
        return code


def _drop_checkpoints(directory: RunDirectory) -> None:
    # The student and the aligner are kept in folders of their own; what is left is mostly optimizer state.
    shutil.rmtree(directory.checkpoints, ignore_errors=True)


def _interrupted(why: str) -> int:
    tell(f"kv-align: {why}")
    return EXIT_CODES["interrupted"]


def _train(directory: RunDirectory, planned: PlannedRun, criteria_hash: str, *, own_process: bool) -> State:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
    config = validate(Config, planned.config)
    from kv_align.experiment.experiment import run

    return run(config, directory.path, criteria_hash, began=process_began() if own_process else None)


def _leave(number: int, frame: FrameType | None) -> None:
    raise Preempted(f"asked to leave by {signal.Signals(number).name} between steps")


def print_to(file: Path, rank: int = 0) -> None:
    """Append what this process and its children print to a file."""
    target = file if rank == 0 else file.with_suffix(f".rank{rank}.log")
    target.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with target.open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
