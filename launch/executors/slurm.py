"""Slurm through submitit: job arrays, split where the cluster's limit is, each element's last line noting its end."""

from __future__ import annotations

import re
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from kv_align.errors import ConfigError, refused
from kv_align.plans import Plan, SweepDirectory
from kv_align.runs import RunDirectory
from launch.cluster import SlurmCluster
from launch.executors.executor import Executor, JobState
from launch.executors.slurm_query import (
    call,
    default_partition,
    find_by_name,
    job_states,
    minutes,
    partitions,
    settings,
)
from launch.holds import held_runs
from launch.journal import Place, Setting, Submission
from launch.worker import Shell, Worker

_JUST_NOW_S = 30.0  # sacct knows a job a moment after sbatch returned
_COMPLAINTS = (
    ("partition", "partition"),
    ("account", "account"),
    ("qos", "qos"),
    ("feature", "constraint"),
    ("array", "throttle"),
    ("time limit", "time_min"),
    ("gres", "gpus_per_node"),
)


class SlurmExecutor(Executor):
    """Executes runs as Slurm jobs; see `Executor`."""

    def __init__(self, sweep: SweepDirectory, setting: Setting) -> None:
        super().__init__(sweep, setting)
        assert isinstance(setting.cluster, SlurmCluster)
        self.cluster = setting.cluster
        self.folder = self.journal.folder / "jobs"

    def has_accounting(self) -> bool:
        """Whether sacct has anything to answer with."""
        return self._settings.get("AccountingStorageType", "").endswith("slurmdbd")

    def preflight(self, plan: Plan) -> None:
        """Ask Slurm whether it would take the jobs, and the interpreter whether it can import the packages."""
        if not self._settings:
            raise ConfigError(
                f"cluster={self.cluster.name} is not allowed: no Slurm controller answers here (scontrol show config); "
                "submit on a login node, or use cluster=local."
            )
        known = partitions()
        for arms in _by_resources(plan, self.setting.resources).values():
            resources = self._resources(arms[0])
            partition = resources["partition"] or default_partition()
            if resources["partition"] is not None and resources["partition"] not in known:
                raise refused("cluster.partition", partition, f"one of {', '.join(sorted(known))}")
            limit = known.get(partition, "infinite")
            if resources["time_min"] > minutes(limit):
                raise refused(
                    "cluster.time_min", resources["time_min"], f"at most {minutes(limit):g}, the limit of {partition}"
                )
            told = call("sbatch", "--test-only", *_flags(self._parameters(resources)), text="#!/bin/bash\ntrue\n")
            if told.returncode:
                raise _complaint(self.cluster, resources, told.stderr)
        self._check_interpreter()

    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> None:
        """Queue the runs: one sbatch per array, behind the prepare job and the canary, before the report."""
        parts = [list(runs[:1]), list(runs[1:])] if canary else [list(runs)]
        first = None if self.cluster.prepare is None else self._single(self.cluster.prepare, "prepare", None)
        needed, after, jobs = first, None, []
        for part in parts:
            found = [self._array(plan, chunk, needed, after) for chunk in self._chunks(plan, part)]
            jobs += [job for _, job in found]
            if canary and found and after is None:
                (after, job) = found[0]
                needed = f"afterok:{job}"
        if self.cluster.report:
            command = f"{self._python} -m analysis report {shlex.quote(str(self.sweep.path))}"
            self._single(command, "report", "afterany:" + ":".join(jobs))

    def recover(self) -> None:
        """Note the jobs of submitters that died between sbatch and the journal's next line."""
        for submission in self.journal.ledger().submissions.values():
            if submission.job is None:
                job = find_by_name(_job_name(submission))
                if job is not None:
                    self.journal.submitted(submission.uid, job)

    def states(self, places: Mapping[str, Place]) -> dict[str, JobState]:
        """Ask sacct, or squeue, once for all."""
        jobs = {name: place.job for name, place in places.items() if place.job is not None}
        known = job_states(jobs.values(), accounting=self.setting.accounting)
        states = {name: known[job] for name, job in jobs.items() if job in known}
        for name in jobs.keys() - states.keys():
            if time.time() - places[name].submission.created < _JUST_NOW_S:
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
            if states[name].phase in ("pending", "held"):
                states[name] = JobState("held", held[name])

    def cancel(self, places: Mapping[str, Place]) -> None:
        """Cancel the jobs all of whose runs are cancelled; ask the others to leave, they are queued again without them."""
        cancelled = self.journal.ledger().cancelled
        whole: list[str] = []
        shared: list[str] = []
        for place in places.values():
            if place.job is not None:
                batch = place.submission.batches[place.index]
                rest = [name for name in batch if name not in cancelled and name not in places]
                rest = [name for name in rest if not RunDirectory(self.sweep.runs / name).is_complete()]
                (shared if rest else whole).append(place.job)
        for options, jobs in (((), whole), (("--signal=USR2",), shared)):
            if jobs:
                call("scancel", *options, *dict.fromkeys(jobs))

    @cached_property
    def _settings(self) -> dict[str, str]:
        return settings()

    @property
    def _python(self) -> str:
        return self.cluster.python or shlex.quote(sys.executable)

    def _resources(self, arm: str) -> dict[str, Any]:
        names = ("partition", "constraint", "time_min", "mem_gb", "cpus_per_task", "gpus_per_node", "nodes")
        own = {name: getattr(self.cluster, name) for name in (*names, "tasks_per_node")}
        return own | self.setting.resources.get(arm, {})

    def _parameters(self, resources: Mapping[str, Any]) -> dict[str, Any]:
        """What a job asks for, by sbatch's names with underscores, which are submitit's."""
        named = {
            "job_name": "kv-align",
            "time": resources["time_min"],
            "mem": f"{round(resources['mem_gb'] * 1024)}M",
            "nodes": resources["nodes"],
            "ntasks_per_node": resources["tasks_per_node"],
            "cpus_per_task": resources["cpus_per_task"],
            "gpus_per_node": resources["gpus_per_node"] or None,
            "partition": resources["partition"],
            "constraint": resources["constraint"],
            "account": self.cluster.account,
            "qos": self.cluster.qos,
        }
        return {key: value for key, value in named.items() if value is not None}

    def _submitit(self, parameters: Mapping[str, Any], last_lines: Sequence[str], dependency: str | None) -> Any:
        import submitit

        exports = ["export HF_HUB_OFFLINE=1"] if self.cluster.offline else []
        threads = parameters["cpus_per_task"]
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=0, python=self.cluster.python)
        executor.update_parameters(
            **parameters,
            **({} if dependency is None else {"dependency": dependency}),
            setup=[
                *self.cluster.setup,
                *exports,
                f"export OMP_NUM_THREADS={threads}",
                f"export PYTHONPATH={shlex.quote(self.setting.code)}:$PYTHONPATH",
                f"cd {shlex.quote(self.setting.code)}",
            ],
            teardown=list(last_lines),
            # Since 22.05 srun does not take it over from the job. A task that fails must not leave the others waiting for it.
            srun_args=["--cpus-per-task", str(threads), "--kill-on-bad-exit=1"],
            signal_delay_s=self.cluster.signal_delay_s,
            stderr_to_stdout=True,
            additional_parameters={"requeue": True, **self.cluster.additional_parameters},
        )
        return executor

    def _chunks(self, plan: Plan, runs: Sequence[str]) -> list[list[str]]:
        """Runs that can be one array: of the same resources, no more than the cluster takes at once."""
        arm_of = {run.id: run.arm for run in plan.runs}
        most = max(1, int(self._settings.get("MaxArraySize", "1001"))) * self.cluster.runs_per_job
        chunks = []
        for arms in _by_resources(plan, self.setting.resources).values():
            chosen = [run for run in runs if arm_of[run] in arms]
            chunks += [chosen[start : start + most] for start in range(0, len(chosen), most)]
        self._throttle = max(1, self.cluster.throttle // max(1, len(chunks)))
        return chunks

    def _array(self, plan: Plan, runs: Sequence[str], needed: str | None, after: str | None) -> tuple[str, str]:
        """Queue one array; returns its uid here and its id there."""
        size = self.cluster.runs_per_job
        batches = [tuple(runs[start : start + size]) for start in range(0, len(runs), size)]
        arm = next(run.arm for run in plan.runs if run.id == runs[0])
        submission = self.journal.submitting(batches, uuid.uuid4().hex[:12], after=after)
        note_end = f"{self._python} -m launch.ending {shlex.quote(str(self.sweep.path))} {submission.uid} $code"
        executor = self._submitit(
            {**self._parameters(self._resources(arm)), "job_name": _job_name(submission)},
            ["code=$?", note_end, "exit $code"],
            needed,
        )
        executor.update_parameters(array_parallelism=self._throttle)
        with _sbatch_complains(self.cluster, self._resources(arm)), executor.batch():
            jobs = [executor.submit(Worker(str(self.sweep.path), batch)) for batch in batches]
        job = jobs[0].job_id.partition("_")[0]
        self.journal.submitted(submission.uid, job)
        return submission.uid, job

    def _single(self, command: str, name: str, dependency: str | None) -> str:
        """Queue a shell command; returns the dependency of what must follow its success."""
        resources = {**self._resources(""), "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0}
        parameters = {**self._parameters(resources), "job_name": f"kv-align-{name}"}
        with _sbatch_complains(self.cluster, resources):
            job = self._submitit(parameters, [], dependency).submit(Shell(command))
        return f"afterok:{job.job_id}"

    def _check_interpreter(self) -> None:
        lines = [
            *self.cluster.setup,
            f"cd {shlex.quote(self.setting.code)}",
            f"{self._python} -c 'import launch.worker'",
        ]
        told = call("bash", "-ec", "\n".join(lines))
        if told.returncode:
            last = (told.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(
                f"cluster.python={self._python} is not allowed: after cluster.setup it cannot import launch ({last}); "
                "correct cluster.setup or cluster.python."
            )


class _sbatch_complains:  # noqa: N801 - a context manager, read as a statement
    """Turns what submitit raises when sbatch refuses into one sentence."""

    def __init__(self, cluster: SlurmCluster, resources: Mapping[str, Any]) -> None:
        self.cluster, self.resources = cluster, resources

    def __enter__(self) -> None:
        """Do nothing yet."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Translate."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        if isinstance(error, FailedJobError | FailedSubmissionError):
            raise _complaint(self.cluster, self.resources, str(error)) from None


def _complaint(cluster: SlurmCluster, resources: Mapping[str, Any], text: str) -> ConfigError:
    lines = [re.sub(r"^\s*(sbatch|allocation)?:?\s*(error|failure):\s*", "", line) for line in text.splitlines()]
    said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing").rstrip(".")
    values = {**cluster.model_dump(), **resources}
    key = next((key for word, key in _COMPLAINTS if word in said.lower()), None)
    if key is None:
        asked = ("mem_gb", "cpus_per_task", "gpus_per_node", "nodes", "time_min")
        shown = ", ".join(f"cluster.{name}={values[name]}" for name in asked)
        return ConfigError(f"{shown} is not allowed: sbatch says: {said}; ask for what a node has (sinfo -N -l).")
    return ConfigError(f"cluster.{key}={values[key]} is not allowed: sbatch says: {said}; correct cluster.{key}.")


def _by_resources(plan: Plan, resources: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for arm in plan.arms:
        groups.setdefault(repr(sorted(resources.get(arm, {}).items())), []).append(arm)
    return groups


def _flags(parameters: Mapping[str, Any]) -> list[str]:
    """The same parameters as sbatch options."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in parameters.items()]


def _job_name(submission: Submission) -> str:
    return f"kv-align-{submission.uid}"
