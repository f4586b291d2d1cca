"""The verbs that change a sweep: submit, resume, cancel, extend. Each holds the sweep's lock while it looks and acts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kv_align.runs.errors import ConfigError
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.arguments import Request
from launch.cluster.schema import Cluster
from launch.cluster.setting import Setting
from launch.executors.base import Executor, SchedulerUnavailable
from launch.executors.registry import change_cluster, load_cluster, make_executor
from launch.journal.journal import Journal
from launch.planning.cost import estimate, print_plan
from launch.planning.plan import extend_plan, make_plan
from launch.planning.sweep import load_sweep
from launch.preflight import check
from launch.status.judgement import WAITING, counts_in_words, needs
from launch.status.lookup import find_runs, open_sweep
from launch.status.overview import overview
from launch.worker.snapshot import code_root, take_snapshot, with_code


def submit(request: Request, *, dry_run: bool, canary: bool, console: Console) -> tuple[Path, list[str]]:
    """Plan, check, freeze and queue a sweep; what is queued or done already is left as it is.

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
    plan = draft.plan
    sweep = SweepDirectory((request.output_dir / "sweeps" / f"{plan.name}-{plan.plan_hash[:8]}").resolve())
    setting = Setting(cluster, draft.resources, accounting=False, code=str(code_root()))
    cost = estimate(plan.runs, request.output_dir, make_executor(sweep, setting).gpus_per_run())
    print_plan(plan, sweep.path, cost, draft.notes, console)
    if dry_run:
        return sweep.path, []
    journal = Journal(sweep)
    setting = check(sweep, setting, plan)
    with journal.lock():
        before = sweep.plan()
        if before is None and setting.cluster.snapshot_code:
            take_snapshot(sweep)
        if before is not None:
            _refuse_other(sweep, before, plan, journal.setting(), cluster)
        setting = with_code(sweep, setting)
        journal.write_setting(setting)
        if before is None:
            sweep.write_plan(plan)
        executor = make_executor(sweep, setting)
        names = {run.id for run in plan.runs}
        return sweep.path, _queue(sweep, executor, None, names, canary=canary, fresh_only=True, console=console)


def resume(path: Path, retry: str | None, changes: dict[str, Any], console: Console) -> list[str]:
    """Queue again what is missing, failed, lost or cancelled, or what `retry` names.

    Parameters
    ----------
    path
        The sweep directory.
    retry
        See `launch.status.judgement.needs`.
    changes
        Keys of the frozen cluster that are different from now on.
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
            console.print(f"note: {', '.join(kept)} keep what they declare themselves", markup=False, highlight=False)
    setting = check(sweep, setting, plan)
    with executor.journal.lock():
        if changes:
            executor.journal.changed(changes)
            executor.journal.write_setting(setting)
            executor = make_executor(sweep, setting)
        for run in plan.runs:  # what the job itself would have done, had it lived a moment longer
            if sweep.run(run).is_complete():
                shutil.rmtree(sweep.run(run).checkpoints, ignore_errors=True)
        names = {run.id for run in plan.runs}
        return _queue(sweep, executor, retry, names, canary=False, fresh_only=False, console=console)


def extend(path: Path, seeds: object, console: Console) -> list[str]:
    """Add seeds to every cell of the frozen plan and queue them; the configurations are those that were frozen.

    Returns
    -------
    Of the runs that were done here and now, those that did not finish.
    """
    sweep, executor, _ = _open(path)
    with executor.journal.lock():
        executor.recover()
        before = sweep.plan()
        assert before is not None
        plan, added = extend_plan(before, seeds)
        check(sweep, executor.setting, plan)
        overview(sweep)  # a scheduler that does not answer now would leave a plan with runs that are not queued
        sweep.write_plan(plan)
        console.print(f"{len(added)} runs added to {sweep.path}", markup=False, highlight=False, soft_wrap=True)
        names = {run.id for run in added}
        return _queue(sweep, executor, None, names, canary=False, fresh_only=False, console=console)


def cancel(path: Path, wanted: Sequence[str], console: Console) -> None:
    """Stop runs, or all of them; one that is running is asked to leave and keeps its checkpoint."""
    sweep, executor, _ = _open(path)
    with executor.journal.lock():
        executor.recover()
        now = overview(sweep)
        chosen = list(now.runs) if not wanted else [run for each in wanted for run in find_runs(now, each)]
        already = executor.journal.ledger().cancelled
        names = list(dict.fromkeys(run.id for run in chosen if run.state in WAITING and run.id not in already))
        before = [run.id for run in chosen if run.id in already]  # whose jobs may have been left
        if names:
            executor.journal.cancelled(names)
        if names or before:
            jobs = executor.journal.ledger().jobs
            executor.cancel({name: jobs[name] for name in (*names, *before) if name in jobs})
        console.print(f"{len(names)} runs cancelled", highlight=False)


def _open(path: Path) -> tuple[SweepDirectory, Executor[Any], Plan]:
    sweep = open_sweep(path)
    plan = sweep.plan()
    if plan is None:
        raise ConfigError(
            f"{path} has no frozen plan, as a plain Hydra multirun has none: run the same kv_align.train command again "
            "with hydra.sweep.dir set to that folder, or submit a sweep with python -m launch submit."
        )
    setting = Journal(sweep).setting()
    if setting is None:
        raise ConfigError(f"{path} was never submitted: run the same python -m launch submit command again.")
    return sweep, make_executor(sweep, setting), plan


def _queue(
    sweep: SweepDirectory,
    executor: Executor[Any],
    retry: str | None,
    names: set[str],
    *,
    canary: bool,
    fresh_only: bool,
    console: Console,
) -> list[str]:
    """Submit those of the named runs that need it; the lock is held, so what is seen stays true."""
    plan = sweep.plan()
    assert plan is not None
    executor.recover()
    now = overview(sweep)
    chosen = [
        run for run in now.runs if run.id in names and (run.state == "missing" if fresh_only else needs(run, retry))
    ]
    unfinished = []
    if chosen:
        ledger = executor.journal.ledger()
        former = {run.id: ledger.jobs[run.id] for run in chosen if run.id in ledger.jobs}
        if former:
            executor.journal.cancelled(list(former))
            executor.withdraw(former)
        where = executor.setting.cluster.name
        console.print(f"queueing {len(chosen)} runs on cluster={where}", highlight=False)
        unfinished = executor.submit(plan, [run.id for run in chosen], canary=canary)
    try:
        counts = counts_in_words(overview(sweep).counts())
    except SchedulerUnavailable as error:  # all that was asked for is done
        counts = str(error).rstrip(".")
    console.print(f"{counts}; python -m launch status {sweep.path}", markup=False, highlight=False, soft_wrap=True)
    if not chosen:
        print("nothing to queue", file=sys.stderr)
    return unfinished


def _refuse_other(sweep: SweepDirectory, before: Plan, plan: Plan, setting: Setting | None, cluster: Cluster) -> None:
    if before.criteria_hash != plan.criteria_hash:
        raise ConfigError(
            f"{sweep.path} was frozen with other success criteria: criteria are declared before the runs; restore "
            "conf/criteria, or give the new sweep another name with sweep.name=NAME."
        )
    if setting is not None and setting.cluster.kind != cluster.kind:
        raise ConfigError(
            f"cluster={cluster.name} is not allowed: {sweep.path} was submitted on cluster={setting.cluster.name}; submit it "
            "there, or give the new sweep another name with sweep.name=NAME."
        )
