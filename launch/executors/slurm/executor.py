"""Slurm through submitit: job arrays, split where the cluster's limits are, each element's last line noting its end."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from kv_align.runs.errors import ConfigError, invalid_value
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.setting import Setting
from launch.executors.base import ClusterFull, Executor, JobState, SchedulerUnavailable, SubmissionUnderWay
from launch.executors.slurm.errors import complaint
from launch.executors.slurm.jobs import JobMaker
from launch.executors.slurm.query import ENDING, call, find_by_name, job_states, scancel
from launch.executors.slurm.schema import SlurmCluster, check_signal
from launch.executors.slurm.site import default_partition, minutes, nodes_out_of_service, partitions, settings
from launch.executors.slurm.submission import Submitter, is_being_submitted, job_name, work_of
from launch.journal.holds import held_runs
from launch.journal.ledger import UNDER_WAY_S, JobRef, Submission

_JUST_NOW_S = 30.0  # sacct knows a job a moment after sbatch returned
_GONE_S, _LOOK_S = 20.0, 0.5
"""So long a former job is waited for before its runs are queued anew, and between two looks."""
_CANCEL_ASKS_S = 10.0  # one who cancels is not kept waiting by a Slurm that is slow to answer


class SlurmExecutor(Executor[SlurmCluster]):
    """Executes runs as Slurm jobs; see `Executor`."""

    schema = SlurmCluster
    ask_every_s = 30.0
    can_follow = True

    def __init__(self, sweep: SweepDirectory, setting: Setting, plan: Plan | None = None) -> None:
        super().__init__(sweep, setting, plan)
        self.jobs = JobMaker(setting, self.cluster, self.journal.folder / "jobs")

    def gpus_per_run(self) -> int:
        """Return the GPUs of all nodes of a run."""
        return self.cluster.gpus_per_node * self.cluster.nodes

    def most_at_once(self) -> int:
        """Return what the throttle allows, in jobs of so many runs at once."""
        gpus = max(1, self.cluster.gpus_per_node)
        packed = (
            min(self.cluster.runs_per_job, self.cluster.runs_per_gpu * gpus) if self.cluster.runs_per_gpu > 1 else 1
        )
        return self.cluster.throttle * packed

    def has_accounting(self) -> bool:
        """Whether sacct has anything to answer with."""
        return self._settings.get("AccountingStorageType", "").endswith("slurmdbd")

    def preflight(self, plan: Plan, runs: Collection[str]) -> list[str]:
        """Ask Slurm whether it would take every array, and the interpreter whether it can import the packages."""
        if not self._settings:
            raise SchedulerUnavailable(
                f"cluster={self.cluster.name} is not allowed: no Slurm controller answers here (scontrol show config); "
                "submit on a login node, or use cluster=local."
            )
        known, notes = partitions(), []
        to_do = [run.id for run in plan.runs if run.id in runs]
        for array in self.jobs.arrays(plan, to_do, self._largest):
            self._check_resources(array.resources, known)
            result = call("sbatch", "--test-only", text=self.jobs.script(array))
            if not result.returncode:
                continue
            problem = complaint(self.cluster, array.resources, result.stderr)
            if isinstance(problem, ClusterFull):
                continue  # some of it may fit: seen when it is submitted
            asked = str(array.resources["partition"] or default_partition())
            if not nodes_out_of_service(asked):
                raise problem
            notes.append(f"all nodes of {asked} are down or drained now, so its jobs wait until some come back")
        self._check_interpreter()
        return list(dict.fromkeys(notes))

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

    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> None:
        """Queue the runs: one sbatch per array, behind the prepare job and the canary, before the report."""
        Submitter(self.sweep, self.jobs, self.journal, self.states).submit(plan, runs, self._largest, canary=canary)

    def recover(self) -> None:
        """Note the jobs of submitters that died between sbatch and the journal's next line.

        Raises
        ------
        SubmissionUnderWay
            While such a submission may still become a job.
        """
        for submission in self.journal.ledger().submissions.values():
            if submission.job is not None or submission.refused:
                continue
            under_way = is_being_submitted(submission, self.jobs.folder)  # before it is asked for
            job = find_by_name(job_name(submission), submission.created, accounting=self.setting.accounting)
            if job is not None:
                self._hand_over(replace(submission, job=job))
                self.journal.submitted(submission.uid, job)
            elif under_way:
                raise SubmissionUnderWay(
                    f"{self.sweep.path} was being submitted a moment ago by a command that did not finish, and Slurm may "
                    f"still take that in: run this again when {UNDER_WAY_S:.0f} s have passed since."
                )

    def _hand_over(self, submission: Submission) -> None:
        arm = next((run.arm for run in self.plan.runs if run.id == submission.names[0]), "")
        self.jobs.hand_over(submission, work_of(self.sweep, submission), arm)

    def states(
        self, jobs: Mapping[str, JobRef], silent: Collection[str] = (), timeout_s: float | None = None
    ) -> dict[str, JobState]:
        """Ask sacct, and squeue for what is not clear then, once for all."""
        ids = {name: ref.job for name, ref in jobs.items() if ref.job is not None}
        quiet = {ids[name] for name in silent if name in ids}
        known = job_states(ids.values(), accounting=self.setting.accounting, silent=quiet, timeout_s=timeout_s)
        states = {name: known[job] for name, job in ids.items() if job in known}
        for name in jobs.keys() - states.keys():
            if name not in ids and is_being_submitted(jobs[name].submission, self.jobs.folder):
                states[name] = JobState("pending", "its submission is under way")
            elif name in ids and time.time() - jobs[name].submission.created < _JUST_NOW_S:
                states[name] = JobState("pending")
        self._mark_held(states)
        self._mark_behind(jobs, states)
        return states

    def _mark_held(self, states: dict[str, JobState]) -> None:
        """Say why a run is held: Slurm does not see at once that it is, and never knows what for."""
        if all(state.phase == "running" for state in states.values()):
            return
        held = held_runs(self.plan, self.journal, self.journal.ledger(), hold_arm=self.cluster.hold_arm)
        for name in held.keys() & states.keys():
            started = RunDirectory(self.sweep.runs / name).status_file.exists()  # such a one was not held
            if states[name].phase != "running" and not started:
                states[name] = JobState("held", held[name])

    def _mark_behind(self, jobs: Mapping[str, JobRef], states: dict[str, JobState]) -> None:
        """Say so where what a run waits for cannot start itself."""
        submissions = {ref.uid: ref.submission for ref in jobs.values()}
        for name, state in list(states.items()):
            if state.phase != "pending":
                continue
            for uid in (jobs[name].submission.prepare, jobs[name].submission.after):
                first = [] if uid not in submissions else submissions[uid].names
                stuck = next((other for other in first if _is_stuck(states.get(other))), None)
                if stuck is not None:
                    states[name] = JobState("blocked", f"waits for {stuck}, which is {states[stuck].reason}")

    def cancel(self, jobs: Mapping[str, JobRef]) -> None:
        """Cancel the jobs all of whose runs are cancelled; ask the others to leave, they are queued again without them.

        Raises
        ------
        ConfigError
            If Slurm does not do it.
        """
        whole, shared = self._jobs_of(jobs)
        self._refuse_failure(scancel(whole) or scancel(shared, "--signal=USR2"))

    def withdraw(self, jobs: Mapping[str, JobRef]) -> None:
        """Cancel what may be left of former jobs; one that still has other runs to do passes over these by itself.

        And see them gone: a job that ends to be queued again takes no scancel until it is, and would stand beside the new.
        """
        whole, _ = self._jobs_of(jobs)
        self._refuse_failure(scancel(whole))
        deadline = time.monotonic() + _GONE_S
        while whole and time.monotonic() < deadline:
            try:
                known = job_states(whole, accounting=False, timeout_s=_CANCEL_ASKS_S)
            except SchedulerUnavailable:
                return
            whole = [job for job in whole if job in known and known[job].phase != "ended"]
            self._refuse_failure(scancel([job for job in whole if known[job].reason != ENDING]))
            if whole:
                time.sleep(_LOOK_S)

    def clear_away(self) -> None:
        """Cancel what waits in the queue though all its runs are done, or another job's by now."""
        ledger = self.journal.ledger()
        jobs = {
            submission.job_of(index)
            for submission in ledger.submissions.values()
            if submission.job is not None
            for index, batch in enumerate(submission.batches)
            if all(
                RunDirectory(self.sweep.runs / name).is_complete() or ledger.jobs[name].uid != submission.uid
                for name in batch
            )
        }
        with contextlib.suppress(SchedulerUnavailable):  # they do nothing but stand there
            known = job_states(jobs, accounting=False)
            scancel(
                [job for job in sorted(jobs) if job in known and known[job].phase in ("pending", "held", "blocked")]
            )

    def _refuse_failure(self, message: str) -> None:
        if message:
            raise ConfigError(
                f"{self.sweep.path}: scancel says: {message}; the runs count as cancelled and do nothing when their turn "
                "comes, but their jobs may be left: run the same command again."
            )

    def _jobs_of(self, jobs: Mapping[str, JobRef]) -> tuple[list[str], list[str]]:
        """Return all jobs that these runs ever had and that may be left: those with nothing else to do, and those that have.

        Not only the last of each run: that may have been refused while an earlier one comes back from a requeue. A job that
        is ending may come back too, which scancel keeps it from; it takes no time for a checkpoint from one that does not.
        """
        ledger = self.journal.ledger()
        batches = {
            submission.job_of(index): (submission, batch)
            for submission in ledger.submissions.values()
            if submission.job is not None
            for index, batch in enumerate(submission.batches)
            if not jobs.keys().isdisjoint(batch)
        }
        try:
            known = job_states(batches, accounting=self.setting.accounting, timeout_s=_CANCEL_ASKS_S)
        except SchedulerUnavailable:  # the journal knows the jobs, and scancel passes over those that have ended
            known = {}
        whole: list[str] = []
        shared: list[str] = []
        for job, (submission, batch) in batches.items():
            state = known.get(job)
            if state is not None and state.phase == "ended":
                continue
            others = [
                name
                for name in batch
                if name not in jobs and name not in ledger.cancelled and ledger.jobs[name].uid == submission.uid
            ]
            if all(RunDirectory(self.sweep.runs / name).is_complete() for name in others):
                whole.append(job)
            elif state is None or state.reason != ENDING:
                shared.append(job)
        return whole, shared

    @cached_property
    def _settings(self) -> dict[str, str]:
        return settings()

    @property
    def _largest(self) -> int:
        return int(self._settings.get("MaxArraySize", "1001"))

    def _check_interpreter(self) -> None:
        lines = [
            *self.cluster.setup,
            f"cd {shlex.quote(self.setting.code)}",
            f"{self.jobs.python} -c 'import launch.executors.slurm.task'",
        ]
        result = call("bash", "-ec", "\n".join(lines))
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(
                f"cluster.python={self.jobs.python} is not allowed: after cluster.setup it cannot import launch ({last}); "
                "correct cluster.setup or cluster.python."
            )


def _is_stuck(state: JobState | None) -> bool:
    return state is not None and state.phase in ("held", "blocked")
