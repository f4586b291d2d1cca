"""Slurm through submitit: job arrays, split where the cluster's limit is, each element's last line noting its end."""

from __future__ import annotations

import shlex
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from kv_align.runs.errors import ConfigError, invalid_value
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.setting import Setting
from launch.executors.base import Executor, JobState, SchedulerUnavailable
from launch.executors.slurm.errors import complaint
from launch.executors.slurm.jobs import Array, JobMaker
from launch.executors.slurm.query import (
    ENDING,
    call,
    default_partition,
    find_by_name,
    job_states,
    minutes,
    partitions,
    scancel,
    settings,
)
from launch.executors.slurm.schema import SlurmCluster, check_signal
from launch.executors.slurm.task import Shell, Worker
from launch.journal.holds import held_runs
from launch.journal.ledger import UNDER_WAY_S, JobRef, Submission

_JUST_NOW_S = 30.0  # sacct knows a job a moment after sbatch returned


class SlurmExecutor(Executor[SlurmCluster]):
    """Executes runs as Slurm jobs; see `Executor`."""

    schema = SlurmCluster
    ask_every_s = 30.0

    def __init__(self, sweep: SweepDirectory, setting: Setting) -> None:
        super().__init__(sweep, setting)
        self.jobs = JobMaker(setting, self.cluster, self.journal.folder / "jobs")

    def gpus_per_run(self) -> int:
        """Return the GPUs of all nodes of a run."""
        return self.cluster.gpus_per_node * self.cluster.nodes

    def has_accounting(self) -> bool:
        """Whether sacct has anything to answer with."""
        return self._settings.get("AccountingStorageType", "").endswith("slurmdbd")

    def preflight(self, plan: Plan) -> None:
        """Ask Slurm whether it would take every array, and the interpreter whether it can import the packages."""
        if not self._settings:
            raise ConfigError(
                f"cluster={self.cluster.name} is not allowed: no Slurm controller answers here (scontrol show config); "
                "submit on a login node, or use cluster=local."
            )
        known = partitions()
        to_do = [run.id for run in plan.runs if not self.sweep.run(run).is_complete()]
        for array in self.jobs.arrays(plan, to_do, self._largest):
            self._check_resources(array.resources, known)
            told = call("sbatch", "--test-only", text=self.jobs.script(array))
            if told.returncode:
                raise complaint(self.cluster, array.resources, told.stderr)
        self._check_interpreter()

    def _check_resources(self, resources: Mapping[str, Any], known: Mapping[str, str]) -> None:
        check_signal(self.cluster.signal_delay_s, resources["time_min"])
        named = [] if resources["partition"] is None else str(resources["partition"]).split(",")
        for partition in named:
            if partition not in known:
                allowed = f"one of {', '.join(sorted(known))}"
                raise invalid_value(
                    "cluster.partition", resources["partition"], allowed + (", or several" if named[1:] else "")
                )
        asked = named or [default_partition()]
        most = max(minutes(known.get(partition, "infinite")) for partition in asked)
        if resources["time_min"] > most:
            limit = f"at most {most:g}, the limit of {','.join(asked)}"
            raise invalid_value("cluster.time_min", resources["time_min"], limit)

    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> list[str]:
        """Queue the runs: one sbatch per array, behind the prepare job and the canary, before the report."""
        parts = [list(runs[:1]), list(runs[1:])] if canary else [list(runs)]
        first = None if self.cluster.prepare is None else self._single(self.cluster.prepare, "prepare", None)
        needed, after, jobs = first, None, []
        for part in parts:
            found = [self._submit(array, needed, after) for array in self.jobs.arrays(plan, part, self._largest)]
            jobs += [job for _, job in found]
            if canary and found and after is None:
                (after, job) = found[0]
                needed = f"afterok:{job}"
        if self.cluster.report:
            command = f"{self.jobs.python} -m analysis report {shlex.quote(str(self.sweep.path))}"
            self._single(command, "report", "afterany:" + ":".join(jobs))
        return []

    def recover(self) -> None:
        """Note the jobs of submitters that died between sbatch and the journal's next line.

        Raises
        ------
        ConfigError
            While such a submission may still become a job.
        """
        for submission in self.journal.ledger().submissions.values():
            if submission.job is not None or submission.refused:
                continue
            job = find_by_name(_job_name(submission), submission.created, accounting=self.setting.accounting)
            if job is not None:
                self._hand_over(replace(submission, job=job))
                self.journal.submitted(submission.uid, job)
            elif submission.under_way:
                raise ConfigError(
                    f"{self.sweep.path} was being submitted a moment ago by a command that did not finish, and Slurm may "
                    f"still take that in: run this again when {UNDER_WAY_S:.0f} s have passed since."
                )

    def _hand_over(self, submission: Submission) -> None:
        plan = self.sweep.plan()
        assert plan is not None
        arm = next(run.arm for run in plan.runs if run.id == submission.batches[0][0])
        self.jobs.hand_over(submission, self._work(submission), arm)

    def _work(self, submission: Submission) -> list[Worker]:
        return [Worker(str(self.sweep.path), batch, submission.uid) for batch in submission.batches]

    def states(self, jobs: Mapping[str, JobRef], silent: Collection[str] = ()) -> dict[str, JobState]:
        """Ask sacct, and squeue for what is not clear then, once for all."""
        ids = {name: ref.job for name, ref in jobs.items() if ref.job is not None}
        quiet = {ids[name] for name in silent if name in ids}
        known = job_states(ids.values(), accounting=self.setting.accounting, silent=quiet)
        states = {name: known[job] for name, job in ids.items() if job in known}
        for name in jobs.keys() - states.keys():
            if name not in ids and jobs[name].submission.under_way:
                states[name] = JobState("pending", "its submission is under way")
            elif name in ids and time.time() - jobs[name].submission.created < _JUST_NOW_S:
                states[name] = JobState("pending")
        if any(state.phase == "pending" for state in states.values()):
            self._mark_held(states)
        return states

    def _mark_held(self, states: dict[str, JobState]) -> None:
        """Say why a run is held: sacct does not see at once that it is, and never knows what for."""
        plan = self.sweep.plan()
        assert plan is not None
        held = held_runs(plan, self.journal, self.journal.ledger(), hold_arm=self.cluster.hold_arm)
        for name in held.keys() & states.keys():
            started = RunDirectory(self.sweep.runs / name).status_file.exists()  # such a one was not held in Slurm
            if states[name].phase in ("pending", "held") and not started:
                states[name] = JobState("held", held[name])

    def cancel(self, jobs: Mapping[str, JobRef]) -> None:
        """Cancel the jobs all of whose runs are cancelled; ask the others to leave, they are queued again without them.

        Raises
        ------
        ConfigError
            If Slurm does not do it.
        """
        whole, shared = self._jobs_of(self._left(jobs))
        self._told(scancel(whole) or scancel(shared, "--signal=USR2"))

    def withdraw(self, jobs: Mapping[str, JobRef]) -> None:
        """Cancel what may be left of former jobs; one that still has other runs to do passes over these by itself."""
        self._told(scancel(self._jobs_of(self._left(jobs))[0]))

    def _left(self, jobs: Mapping[str, JobRef]) -> dict[str, JobRef]:
        """Leave out what has ended, and what is ending: a second scancel would take the time for its checkpoint from it."""
        states = self.states(jobs)
        over = {name for name, state in states.items() if state.phase == "ended" or state.reason == ENDING}
        return {name: ref for name, ref in jobs.items() if name not in over}

    def _told(self, said: str) -> None:
        if said:
            raise ConfigError(
                f"{self.sweep.path}: scancel says: {said}; the runs count as cancelled and do nothing when their turn comes, "
                "but their jobs may be left: run the same command again."
            )

    def _jobs_of(self, jobs: Mapping[str, JobRef]) -> tuple[list[str], list[str]]:
        """Return the jobs that have nothing to do but these runs, and those that have."""
        ledger = self.journal.ledger()
        whole: list[str] = []
        shared: list[str] = []
        for ref in jobs.values():
            if ref.job is not None:
                others = [
                    name
                    for name in ref.submission.batches[ref.index]
                    if name not in jobs and name not in ledger.cancelled and ledger.jobs[name].uid == ref.uid
                ]
                rest = [name for name in others if not RunDirectory(self.sweep.runs / name).is_complete()]
                (shared if rest else whole).append(ref.job)
        return whole, shared

    @cached_property
    def _settings(self) -> dict[str, str]:
        return settings()

    @property
    def _largest(self) -> int:
        return int(self._settings.get("MaxArraySize", "1001"))

    def _submit(self, array: Array, needed: str | None, after: str | None) -> tuple[str, str]:
        """Queue one array; returns its uid here and its id there."""
        submission = self.journal.submitting(array.batches, uuid.uuid4().hex[:12], after=after)
        sweep = shlex.quote(str(self.sweep.path))
        note_end = f"{self.jobs.python} -m launch.executors.slurm.ending {sweep} {submission.uid} $code"
        last_lines = ["code=$?", note_end, "exit $code"]
        executor = self.jobs.executor(array.resources, _job_name(submission), last_lines, needed)
        executor.update_parameters(array_parallelism=array.throttle)
        try:
            with self._complaints(array.resources), executor.batch():
                jobs = [executor.submit(each) for each in self._work(submission)]
        except SchedulerUnavailable:
            raise  # it may have come through all the same: looked for by its name
        except ConfigError:
            self.journal.refused(submission.uid)
            raise
        job = jobs[0].job_id.partition("_")[0]
        self.journal.submitted(submission.uid, job)
        return submission.uid, job

    def _single(self, command: str, name: str, dependency: str | None) -> str:
        """Queue a shell command; returns the dependency of what must follow its success."""
        resources = {**self.jobs.resources(), "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0}
        with self._complaints(resources):
            job = self.jobs.executor(resources, f"kv-align-{name}", (), dependency).submit(Shell(command))
        return f"afterok:{job.job_id}"

    @contextmanager
    def _complaints(self, resources: Mapping[str, Any]) -> Iterator[None]:
        """Turn what submitit raises when sbatch refuses into one sentence."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            yield
        except (FailedJobError, FailedSubmissionError) as error:
            raise complaint(self.cluster, resources, str(error)) from None

    def _check_interpreter(self) -> None:
        lines = [
            *self.cluster.setup,
            f"cd {shlex.quote(self.setting.code)}",
            f"{self.jobs.python} -c 'import launch.executors.slurm.task'",
        ]
        told = call("bash", "-ec", "\n".join(lines))
        if told.returncode:
            last = (told.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(
                f"cluster.python={self.jobs.python} is not allowed: after cluster.setup it cannot import launch ({last}); "
                "correct cluster.setup or cluster.python."
            )


def _job_name(submission: Submission) -> str:
    return f"kv-align-{submission.uid}"
