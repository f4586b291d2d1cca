"""How runs become jobs of Slurm: sbatch by sbatch, with what each waits for, and the journal's lines around it."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.executors.base import ClusterFull, JobState, PartlyQueued, SchedulerUnavailable
from launch.executors.slurm.errors import complaint
from launch.executors.slurm.jobs import Array, JobMaker, script_of
from launch.executors.slurm.query import ArrayLeft, arrays_left, outside_of_jobs, scancel
from launch.executors.slurm.throttle import Line
from launch.journal.journal import Journal
from launch.journal.ledger import PREPARE, REPORT, JobRef, Submission
from launch.journal.processes import ended_here, processes_with
from launch.journal.retry import ending, given_up

_IN_FLIGHT_S = 5.0  # so long the controller may be busy with what an sbatch sent that was killed since
States = Callable[[Mapping[str, JobRef]], dict[str, JobState]]


def job_name(submission: Submission) -> str:
    """Return the name that a submission's jobs have in Slurm."""
    return f"kv-align-{submission.uid}"


def work_of(sweep: SweepDirectory, submission: Submission) -> list[Any]:
    """Return what each of a submission's elements does."""
    from launch.executors.slurm.task import Helper, Worker  # what a run needs is not imported to look at one

    if submission.command is not None:
        return [Helper(str(sweep.path), submission.names[0], submission.uid, submission.command)]
    return [Worker(str(sweep.path), batch, submission.uid) for batch in submission.batches]


def is_being_submitted(submission: Submission, folder: Path) -> bool:
    """Whether a submission may still become a job that nobody has heard of.

    Not where who submitted it was a process of this machine that is gone, and no sbatch of this sweep is left behind.

    Parameters
    ----------
    submission
        Without a job.
    folder
        Where the sweep's job scripts are.
    """
    if not submission.under_way:
        return False
    if time.time() - submission.created < _IN_FLIGHT_S or not ended_here(submission.submitter):
        return True
    return bool(processes_with("sbatch", str(folder)))


