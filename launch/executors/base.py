"""What every executor does: submit the runs of one sweep, answer for their jobs, cancel them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from kv_align.config.schema import validate
from kv_align.runs.errors import ConfigError
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.schema import OwnCluster
from launch.cluster.setting import Setting
from launch.journal.journal import Journal
from launch.journal.ledger import JobRef

Phase = Literal["pending", "held", "blocked", "running", "ended", "gone"]
ClusterType = TypeVar("ClusterType", bound=OwnCluster)


class SchedulerUnavailable(ConfigError):  # noqa: N818 - the scheduler's, not an error of whoever asks
    """The scheduler gave no answer: nothing is known then, which is not to know that there is nothing."""


class SubmissionUnderWay(ConfigError):  # noqa: N818 - a state of affairs
    """A command that did not finish has called the scheduler just now, and what came of that is not known yet."""


class ClusterFull(ConfigError):  # noqa: N818 - a state of affairs
    """The scheduler takes no more jobs now, and will take them when others have ended."""


class PartlyQueued(ConfigError):  # noqa: N818 - a state of affairs
    """The scheduler took some of what it was given, and not the rest.

    Parameters
    ----------
    number, of
        How many runs are queued, and how many there were to be.
    error
        Why the rest is not.
    """

    def __init__(self, number: int, of: int, error: Exception) -> None:
        super().__init__(f"{number} of {of} runs are queued, the others are not: {error}")
        self.queued = number


@dataclass(frozen=True)
class JobState:
    """What the scheduler knows of a run's job.

    Attributes
    ----------
    phase
        `held` where somebody must let it go, `blocked` where it can never start as it is, `gone` where it is certain that
        nothing executes the run any more, and nothing will.
    reason
        In words: why it waits, or how it ended.
    """

    phase: Phase
    reason: str = ""


class Executor(ABC, Generic[ClusterType]):
    """Executes the runs of one sweep.

    A kind of cluster is a module with a subclass of this as its `EXECUTOR` (`launch.executors.registry`).

    Parameters
    ----------
    sweep, setting
        What is executed, and how.
    plan
        Of the sweep, where it was read already.

    Attributes
    ----------
    schema
        The keys of `conf/cluster/` that this kind has.
    ask_every_s
        So often the scheduler may be asked by one who watches; the runs' status files are read in between.
    """

    schema: ClassVar[type[OwnCluster]]
    ask_every_s: ClassVar[float] = 0.0

    def __init__(self, sweep: SweepDirectory, setting: Setting, plan: Plan | None = None) -> None:
        self._plan = plan
        self.sweep, self.setting, self.journal = sweep, setting, Journal(sweep)
        self.cluster: ClusterType = validate(self.schema, setting.cluster.model_dump())  # type: ignore[assignment]

    @property
    def plan(self) -> Plan:
        """The frozen plan of the sweep."""
        return self._plan or self.sweep.frozen_plan()

    @abstractmethod
    def preflight(self, plan: Plan, runs: Collection[str]) -> list[str]:
        """Refuse, with a `ConfigError`, what this executor could not execute; queues nothing.

        Parameters
        ----------
        plan
            Of the sweep.
        runs
            Those of it that are to be queued.

        Returns
        -------
        What there is to say beforehand, one line each.
        """

    @abstractmethod
    def gpus_per_run(self) -> int:
        """Return how many GPUs a run has."""

    @abstractmethod
    def most_at_once(self) -> int:
        """Return how many runs of the sweep may run at once."""

    def has_accounting(self) -> bool:
        """Whether the scheduler keeps a record of jobs that ended."""
        return False

    def recover(self) -> None:
        """Complete the journal of a submitter that died, with the sweep's lock held.

        Raises
        ------
        ConfigError
            If the sweep cannot be changed from here; a `SubmissionUnderWay` if it cannot be changed now.
        """

    @abstractmethod
    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> list[str]:
        """Queue runs, with the sweep's lock held; with `canary` the first alone, and the others if it succeeds.

        Returns
        -------
        Of the runs that were done here and now, those that did not finish.

        Raises
        ------
        PartlyQueued
            If some of them are queued and the others are not.
        """

    @abstractmethod
    def states(self, jobs: Mapping[str, JobRef], silent: Collection[str] = ()) -> dict[str, JobState]:
        """Return what is known of runs that were submitted, by id; changes nothing.

        Parameters
        ----------
        jobs
            Where they were submitted.
        silent
            Those of them that should give signs of life and do not.

        Raises
        ------
        SchedulerUnavailable
            If the scheduler does not answer.
        """

    @abstractmethod
    def cancel(self, jobs: Mapping[str, JobRef]) -> None:
        """Stop runs, after the journal says that they are cancelled; a running one is asked to leave first."""

    def withdraw(self, jobs: Mapping[str, JobRef]) -> None:
        """See that runs which are about to be submitted again, and count as cancelled, have no job left from before."""
