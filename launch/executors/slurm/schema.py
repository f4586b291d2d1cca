"""The keys of a Slurm cluster."""

from __future__ import annotations

from typing import Any, Literal

from kv_align.config.options import NonNegativeInt, PositiveFloat, PositiveInt
from kv_align.runs.errors import invalid_value
from kv_align.runs.values import is_one_line
from launch.cluster.schema import OwnCluster


class SlurmCluster(OwnCluster):
    """Job arrays. Names follow sbatch and submitit; null leaves it to the cluster's own default.

    Attributes
    ----------
    throttle
        How many runs may run at once.
    runs_per_job
        Runs that one array element does: for short runs.
    runs_per_gpu
        How many of these it does at once on each of its GPUs, at most: fewer where the first of them shows that so many do
        not fit its memory. The job's cores are shared out.
    setup
        Shell lines before each job, such as `module load cuda` or the activation of an environment.
    python
        Command of the interpreter on the nodes; null: the one that submits.
    prepare
        A shell command that a job of its own runs before all others; null: none.
    require_gpu
        Whether a job that was given GPUs and whose trainer sees none is a failure of its node, instead of a run on the CPU.
    signal_delay_s
        A job is asked to leave this long before its time limit; less than that limit.
    report
        Whether a last job writes the report, also when some runs failed.
    additional_parameters
        Any other sbatch option, by its long name.
    """

    kind: Literal["slurm"]
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    time_min: PositiveInt
    mem_gb: PositiveFloat
    cpus_per_task: PositiveInt
    gpus_per_node: NonNegativeInt
    nodes: PositiveInt
    tasks_per_node: PositiveInt
    throttle: PositiveInt
    runs_per_job: PositiveInt
    runs_per_gpu: PositiveInt = 1
    signal_delay_s: PositiveInt
    require_gpu: bool
    setup: list[str]
    python: str | None
    prepare: str | None
    report: bool
    additional_parameters: dict[str, Any]

    def check(self) -> None:
        """Refuse to ask a job to leave before it has begun, and to pack runs that cannot be packed."""
        check_signal(self.signal_delay_s, self.time_min)
        for key, value in (
            *self,
            *((f"additional_parameters.{key}", each) for key, each in self.additional_parameters.items()),
        ):
            # A line break would begin a line of the job's script; those of setup and prepare are meant as such.
            if key != "prepare" and isinstance(value, str) and not is_one_line(value):
                raise invalid_value(f"cluster.{key}", value, "text on one line")
        if self.runs_per_gpu == 1:
            return
        if self.runs_per_gpu > self.runs_per_job:
            allowed = f"at most cluster.runs_per_job={self.runs_per_job}, the runs of a job"
            raise invalid_value("cluster.runs_per_gpu", self.runs_per_gpu, allowed)
        if self.nodes * self.tasks_per_node > 1:
            allowed = f"1 with cluster.nodes={self.nodes} and cluster.tasks_per_node={self.tasks_per_node}"
            raise invalid_value("cluster.runs_per_gpu", self.runs_per_gpu, allowed)


def check_signal(signal_delay_s: int, time_min: int) -> None:
    """Refuse to ask a job to leave before it has begun."""
    if signal_delay_s >= time_min * 60:
        raise invalid_value(
            "cluster.signal_delay_s", signal_delay_s, f"less than the {time_min * 60} s of cluster.time_min={time_min}"
        )
