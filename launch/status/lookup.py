"""What a command line names: a sweep's folder, and runs of it. Apart from the verbs that plan, whose imports take longer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kv_align.runs.errors import ConfigError
from kv_align.runs.sweep_dir import SweepDirectory
from launch.status.judgement import select


def select_names(names: Sequence[str], wanted: Sequence[str], sweep: Path) -> list[str]:
    """Return the runs that ids, or the starts of ids, name; all of them where nothing is wanted.

    Raises
    ------
    ConfigError
        If one of them names none, or several that have no word in common there.
    """
    if not wanted:
        return list(names)
    return list(dict.fromkeys(name for start in wanted for name in find_runs(names, start, sweep)))


def find_runs(names: Sequence[str], wanted: str, sweep: Path) -> list[str]:
    """Return the runs that an id, or the start of one, names; see `select_names`."""
    chosen = select(names, wanted)
    several = [name for name in names if name.startswith(wanted)]
    if not chosen and several:
        raise ConfigError(
            f"{wanted} is the start of {len(several)} runs of {sweep}, such as {several[0]} and {several[-1]}: give one "
            "whole id, or a start that ends where a - follows."
        )
    if not chosen:
        some = ", ".join(names[:3])
        raise ConfigError(
            f"{wanted} is not a run of {sweep}: give the id of one, or its start, such as {some or 'none'}."
        )
    return chosen


def sweeps_in(path: Path) -> list[SweepDirectory]:
    """Return the planned sweeps of a folder that is none itself: below it, or below its `sweeps/`."""
    if (path / "plan.json").exists():
        return []
    plans = sorted([*path.glob("*/plan.json"), *path.glob("sweeps/*/plan.json")])
    return [SweepDirectory(plan.parent.resolve()) for plan in plans]


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
