"""The verbs that change a sweep: submit, resume, cancel, extend. Each holds the sweep's lock while it looks and acts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import kv_align
from kv_align.errors import ConfigError
from kv_align.plans import Plan, SweepDirectory
from launch.cluster import AnyCluster, SlurmCluster, load_cluster
from launch.executors.executor import Executor, make_executor
from launch.journal import Journal, Setting
from launch.matrix import estimate, print_plan
from launch.plan import extend_plan, make_plan
from launch.preflight import check
from launch.status import WAITING, Overview, RunState, counts_in_words, needs, overview, select
from launch.sweep import load_sweep


@dataclass(frozen=True)
class Request:
    """What `submit` is asked for.

    Attributes
    ----------
    sweep, cluster
        Names in `conf/`.
    sweep_changes, cluster_changes
        Single keys that are changed.
    overrides
        Hydra overrides of every run.
    output_dir
        The sweep goes to `sweeps/` below it.
    config_dir
        A folder of the user's that is laid over `conf/`.
    """

    sweep: str
    cluster: str
    sweep_changes: dict[str, Any]
    cluster_changes: dict[str, Any]
    overrides: list[str]
    output_dir: Path
    config_dir: str | None


def submit(request: Request, *, dry_run: bool, canary: bool, console: Console) -> Path:
    """Plan, check, freeze and queue a sweep; what is queued or done already is left as it is. Returns its directory.

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
    cost = estimate(plan.runs, request.output_dir, _gpus(cluster))
    print_plan(plan, sweep.path, cost, draft.notes, console)
    if dry_run:
        return sweep.path
    journal = Journal(sweep)
    setting = Setting(cluster, draft.resources, accounting=False, code=str(_code_root()))
    setting = check(sweep, setting, plan)
    with journal.lock():
        before = sweep.plan()
        if before is None and setting.cluster.snapshot_code:
            _snapshot(sweep)
        if before is not None:
            _refuse_other(sweep, before, plan, journal.setting(), cluster)
        setting = _with_code(sweep, setting)
        journal.write_setting(setting)
        if before is None:
            sweep.write_plan(plan)
        executor = make_executor(sweep, setting)
        _queue(sweep, executor, None, {run.id for run in plan.runs}, canary=canary, fresh_only=True, console=console)
    return sweep.path


def resume(path: Path, retry: str | None, console: Console) -> None:
    """Queue again what is missing, failed, lost or cancelled, or what `retry` names.

    Raises
    ------
    ConfigError
        If there is no plan, or the sweep was not submitted yet.
    """
    sweep, executor, plan = _open(path)
    check(sweep, executor.setting, plan)
    with executor.journal.lock():
        names = {run.id for run in plan.runs}
        _queue(sweep, executor, retry, names, canary=False, fresh_only=False, console=console)


def extend(path: Path, seeds: object, console: Console) -> None:
    """Add seeds to every cell of the frozen plan and queue them; the configurations are those that were frozen."""
    sweep, executor, _ = _open(path)
    with executor.journal.lock():
        before = sweep.plan()
        assert before is not None
        plan, added = extend_plan(before, seeds)
        check(sweep, executor.setting, plan)
        sweep.write_plan(plan)
        console.print(f"{len(added)} runs added to {sweep.path}", markup=False, highlight=False, soft_wrap=True)
        names = {run.id for run in added}
        _queue(sweep, executor, None, names, canary=False, fresh_only=False, console=console)


def cancel(path: Path, wanted: Sequence[str], console: Console) -> None:
    """Stop runs, or all of them; one that is running is asked to leave and keeps its checkpoint."""
    sweep, executor, _ = _open(path)
    with executor.journal.lock():
        executor.recover()
        now = overview(sweep)
        chosen = list(now.runs) if not wanted else [run for each in wanted for run in find_runs(now, each)]
        names = [run.id for run in chosen if run.state in WAITING]
        if names:
            executor.journal.cancelled(names)
            places = executor.journal.ledger().places
            executor.cancel({name: places[name] for name in names if name in places})
        console.print(f"{len(names)} runs cancelled", highlight=False)


def find_runs(now: Overview, wanted: str) -> list[RunState]:
    """Return the runs that an id, or the start of one, names.

    Raises
    ------
    ConfigError
        If there is none.
    """
    found = select(now.runs, wanted)
    if not found:
        some = ", ".join(run.id for run in now.runs[:3])
        raise ConfigError(
            f"{wanted} is not a run of {now.path}: give the id of one, or its start, such as {some or 'none'}."
        )
    return found


def open_sweep(path: Path) -> SweepDirectory:
    """Return a sweep directory that is there.

    Raises
    ------
    ConfigError
        If it is not, or holds neither a plan nor a run.
    """
    sweep = SweepDirectory(path.resolve())
    if not sweep.path.is_dir() or (not sweep.plan_file.exists() and not sweep.found_runs()):
        raise ConfigError(f"{path} is not a sweep: name the folder that submit printed, or that of a Hydra multirun.")
    return sweep


def _open(path: Path) -> tuple[SweepDirectory, Executor, Plan]:
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
    executor: Executor,
    retry: str | None,
    names: set[str],
    *,
    canary: bool,
    fresh_only: bool,
    console: Console,
) -> None:
    """Submit those of the named runs that need it; the lock is held, so what is seen stays true."""
    plan = sweep.plan()
    assert plan is not None
    executor.recover()
    now = overview(sweep)
    chosen = [
        run for run in now.runs if run.id in names and (run.state == "missing" if fresh_only else needs(run, retry))
    ]
    queued = [run.id for run in chosen if run.state == "held"]
    if queued:
        places = executor.journal.ledger().places
        executor.cancel({name: places[name] for name in queued if name in places})
    if chosen:
        where = executor.setting.cluster.name
        console.print(f"queueing {len(chosen)} runs on cluster={where}", highlight=False)
        executor.submit(plan, [run.id for run in chosen], canary=canary)
    counts = counts_in_words(overview(sweep).counts())
    console.print(f"{counts}; python -m launch status {sweep.path}", markup=False, highlight=False, soft_wrap=True)
    if not chosen:
        print("nothing to queue", file=sys.stderr)


def _refuse_other(
    sweep: SweepDirectory, before: Plan, plan: Plan, setting: Setting | None, cluster: AnyCluster
) -> None:
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


def _code_root() -> Path:
    return Path(kv_align.__file__).resolve().parents[1]


def _with_code(sweep: SweepDirectory, setting: Setting) -> Setting:
    if not setting.cluster.snapshot_code or not (sweep.path / "code").is_dir():
        return setting
    return Setting(setting.cluster, setting.resources, setting.accounting, str(sweep.path / "code"))


def _snapshot(sweep: SweepDirectory) -> None:
    root = _code_root()
    for name in ("kv_align", "launch", "analysis", "conf"):
        if (root / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(root / name, sweep.path / "code" / name, ignore=ignored, dirs_exist_ok=True)


def _gpus(cluster: AnyCluster) -> int:
    if isinstance(cluster, SlurmCluster):
        return cluster.gpus_per_node * cluster.nodes
    from launch.executors.local import visible_gpus

    return min(1, len(visible_gpus()))
