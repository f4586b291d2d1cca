"""What a command line names: a sweep's folder, and runs of it. Apart from the verbs that plan, whose imports take longer."""

from __future__ import annotations

from pathlib import Path

from kv_align.runs.errors import ConfigError
from kv_align.runs.sweep_dir import SweepDirectory
from launch.status.judgement import Overview, RunState, select


def find_runs(now: Overview, wanted: str) -> list[RunState]:
    """Return the runs that an id, or the start of one, names.

    Raises
    ------
    ConfigError
        If there is none, or several that have no word in common there.
    """
    found = select(now.runs, wanted)
    several = [run.id for run in now.runs if run.id.startswith(wanted)]
    if not found and several:
        raise ConfigError(
            f"{wanted} is the start of {len(several)} runs of {now.path}, such as {several[0]} and {several[-1]}: give one "
            "whole id, or a start that ends where a - follows."
        )
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
