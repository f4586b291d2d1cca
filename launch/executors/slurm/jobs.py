"""What is handed to sbatch: the arrays that a sweep is cut into, and what each of them asks for."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kv_align.runs.sweep_dir import Plan
from launch.cluster.setting import Setting
from launch.executors.slurm.schema import SlurmCluster
from launch.journal.ledger import Submission


@dataclass(frozen=True)
class Array:
    """One sbatch: `batches[i]` is done by element i; `resources` are what each asks for, by the cluster's keys."""

    batches: tuple[tuple[str, ...], ...]
    resources: dict[str, Any]

    def halves(self) -> tuple[Array, Array]:
        """Return the array in two."""
        middle = len(self.batches) // 2
        return replace(self, batches=self.batches[:middle]), replace(self, batches=self.batches[middle:])


class JobMaker:
    """Makes arrays and their submitit executors.

    Parameters
    ----------
    setting, cluster
        How the sweep is executed.
    folder
        Where submitit keeps scripts, pickles and logs.
    """

    def __init__(self, setting: Setting, cluster: SlurmCluster, folder: Path) -> None:
        self.setting, self.cluster, self.folder = setting, cluster, folder

    @property
    def python(self) -> str:
        """The interpreter on the nodes, as a shell word."""
        return self.cluster.python or shlex.quote(sys.executable)

    def resources(self, arm: str = "") -> dict[str, Any]:
        """Return what the runs of an arm ask for, by the cluster's keys."""
        names = ("partition", "constraint", "time_min", "mem_gb", "cpus_per_task", "gpus_per_node", "nodes")
        own = {name: getattr(self.cluster, name) for name in (*names, "tasks_per_node")}
        return own | self.setting.resources.get(arm, {})

    def arrays(self, plan: Plan, runs: Sequence[str], largest: int) -> list[Array]:
        """Cut runs into arrays: each of the same resources, and no larger than the cluster takes."""
        arms: dict[str, list[str]] = {}
        for arm in plan.arms:
            arms.setdefault(repr(sorted(self.setting.resources.get(arm, {}).items())), []).append(arm)
        arm_of, size = {run.id: run.arm for run in plan.runs}, self.cluster.runs_per_job
        most = max(1, largest) * size
        cut = []
        for same in arms.values():
            chosen = [run for run in runs if arm_of[run] in same]
            cut += [(same[0], chosen[start : start + most]) for start in range(0, len(chosen), most)]
        return [
            Array(
                tuple(tuple(chunk[start : start + size]) for start in range(0, len(chunk), size)), self.resources(arm)
            )
            for arm, chunk in cut
        ]

    def executor(
        self, resources: Mapping[str, Any], name: str, last_lines: Sequence[str] = (), dependency: str | None = None
    ) -> Any:
        """Return a submitit executor for jobs that ask for these resources."""
        import submitit

        exports = ["export HF_HUB_OFFLINE=1"] if self.cluster.offline else []
        threads, code = resources["cpus_per_task"], shlex.quote(self.setting.code)
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=0, python=self.cluster.python)
        executor.update_parameters(
            **self._parameters(resources, name),
            **({} if dependency is None else {"dependency": dependency}),
            setup=[
                *self.cluster.setup,
                *exports,
                f"export OMP_NUM_THREADS={threads}",
                f"export PYTHONPATH={code}:$PYTHONPATH",
                # Other code that is installed would do the runs otherwise.
                f"cd {code} || {{ echo the code in {code} is gone; exit 1; }}",
            ],
            teardown=list(last_lines),
            # Since 22.05 srun does not take it over from the job. A task that fails must not leave the others waiting for it.
            srun_args=["--cpus-per-task", str(threads), "--kill-on-bad-exit=1"],
            signal_delay_s=self.cluster.signal_delay_s,
            stderr_to_stdout=True,
            additional_parameters={"requeue": True, **self.cluster.additional_parameters},
        )
        return executor

    def hand_over(self, submission: Submission, work: Sequence[Any], arm: str) -> None:
        """Give a job's elements what they are to do, where their submitter died before submitit had named its files.

        Parameters
        ----------
        submission
            Whose job is known.
        work
            What each of its elements does.
        arm
            Of its runs, or one that asks for the same.
        """
        from submitit.core.utils import DelayedSubmission, JobPaths

        for index, element in enumerate(work):
            file = JobPaths(self.folder, submission.job_of(index)).submitted_pickle
            if not file.exists():
                delayed = DelayedSubmission(element)
                delayed.set_timeout(self.resources(arm)["time_min"], 0)
                delayed.dump(file)

    def script(self, array: Array) -> str:
        """Return the script that the array's sbatch would be given, but for what its jobs do."""
        executor = self.executor(array.resources, "kv-align-test")
        executor.update_parameters(array_parallelism=self.cluster.throttle)
        if len(array.batches) > 1:
            executor.parameters["map_count"] = len(array.batches)
        return script_of(executor)

    def _parameters(self, resources: Mapping[str, Any], name: str) -> dict[str, Any]:
        """What a job asks for, by sbatch's names with underscores, which are submitit's."""
        named = {
            "job_name": name,
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


def script_of(executor: Any) -> str:
    """Return the script that a submitit executor writes, but for what its jobs do."""
    return str(executor._make_submission_file_text("true", "test"))
