"""The truth about each run of a sweep: `launch.status.judgement` on what the scheduler, the files and the journal say now."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence

from kv_align.runs.errors import ConfigError, of_the_system
from kv_align.runs.program import program
from kv_align.runs.run_dir import RunDirectory, Status, read_last_row
from kv_align.runs.sweep_dir import SweepDirectory
from launch.executors.base import JobState, SchedulerUnavailable
from launch.executors.registry import make_executor
from launch.journal.journal import Journal
from launch.journal.ledger import HELPERS, JobRef, Ledger
from launch.journal.retry import IN_WORDS, ending, given_up
from launch.status.helpers import helper_state, last_words, notes
from launch.status.judgement import Found, Overview, RunState, judge

_DONE: tuple[Found, str] = ("done", "")
_MULTIRUN_STALE_S = 600.0
_MULTIRUN_ASK_S = 30.0


class Memory:
    """What the scheduler answered last, for one who looks again and again."""

    def __init__(self) -> None:
        self._asked = 0.0
        self._about: dict[str, str] = {}
        self._answer: dict[str, JobState] | SchedulerUnavailable = {}

    def answer(
        self, about: Mapping[str, str], ask: Callable[[], dict[str, JobState]], every_s: float
    ) -> dict[str, JobState]:
        """Return what `ask` returns, or returned, about these runs and their jobs; raise what it raised.

        Parameters
        ----------
        about
            The job of each run.
        ask
            Asks the scheduler; called anew after `every_s` seconds, or about other jobs.
        every_s
            See `ask`.
        """
        known = about.items() <= self._about.items()
        if not self._asked or time.monotonic() - self._asked > every_s or not known:
            try:
                self._answer = ask()
            except SchedulerUnavailable as error:
                self._answer = error
            self._about, self._asked = dict(about), time.monotonic()
        if isinstance(self._answer, SchedulerUnavailable):
            raise self._answer
        return self._answer


class Watcher:
    """Looks at a sweep again and again (`overview`), and does not trouble a scheduler each time.

    Parameters
    ----------
    sweep
        The sweep directory.
    """

    def __init__(self, sweep: SweepDirectory) -> None:
        self._sweep, self._memory = sweep, Memory()

    def __call__(self) -> Overview:
        """Return the sweep as it is now."""
        return overview(self._sweep, self._memory)


def overview(sweep: SweepDirectory, memory: Memory | None = None) -> Overview:
    """Look at a sweep, with at most one call of sacct and one of squeue.

    Parameters
    ----------
    sweep
        The sweep directory.
    memory
        Of one who looks again and again; None: the scheduler is asked now.

    Raises
    ------
    SchedulerUnavailable
        If it is asked and does not answer.
    """
    plan = sweep.plan()
    if plan is None:
        return _of_multirun(sweep, memory or Memory())
    journal = Journal(sweep)
    setting, ledger = journal.setting(), journal.ledger()
    stale_after_s = _MULTIRUN_STALE_S if setting is None else setting.cluster.stale_after_s
    directories = {run.id: sweep.run(run) for run in plan.runs}
    statuses = {name: directory.observed() for name, directory in directories.items()}
    complete = {name for name, status in statuses.items() if _finished(status) and directories[name].is_complete()}
    jobs = {name: ref for name, ref in ledger.jobs.items() if name not in complete}
    states: dict[str, JobState] = {}
    if setting is not None and jobs:
        executor = make_executor(sweep, setting, plan)
        silent = [name for name in jobs if _silent(statuses, name, stale_after_s)]
        about = {name: f"{ref.uid} {ref.job}" for name, ref in jobs.items()}
        states = (memory or Memory()).answer(about, lambda: executor.states(jobs, silent), executor.ask_every_s)
    runs = []
    for run in plan.runs:
        status, ref = statuses[run.id], ledger.jobs.get(run.id)
        state, reason = _DONE
        if run.id not in complete:
            state, reason = judge(run.id, status, states.get(run.id), ledger, stale_after_s)
        if state in ("failed", "lost") and ref is not None:
            reason = _explained(journal, run.id, ref, reason)
            reason = reason or f"see: {program('launch')} logs {sweep.path} {run.id}"
        job = (ref.job or "") if ref is not None else ""
        runs.append(_row(run.id, run.arm, run.loss, run.seed, state, reason, status, job, directories[run.id]))
    helpers = tuple(helper_state(journal, ledger, name, states.get(name)) for name in HELPERS if name in ledger.jobs)
    return Overview(str(sweep.path), plan.name, True, tuple(runs), helpers, notes(journal, setting))


def overviews(sweeps: Sequence[SweepDirectory]) -> tuple[list[Overview], list[str]]:
    """Look at several sweeps; returns those that can be seen, and a sentence about each of the others."""
    seen, sentences = [], []
    for sweep in sweeps:
        try:
            seen.append(overview(sweep))
        except (ConfigError, OSError) as error:
            sentence = str(of_the_system(error) if isinstance(error, OSError) else error)
            sentences.append(sentence if str(sweep.path) in sentence else f"{sweep.path}: {sentence}")
    return seen, sentences


def _silent(statuses: Mapping[str, Status | None], name: str, stale_after_s: float) -> bool:
    status = statuses.get(name)
    return status is not None and status.state == "running" and time.time() - status.updated > stale_after_s


def _explained(journal: Journal, name: str, ref: JobRef, reason: str) -> str:
    """Add what the last attempt noted: of itself where its status file could not, and of what came after its end."""
    attempts = journal.attempts(name, ref.uid)
    starts = [number for number, row in enumerate(attempts) if row["event"] == "start"]
    last = attempts[starts[-1] if starts else 0 :]
    ended = next((number for number, row in enumerate(last) if row["event"] == "end"), len(last))
    own = [str(row["reason"]) for row in last[:ended] if row["event"] == "note"]
    later = [str(row["reason"]) for row in last[ended:] if row["event"] == "note"]
    if not attempts:
        reason = last_words(journal, ref.job) or reason
    if own:
        reason = own[-1]
    elif not reason and given_up(attempts):
        reason = IN_WORDS.get(ending(attempts)["cause"], "")
    return "; ".join(text for text in (reason, *later) if text)


def _of_multirun(sweep: SweepDirectory, memory: Memory) -> Overview:
    """A plain Hydra multirun: the run directories that are there, and what Slurm knows of their jobs."""
    observed = [(directory, directory.observed()) for directory in sweep.found_runs()]
    jobs = {
        str(directory.path): status.job
        for directory, status in observed
        if status is not None and status.job and not directory.is_complete()
    }
    known: dict[str, JobState] = {}
    if jobs and shutil.which("squeue") is not None:  # without it the folder was copied, and the files tell
        known = memory.answer(jobs, lambda: _ask_slurm(jobs), _MULTIRUN_ASK_S)
    runs = []
    for directory, status in observed:
        if status is None:
            continue
        name = str(directory.path.relative_to(sweep.path))
        state, reason = _DONE
        if not directory.is_complete():
            state, reason = judge(name, status, known.get(status.job), Ledger(), _MULTIRUN_STALE_S)
        runs.append(_row(name, status.arm, status.loss, status.seed, state, reason, status, status.job, directory))
    return Overview(str(sweep.path), sweep.path.name, False, tuple(runs))


def _ask_slurm(jobs: Mapping[str, str]) -> dict[str, JobState]:
    from launch.executors.slurm.query import job_states
    from launch.executors.slurm.site import settings

    accounting = settings().get("AccountingStorageType", "").endswith("slurmdbd")
    return job_states(jobs.values(), accounting=accounting)


def _row(
    name: str,
    arm: str,
    loss: str,
    seed: int,
    state: Found,
    reason: str,
    status: Status | None,
    job: str,
    directory: RunDirectory,
) -> RunState:
    if status is None:
        return RunState(name, arm, loss, seed, state, reason, 0, 0, None, 0, job, "")
    eta_s = _eta_s(directory, status) if state == "running" else None
    progress = (status.step, status.total_steps, eta_s, status.attempt)
    where = (job or status.job, status.host)
    return RunState(name, arm, loss, seed, state, reason, *progress, *where, status.training_s, status.overhead_s)


def _eta_s(directory: RunDirectory, status: Status) -> float | None:
    """Time that the steps left will take, at the pace of those done, from the last logged row."""
    if not directory.metrics_file.exists():
        return None
    row = read_last_row(directory.metrics_file)
    if row is None or "elapsed_s" not in row or not row["step"]:
        return None
    return (status.total_steps - status.step) * float(row["elapsed_s"]) / int(row["step"])


def _finished(status: Status | None) -> bool:
    return status is not None and status.state == "finished"
