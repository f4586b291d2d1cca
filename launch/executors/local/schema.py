"""The keys of a local cluster."""

from __future__ import annotations

from kv_align.config.options import PositiveFloat, PositiveInt
from launch.cluster.schema import OwnCluster
from launch.worker.sharing import cores


class LocalCluster(OwnCluster):
    """A queue with slots on this machine.

    Attributes
    ----------
    slots
        Runs at once; null: `runs_per_gpu` on each GPU, else as many as the cores allow.
    runs_per_gpu
        Runs that share a GPU at most: fewer where the first of them shows that so many do not fit its memory.
    threads_per_run
        Threads of a run at most: all runs at once have no more threads than the machine has cores.
    grace_s
        What a cancelled run has for its checkpoint before it is killed.
    """

    slots: PositiveInt | None
    runs_per_gpu: PositiveInt = 1
    threads_per_run: PositiveInt
    grace_s: PositiveFloat


def slots_of(cluster: LocalCluster, gpus: int) -> int:
    """Return how many runs a machine with so many GPUs does at once."""
    return cluster.slots or gpus * cluster.runs_per_gpu or max(1, cores() // cluster.threads_per_run)
