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

    A kind of cluster is a module with a subclass of this as its `EXECUTOR` (`launch.executors.registry`), and the methods
    below that are abstract. Commands come and go, so what one of them did the next one finds in the journal
    (`self.journal`), and each kind owes it the following.

    *Submitting.* Before the scheduler is called, `self.journal.submitting(batches, uid)` notes what is going to be one job
    or one array: `batches[i]` are the runs that its element i does one after the other, and `uid` is a name that was never
    used before (`uuid.uuid4().hex[:12]`). After it, `submitted(uid, job)` notes the scheduler's id, or `refused(uid)` that
    it took nothing. Where it gave no answer neither is noted, and `recover` finds out before the next command goes on. With
    `canary`, the others are a submission of their own with `after=` the uid of the first, and do not start before that run
    is complete. From all this a `JobRef` (run -> submission, element, job) is made, which the other methods are given.

    *Doing a run.* A job calls `python -m launch.worker SWEEP UID RUN...` with the code in `self.setting.code` first on
    PYTHONPATH (`launch.worker.code.with_code_first`), or `launch.worker.worker.execute`. That passes over runs that were
    cancelled, are held, or were submitted again under another uid; it notes the `start` of each attempt, and goes on from
    the newest checkpoint. SIGTERM or SIGUSR2 asks it to leave with one. Its exit code says how it went
    (`launch.journal.retry.cause_of`). Given several runs, it notes itself the `end` of each that ends before it does.

    *Ending.* Whoever sees that process end, also where it was killed, calls `launch.journal.attempts.end_attempt` with the
    cause, for which only a status file counts that this attempt has written (`launch.journal.attempts.own_status`). That
    notes the `end` and returns whether the policy of `cluster.retry` gives the run another attempt; who called it then starts
    that for the same uid, `launch.journal.retry.delay_s` later. A run of which a start is noted and no end counts as going on
    as long as `states` does not say otherwise.

    *Cancelling.* `cancel` and `withdraw` are called when the journal says already that the runs are cancelled, so a job that
    starts in that moment passes over them; they end what runs, or see that it leaves. No job of a former submission may
    come back later: a run has one job at a time.

    The sweep's lock is held while `recover`, `submit`, `cancel` and `withdraw` are called, and by nobody while runs are
    done. A `ConfigError` is one sentence to the user, exit code 2, and means that nothing was queued. The test
    `tests/launch/executors/test_registry.py` has a kind that keeps to this in sixty lines.

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
    can_follow
        Whether runs can wait until another sweep of the same kind has no jobs left (`Setting.after`).
    """

    schema: ClassVar[type[OwnCluster]]
    ask_every_s: ClassVar[float] = 0.0
    can_follow: ClassVar[bool] = False

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
    def submit(self, plan: Plan, runs: Sequence[str], *, canary: bool) -> None:
        """Queue runs, with the sweep's lock held; with `canary` the first alone, and the others if it succeeds.

        Raises
        ------
        PartlyQueued
            If some of them are queued and the others are not.
        """

    def work(self, runs: Sequence[str]) -> list[str]:
        """Do runs that were just queued in this process, without the lock; most kinds leave that to their jobs.

        Returns
        -------
        Of the runs that were done here and now, those that did not finish.
        """
        return []

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

    def clear_away(self) -> None:
        """Cancel what waits in the queue though all its runs are done: a held job would stand there for ever."""
