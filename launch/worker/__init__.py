"""What a job executes.

Jobs that version 0.1.0 queued name `launch.worker.Worker` and `launch.worker.Shell` in their pickles; both are found where
they are now, which is above this folder.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("Worker", "Shell"):
        return getattr(import_module("launch.executors.slurm.task"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
