"""The keys of a local cluster."""

from __future__ import annotations

from kv_align.config.options import PositiveFloat, PositiveInt
from launch.cluster.schema import OwnCluster


class LocalCluster(OwnCluster):
    """A queue with slots on this machine.

    Attributes
    ----------
    slots
        Runs at once; null: one per GPU, else as many as the cores allow.
    threads_per_run
        Threads of a run.
    grace_s
        What a cancelled run has for its checkpoint before it is killed.
    """

    slots: PositiveInt | None
    threads_per_run: PositiveInt
    grace_s: PositiveFloat