class Submitter:
    """Queues runs of one sweep; its lock is held.

    Parameters
    ----------
    sweep, jobs, journal
        Of the sweep.
    states
        Asks Slurm about jobs of it.
    """

    def __init__(self, sweep: SweepDirectory, jobs: JobMaker, journal: Journal, states: States) -> None:
        self.sweep, self.jobs, self.journal, self.states = sweep, jobs, journal, states
        self.cluster = jobs.cluster

    def submit(self, plan: Plan, runs: Sequence[str], largest: int, *, canary: bool) -> None:
        """Queue runs: behind the prepare job and the canary, before the report.

        Parameters
        ----------
        plan, runs, largest
            What is queued, and the most elements that an array may have.
        canary
            Whether one run goes first; where there was a canary before, that is the one.

        Raises
        ------
        PartlyQueued
            If Slurm takes some of them and not the rest.
        ConfigError
            If it takes none.
        """
        first = self._canary(wanted=canary)
        parts = [list(runs[:1]), list(runs[1:])] if canary and first is None else [list(runs)]
        arrays = [
            (array, number) for number, part in enumerate(parts) for array in self.jobs.arrays(plan, part, largest)
        ]
        line = Line(_live_arrays(self.journal), [len(array.batches) for array, _ in arrays], self.cluster.throttle)
        waiting = [(array, share, part) for (array, part), share in zip(arrays, line.wanted, strict=True)]
        other, prepare = self._other_sweep(), self._prepare()
        queued: list[Submission] = []
        try:
            while waiting:
                array, wanted, part = waiting.pop(0)
                after, share = queued[0] if part else first, line.share(wanted)
                needs = [f"afterok:{each.job}" for each in (prepare, after) if each is not None and self._is_left(each)]
                needs += other + line.behind()
                try:
                    queued.append(self._array(array, share, needs, after, prepare))
                except SchedulerUnavailable:  # it may have come through all the same, and keeps its place
                    line.add("", len(array.batches), share)
                    raise
                except ClusterFull:  # a limit on jobs may leave room for a part of it
                    if len(array.batches) == 1:
                        raise
                    waiting[:0] = [(half, own, part) for half, own in zip(array.halves(), _halves(wanted), strict=True)]
                else:
                    line.add(queued[-1].job or "", len(array.batches), share)
        except (ConfigError, OSError) as error:
            if not queued:
                if prepare is not None and not self._is_waited_for(prepare):
                    self._withdraw(PREPARE)
                raise
            number_queued = sum(len(submission.names) for submission in queued)
            raise PartlyQueued(number_queued, len(runs), error) from error
        finally:
            line.set_throttles()
        if self.cluster.report:
            self._report()

    def _canary(self, *, wanted: bool) -> Submission | None:
        """Return the canary of an earlier submission, which what is queued later waits for too; None where it is let go.

        That is where its run was queued anew, or did not finish and no canary is wanted now.
        """
        ledger = self.journal.ledger()
        uids = [submission.after for submission in ledger.submissions.values() if submission.after is not None]
        if not uids:
            return None
        canary = ledger.submissions[uids[-1]]
        (name,) = canary.names
        if ledger.jobs[name].uid != canary.uid:
            return None
        state = self.states({name: ledger.jobs[name]}).get(
            name
        )  # asked before its files, which come before its job's end
        over = state is None or state.phase in ("ended", "gone")
        lost = over or name in ledger.cancelled or given_up(self.journal.attempts(name, canary.uid))
        if not lost or not self._is_left(canary):
            return canary
        if wanted:
            raise ConfigError(
                f"the canary {name} did not finish, and the others are to start only if it does: mend what ended it, then "
                "run resume, which queues both again."
            )
        return None

    def _is_left(self, submission: Submission) -> bool:
        """Whether something of a submission is still to be done."""
        return not all(RunDirectory(self.sweep.runs / name).is_complete() for name in submission.names)

    def _other_sweep(self) -> list[str]:
        """Return the dependency on what is left of the sweep that goes first."""
        after = self.jobs.setting.after
        jobs = _live_arrays(Journal(SweepDirectory(after))) if after else {}
        return [f"afterany:{':'.join(jobs)}"] if jobs else []

    def _array(
        self,
        array: Array,
        throttle: int,
        needs: Sequence[str],
        after: Submission | None,
        prepare: Submission | None,
    ) -> Submission:
        submission = self.journal.submitting(
            array.batches,
            uuid.uuid4().hex[:12],
            after=None if after is None else after.uid,
            prepare=None if prepare is None else prepare.uid,
        )
        sweep = shlex.quote(str(self.sweep.path))
        note_end = f"{self.jobs.python} -m launch.executors.slurm.ending {sweep} {submission.uid} $code"
        lines = ["code=$?", note_end, "exit $code"]
        executor = self.jobs.executor(array.resources, job_name(submission), lines, ",".join(needs) or None)
        executor.update_parameters(array_parallelism=throttle)
        return self._submitted(submission, executor, array.resources)

    def _prepare(self) -> Submission | None:
        """Return the prepare job that runs must wait for; queues it where it has not succeeded yet and does not wait."""
        if self.cluster.prepare is None:
            return None
        ledger = self.journal.ledger()
        former = ledger.jobs.get(PREPARE)
        if former is not None and former.submission.command == self.cluster.prepare and former.job is not None:
            end = ending(self.journal.attempts(PREPARE, former.uid))
            if end.get("cause") == "finished":
                return None
            state = self.states({PREPARE: former}).get(PREPARE)
            if (
                not end
                and PREPARE not in ledger.cancelled
                and state is not None
                and state.phase in ("pending", "running")
            ):
                return former.submission
        self._withdraw(PREPARE)
        return self._helper(PREPARE, self.cluster.prepare, None)

    def _is_waited_for(self, prepare: Submission) -> bool:
        """Whether runs wait for a prepare job: of a former submission, or of one that may have come through unheard."""
        submissions = self.journal.ledger().submissions.values()
        return any(each.prepare == prepare.uid and not each.refused for each in submissions)

    def _report(self) -> None:
        """Queue the report behind all jobs of the sweep, instead of the one that waits."""
        command = f"{self.jobs.python} -m analysis report {shlex.quote(str(self.sweep.path))}"
        try:
            jobs = _live_arrays(self.journal)
            self._withdraw(REPORT)
            self._helper(REPORT, command, "afterany:" + ":".join(jobs) if jobs else None)
        except ConfigError as error:
            print(f"note: the report could not be queued: {error}")

    def _withdraw(self, name: str) -> None:
        """Cancel a helper job that was queued before."""
        ledger = self.journal.ledger()
        ref = ledger.jobs.get(name)
        if ref is None or name in ledger.cancelled:
            return
        self.journal.cancelled([name])
        if ref.job is not None:
            scancel([ref.job])

    def _helper(self, name: str, command: str, dependency: str | None) -> Submission:
        resources = {**self.jobs.resources(), "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0}
        submission = self.journal.submitting([[name]], uuid.uuid4().hex[:12], command=command)
        executor = self.jobs.executor(resources, job_name(submission), (), dependency)
        return self._submitted(submission, executor, resources)

    def _submitted(self, submission: Submission, executor: Any, resources: Mapping[str, Any]) -> Submission:
        try:
            with _as_sentences(self.jobs, resources, script_of(executor)), executor.batch():
                jobs = [executor.submit(work) for work in work_of(self.sweep, submission)]
        except SchedulerUnavailable:
            raise  # it may have come through all the same: looked for by its name
        except ConfigError:
            self.journal.refused(submission.uid)
            raise
        job = jobs[0].job_id.partition("_")[0]
        self.journal.submitted(submission.uid, job)
        return self.journal.ledger().submissions[submission.uid]


def _halves(share: int) -> tuple[int, int]:
    """Return the shares of an array's halves, of which the second may be larger; each has one at least."""
    first = max(1, share // 2)
    return first, max(1, share - first)


def _live_arrays(journal: Journal) -> dict[str, ArrayLeft]:
    """Return what is left of a sweep's arrays, by job, in the order in which they were queued."""
    jobs = {
        ref.submission.job
        for name, ref in journal.ledger().runs.items()
        if ref.submission.job is not None and not (journal.sweep.runs / name / "summary.json").exists()
    }
    return arrays_left(jobs)


@contextmanager
def _as_sentences(jobs: JobMaker, resources: Mapping[str, Any], script: str) -> Iterator[None]:
    """Turn what submitit raises when sbatch refuses into one sentence; hide from sbatch what would overrule the script."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    outside = outside_of_jobs(os.environ, script)
    hidden = {name: value for name, value in os.environ.items() if name not in outside}
    for name in hidden:
        del os.environ[name]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what sbatch says
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        raise complaint(jobs.cluster, resources, str(error)) from None
    finally:
        os.environ.update(hidden)
