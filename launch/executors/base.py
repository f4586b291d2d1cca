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

Phase = Literal["pending", "held", "running", "ended", "gone"]
ClusterType = TypeVar("ClusterType", bound=OwnCluster)


class SchedulerUnavailable(ConfigError):  # noqa: N818 - the scheduler's, not an error of whoever asks
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


class Executor(ABC, Generic[ClusterType]):
    """Executes the runs of one sweep.

    A kind of cluster is a module with a subclass of this as its `EXECUTOR` (`launch.executors.registry`).

    Parameters
    ----------
    sweep, setting
        What is executed, and how.

    Attributes
    ----------
    schema
        The keys of `conf/cluster/` that this kind has.
    ask_every_s
        So often the scheduler may be asked by one who watches; the runs' status files are read in between.
    """

    schema: ClassVar[type[OwnCluster]]
    ask_every_s: ClassVar[float] = 0.0

    def __init__(self, sweep: SweepDirectory, setting: Setting) -> None:
        self.sweep, self.setting, self.journal = sweep, setting, Journal(sweep)
        self.cluster: ClusterType = validate(self.schema, setting.cluster.model_dump())  # type: ignore[assignment]

    @abstractmethod
    def preflight(self, plan: Plan) -> None:
        """Refuse, with a `ConfigError`, what this executor could not execute; queues nothing."""

    @abstractmethod
    def gpus_per_run(self) -> int:
        """Return how many GPUs a run has."""

    def has_accounting(self) -> bool:
        """Whether the scheduler keeps a record of jobs that ended."""
        return False

    def recover(self) -> None:
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
