"""What every executor does; `make_executor` imports only the one that is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kv_align.runs.errors import ConfigError
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.journal.journal import Journal, Setting
from launch.journal.ledger import Place

Phase = Literal["pending", "held", "running", "ended", "gone"]


class SchedulerSilent(ConfigError):  # noqa: N818 - the scheduler's, not an error of whoever asks
    """The scheduler gave no answer: nothing is known then, which is not to know that there is nothing."""


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
        """Complete the journal of a submitter that died, with the sweep's lock held.

        Raises
        ------
        ConfigError
            If the sweep cannot be changed now, or not from here.
        """

    @abstractmethod
    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> list[str]:
        """Queue runs, with the sweep's lock held; with `canary` the first alone, and the others if it succeeds.

        Returns
        -------
        Of the runs that were done here and now, those that did not finish.
        """

    @abstractmethod
    def states(self, places: Mapping[str, Place], silent: Collection[str] = ()) -> dict[str, JobState]:
        """Return what is known of runs that were submitted, by id; changes nothing.

        Parameters
        ----------
        places
            Where they were submitted.
        silent
            Those of them that should give signs of life and do not.

        Raises
        ------
        SchedulerSilent
            If the scheduler does not answer.
        """

    @abstractmethod
    def cancel(self, places: Mapping[str, Place]) -> None:
        """Stop runs, after the journal says that they are cancelled; a running one is asked to leave first."""

    def withdraw(self, places: Mapping[str, Place]) -> None:  # noqa: B027 - most look into the journal before each run
        """See that runs which are about to be submitted again, and count as cancelled, have no job left from before."""


def make_executor(sweep: SweepDirectory, setting: Setting) -> Executor:
    """Return the executor of a setting's kind."""
    kind = setting.cluster.kind
    if kind == "slurm":
        from launch.executors.slurm.executor import SlurmExecutor

        return SlurmExecutor(sweep, setting)
    if kind == "local":
        from launch.executors.local.executor import LocalExecutor

        return LocalExecutor(sweep, setting)
    from launch.executors.debug import DebugExecutor

    return DebugExecutor(sweep, setting)
