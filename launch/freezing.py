"""What stays as it was when a sweep was submitted: its cluster, its criteria, and the code that its jobs run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kv_align.runs.errors import ConfigError
from kv_align.runs.program import program
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.cluster.schema import Cluster
from launch.cluster.setting import Setting
from launch.executors.base import Executor
from launch.executors.registry import make_executor
from launch.journal.journal import Journal
from launch.worker.code import changed_code, code_root, freeze_code, in_words, take_snapshot


def was_submitted(journal: Journal) -> bool:
    """Whether anything of the sweep was ever queued, or may have been."""
    return any(not submission.refused for submission in journal.ledger().submissions.values())


def freeze(executor: Executor[Any]) -> Executor[Any]:
    """Write down how a sweep is executed, and by which code; returns the executor that does it so."""
    journal, setting = executor.journal, executor.setting
    code = take_snapshot(journal) if setting.cluster.snapshot_code else Path(setting.code)
    setting = replace(setting, accounting=executor.has_accounting(), code=str(code))
    journal.write_setting(setting)
    freeze_code(journal, code, Path(executor.setting.code))
    return make_executor(executor.sweep, setting)


def as_frozen(sweep: SweepDirectory, asked: Executor[Any], console: Console) -> Executor[Any]:
    """Return the executor that the sweep was submitted with; says in what it differs from what is asked for now."""
    setting = Journal(sweep).frozen_setting()
    executor = make_executor(sweep, setting)
    frozen, now = executor.cluster.model_dump(), asked.cluster.model_dump()
    for key in sorted(key for key in frozen if frozen[key] != now[key] and key != "name"):
        change = f"{program('launch')} resume {sweep.path} cluster.{key}={now[key]}"
        say(
            [f"cluster.{key} stays {frozen[key]}, as it was when the sweep was submitted; {change} changes it"], console
        )
    if asked.setting.after not in ("", setting.after):
        say([f"--after {asked.setting.after} comes too late: the sweep was submitted without it"], console)
    _say_which_code(setting, console)
    return executor


def _say_which_code(setting: Setting, console: Console) -> None:
    if Path(setting.code) != code_root() and not setting.cluster.snapshot_code:
        say([f"its jobs run the code in {setting.code}, as it was submitted, and not that in {code_root()}"], console)


def say(notes: Sequence[str], console: Console) -> None:
    """Print notes, one line each."""
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def with_code_of_today(journal: Journal, setting: Setting, console: Console) -> tuple[Setting, bool]:
    """Return the setting with code that is there, and whether that has to be noted as what runs from now on."""
    code = Path(setting.code)
    if setting.cluster.snapshot_code:
        code = code if code.is_dir() else take_snapshot(journal)
    elif not (code / "kv_align").is_dir():
        say([f"the code in {code} is gone: jobs run that in {code_root()} from now on"], console)
        code = code_root()
    changed = changed_code(journal, code)
    if changed:
        say(
            [f"{in_words(changed)} changed since the sweep was submitted: runs from now on have it as it is now"],
            console,
        )
    setting = replace(setting, code=str(code))
    _say_which_code(setting, console)
    return setting, bool(changed) or not (journal.folder / "code.json").exists()


def refuse_other(sweep: SweepDirectory, before: Plan, plan: Plan, setting: Setting | None, cluster: Cluster) -> None:
    """Refuse to submit a sweep again that was frozen with other criteria, or on another kind of cluster."""
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
