"""What every executor does; `make_executor` imports only the one that is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kv_align.plans import Plan, SweepDirectory
from launch.journal import Journal, Place, Setting

Phase = Literal["pending", "held", "running", "ended", "gone"]


@dataclass(frozen=True)
class JobState:
    """What the scheduler knows of a run's job.

    Attributes
    ----------
    phase
        `gone` where it is certain that nothing executes the run any more, and nothing will.
    reason
        In words: why it waits, or how it ended.
    """

    phase: Phase
    reason: str = ""


class Executor(ABC):
    """Executes the runs of one sweep.

    Parameters
    ----------
    sweep, setting
        What is executed, and how.
    """

    def __init__(self, sweep: SweepDirectory, setting: Setting) -> None:
        self.sweep, self.setting, self.journal = sweep, setting, Journal(sweep)

    @abstractmethod
    def preflight(self, plan: Plan) -> None:
        """Refuse, with a `ConfigError`, what this executor could not execute; queues nothing."""

    def has_accounting(self) -> bool:
        """Whether the scheduler keeps a record of jobs that ended."""
        return False

    def recover(self) -> None:  # noqa: B027 - most have nothing to recover
        """Complete the journal of a submitter that died, with the sweep's lock held."""

    @abstractmethod
    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> None:
        """Queue runs, with the sweep's lock held; with `canary` the first alone, and the others if it succeeds."""

    @abstractmethod
    def states(self, places: Mapping[str, Place]) -> dict[str, JobState]:
        """Return what is known of runs that were submitted, by id, with one call of the scheduler; changes nothing."""

    @abstractmethod
    def cancel(self, places: Mapping[str, Place]) -> None:
        """Stop runs, after the journal says that they are cancelled; a running one is asked to leave first."""


def make_executor(sweep: SweepDirectory, setting: Setting) -> Executor:
    """Return the executor of a setting's kind."""
    kind = setting.cluster.kind
    if kind == "slurm":
        from launch.executors.slurm import SlurmExecutor

        return SlurmExecutor(sweep, setting)
    if kind == "local":
        from launch.executors.local import LocalExecutor

        return LocalExecutor(sweep, setting)
    from launch.executors.debug import DebugExecutor

    return DebugExecutor(sweep, setting)
