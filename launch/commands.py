"""The verbs that change a sweep: submit, resume, cancel, extend. Each holds the sweep's lock while it looks and acts."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kv_align.runs.errors import ConfigError
from kv_align.runs.program import program
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.arguments import Request
from launch.cluster.schema import Cluster
from launch.cluster.setting import Setting
from launch.executors.base import ClusterFull, Executor, PartlyQueued, SchedulerUnavailable, SubmissionUnderWay
from launch.executors.registry import change_cluster, check_resources, load_cluster, make_executor
from launch.freezing import as_frozen, freeze, refuse_other, say, was_submitted, with_code_of_today
from launch.journal.journal import Journal
from launch.journal.ledger import HELPERS, JobRef
from launch.journal.retry import ending, given_up, vanished
from launch.planning.cost import estimate, print_plan
from launch.planning.plan import extend_plan, make_plan
from launch.planning.sweep import load_sweep
from launch.preflight import check
from launch.status.judgement import counts_in_words, needs
from launch.status.lookup import open_sweep, select_names
from launch.status.overview import overview
from launch.worker.code import code_root, freeze_code


def submit(
    request: Request, *, dry_run: bool, canary: bool, console: Console, after: Path | None = None
) -> tuple[Path, list[str]]:
    """Plan, check, freeze and queue a sweep; what is queued or done already is left as it is.

    Parameters
    ----------
    request, dry_run, canary, console
        What is asked for, and where to say what is done.
    after
        The folder of a sweep whose jobs are to end first.

    Returns
    -------
    Its directory; and of the runs that were done here and now, those that did not finish.

    Raises
    ------
    ConfigError
        For anything that is known to be wrong; nothing was queued then.
    """
    declared = load_sweep(request.sweep, request.sweep_changes, request.config_dir)
    cluster = load_cluster(request.cluster, request.cluster_changes, request.config_dir)
    draft = make_plan(declared, request.overrides, config_dir=request.config_dir)
    check_resources(cluster, draft.resources)
    plan = draft.plan
    sweep = SweepDirectory((request.output_dir / "sweeps" / f"{plan.name}-{plan.plan_hash[:8]}").resolve())
    setting = Setting(cluster, draft.resources, accounting=False, code=str(code_root()), after=_first(after, cluster))
    executor = make_executor(sweep, setting)
    cost = estimate(plan.runs, request.output_dir, executor.gpus_per_run())
    print_plan(plan, sweep.path, cost, draft.notes, console)
    if dry_run:
        return sweep.path, []
    journal, names = Journal(sweep), {run.id for run in plan.runs}
    fresh = not was_submitted(journal)
    if fresh:  # before anything is written
        say(check(executor, plan, names), console)
    with journal.lock():
        before, submitted = sweep.plan(), was_submitted(journal)
        if before is not None and submitted:
            refuse_other(sweep, before, plan, journal.setting(), cluster)
        executor = as_frozen(sweep, executor, console) if submitted else freeze(executor)
        if before is None or not submitted:  # of what was refused nothing is kept
            sweep.write_plan(plan)
        queued = _queue(executor, None, names, canary=canary, fresh_only=True, console=console, checked=fresh)
    return sweep.path, _work(executor, queued, console)


def _first(after: Path | None, cluster: Cluster) -> str:
    """Return the folder of the sweep that goes first; refuse one that this cluster cannot wait for."""
    if after is None:
        return ""
    other, executor, _ = _open(after)
    if executor.cluster.kind != cluster.kind or not executor.can_follow:
        raise ConfigError(
            f"--after={after} is not allowed: it is a sweep on cluster={executor.cluster.name}, and cluster={cluster.name} "
            "cannot wait for that; name one on the same Slurm or local cluster, or submit when it is over."
        )
    return str(other.path.resolve())


def queue_rest(path: Path, console: Console, every_s: float, *, canary: bool) -> None:
    """Queue what a submission had no room for, behind its canary, as room comes; returns when all of it is queued."""
    while True:
        time.sleep(every_s)
        _, executor, plan = _open(path)
        try:
            with executor.journal.lock():
                names = {run.id for run in plan.runs}
                queued = _queue(executor, None, names, canary=canary, fresh_only=True, console=console)
            _work(executor, queued, console)
            return
        except (PartlyQueued, ClusterFull, SchedulerUnavailable, SubmissionUnderWay) as error:
            say([str(error)], console)


def resume(
    path: Path, retry: str | None, changes: dict[str, Any], wanted: Sequence[str], console: Console
) -> list[str]:
    """Queue again what is missing, failed, lost, cancelled, held or can never start; or what `retry` names.

    Parameters
    ----------
    path
        The sweep directory.
    retry
        See `launch.status.judgement.needs`.
    changes
        Keys of the frozen cluster that are different from now on.
    wanted
        Ids of runs, or their starts; none: all.
    console
        Where to say what is done.

    Returns
    -------
    Of the runs that were done here and now, those that did not finish.

    Raises
    ------
    ConfigError
        If there is no plan, or the sweep was not submitted yet.
    """
    sweep, executor, plan = _open(path)
    setting = executor.setting
    if changes:
        setting = replace(setting, cluster=change_cluster(setting.cluster, changes))
        kept = sorted(arm for arm, own in setting.resources.items() if own.keys() & changes.keys())
        if kept:
            say([f"{', '.join(kept)} keep what they declare themselves"], console)
    with executor.journal.lock():
        journal = executor.journal
        setting, code_changed = with_code_of_today(journal, setting, console)
        names = set(select_names([run.id for run in plan.runs], wanted, sweep.path))
        for run in plan.runs:  # what the job itself would have done, had it lived a moment longer
            if sweep.run(run).is_complete():
                shutil.rmtree(sweep.run(run).checkpoints, ignore_errors=True)

        def write() -> None:
            if code_changed:
                freeze_code(journal, Path(setting.code))
            journal.write_setting(setting)
            if changes:
                journal.changed(changes)

        executor = make_executor(sweep, setting)
        queued = _queue(executor, retry, names, canary=False, fresh_only=False, console=console, write=write)
        executor.clear_away()
    return _work(executor, queued, console)


def extend(path: Path, seeds: object, console: Console) -> list[str]:
    """Add seeds to every cell of the frozen plan and queue them; the configurations are those that were frozen.

    Returns
    -------
    Of the runs that were done here and now, those that did not finish.
    """
    sweep, executor, _ = _open(path)
    with executor.journal.lock():
        executor.recover()
        before = sweep.frozen_plan()
        plan, added = extend_plan(before, seeds)
        say(check(executor, plan, [run.id for run in added]), console)
        overview(sweep)  # a scheduler that does not answer now would leave a plan with runs that are not queued
        sweep.write_plan(plan)
        console.print(f"{len(added)} runs added to {sweep.path}", markup=False, highlight=False, soft_wrap=True)
        names = {run.id for run in added}
        queued = _queue(executor, None, names, canary=False, fresh_only=False, console=console, checked=True)
    return _work(executor, queued, console)


def cancel(path: Path, wanted: Sequence[str], console: Console) -> None:
    """Stop runs and helper jobs, or all of them; a run that is running is asked to leave and keeps its checkpoint.

    By what the journal says, so that it works with a scheduler that does not answer questions.
    """
    sweep, executor, plan = _open(path)
    journal = executor.journal
    with journal.lock():
        unheard = ""
        try:
            executor.recover()
        except SubmissionUnderWay as error:  # what comes of it finds that it is cancelled
            unheard = str(error)
        except SchedulerUnavailable as error:
            unheard = str(error)
        ledger = journal.ledger()
        ids = select_names([*(run.id for run in plan.runs), *HELPERS], wanted, sweep.path)
        chosen = [name for name in ids if name in ledger.jobs and not _is_over(sweep, journal, ledger.jobs[name], name)]
        new = [name for name in chosen if name not in ledger.cancelled]
        if new:
            journal.cancelled(new)
        if chosen:  # of those that were cancelled before, jobs may have been left
            executor.cancel({name: ledger.jobs[name] for name in chosen})
        runs = [name for name in new if name not in HELPERS]
        helpers = "".join(f", and the {name} job" for name in new if name in HELPERS)
        console.print(f"{len(runs)} runs cancelled{helpers}", highlight=False)
        if unheard:
            say([unheard], console)


def _is_over(sweep: SweepDirectory, journal: Journal, ref: JobRef, name: str) -> bool:
    """Whether a run or a helper job has ended for good, by the files alone."""
    attempts = journal.attempts(name, ref.uid)
    finished = ending(attempts).get("cause") == "finished" and not vanished(attempts)
    return given_up(attempts) or finished or (name not in HELPERS and RunDirectory(sweep.runs / name).is_complete())


def _open(path: Path) -> tuple[SweepDirectory, Executor[Any], Plan]:
    sweep = open_sweep(path)
    plan = sweep.plan()
    if plan is None:
        raise ConfigError(
            f"{path} has no frozen plan, as a plain Hydra multirun has none: run the same kv_align.train command again "
            f"with hydra.sweep.dir set to that folder, or submit a sweep with {program('launch')} submit."
        )
    return sweep, make_executor(sweep, Journal(sweep).frozen_setting()), plan


def _queue(
    executor: Executor[Any],
    retry: str | None,
    names: set[str],
    *,
    canary: bool,
    fresh_only: bool,
    console: Console,
    checked: bool = False,
    write: Callable[[], None] = lambda: None,
) -> list[str]:
    """Submit those of the named runs that need it, and return these; the lock is held, so what is seen stays true.

    Parameters
    ----------
    executor, retry, names, canary, console
        What is submitted, by whom and how.
    fresh_only
        Whether only runs that were never queued need it; else see `launch.status.judgement.needs`.
    checked
        Whether they have been looked at (`launch.preflight`).
    write
        What is to be done when nothing was found to be wrong with them.
    """
    sweep = executor.sweep
    plan = sweep.frozen_plan()
    executor.recover()
    now = overview(sweep)
    chosen = [
        run for run in now.runs if run.id in names and (run.state == "missing" if fresh_only else needs(run, retry))
    ]
    ids = [run.id for run in chosen]
    if not ids:
        write()
        return []
    say([] if checked else check(executor, plan, ids), console)
    write()
    ledger = executor.journal.ledger()
    former = {name: ledger.jobs[name] for name in ids if name in ledger.jobs}
    if former:
        executor.journal.cancelled(list(former))
        executor.withdraw(former)
    console.print(f"queueing {len(ids)} runs on cluster={executor.cluster.name}", highlight=False)
    executor.submit(plan, ids, canary=canary)
    return ids


def _work(executor: Executor[Any], queued: list[str], console: Console) -> list[str]:
    """Do what is done here and now, and say how the sweep looks; returns those of the runs done here that did not finish."""
    unfinished = executor.work(queued) if queued else []
    try:
        counts = counts_in_words(overview(executor.sweep).counts())
    except SchedulerUnavailable as error:  # all that was asked for is done
        counts = str(error).rstrip(".")
    message = f"{counts}; {program('launch')} status {executor.sweep.path}"
    console.print(message, markup=False, highlight=False, soft_wrap=True)
    if not queued:
        print("nothing to queue", file=sys.stderr)
    return unfinished
