"""What a plan says before it starts: its matrix, its smallest p-value, and what it will cost, where that is known."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kv_align.runs.digests import digest_of_json
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import Plan, PlannedRun

_EARLIER = 40  # finished runs that are looked at for an estimate, newest first


def print_plan(plan: Plan, directory: Path, cost: str, notes: list[str], console: Console) -> None:
    """Print the matrix, the number of runs, the smallest p-value and the cost."""
    seeds = sorted({run.seed for run in plan.runs})
    groups = list(dict.fromkeys(run.group for run in plan.runs))
    table = Table(title=f"sweep {plan.name}: seeds per cell", title_justify="left", pad_edge=False)
    table.add_column("arm", overflow="fold")
    table.add_column("expected", justify="right")
    for group in groups:
        table.add_column(f"loss {group}" if group else "own loss", justify="right")
    for arm, facts in plan.arms.items():
        counts = [sum(run.arm == arm and run.group == group for run in plan.runs) for group in groups]
        expected = facts["expected_percent"]
        hint = "control" if facts["control"] else "baseline" if arm == plan.baseline else ""
        shown = f"{expected:+g} %" if expected is not None else hint
        table.add_row(Text(arm), shown, *(str(count) if count else "-" for count in counts))
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    number = len(seeds)
    alpha = plan.criteria.get("alpha")
    smallest = smallest_p(number)
    reach = f"; alpha {alpha:g} is out of reach" if isinstance(alpha, float) and smallest > alpha else ""
    lines = [
        f"{len(plan.runs)} runs, {number} seeds ({_ranges(seeds)})",
        f"smallest p-value that {number} paired seeds can reach: {smallest:.3g}{reach}",
        f"estimated cost: {cost}",
        f"plan {plan.plan_hash[:12]}, criteria {plan.criteria_hash[:12]}, commit {plan.git_commit[:12] or 'unknown'}"
        + (" with uncommitted changes" if plan.git_diff else ""),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"in {directory}", markup=False, highlight=False, soft_wrap=True)


def smallest_p(num_seeds: int) -> float:
    """Two-sided p-value of the exact sign-flip test when all of n paired differences have one sign: 2 / 2^n."""
    return min(1.0, 2.0 / 2.0**num_seeds)


def estimate(runs: tuple[PlannedRun, ...], output_dir: Path, gpus_per_run: int) -> str:
    """Return what the runs will cost, from finished runs of the same size below `output_dir`; `unknown` without any."""
    hours: dict[tuple[str, str], list[float]] = {}
    for directory in _finished(output_dir):
        status = directory.status()
        if status is None or status.attempt != 1:
            continue  # of a run that was interrupted, the times of the earlier attempts are not known
        try:
            size = _size(directory.read_config())
        except (ConfigError, KeyError, TypeError):
            continue  # of another version, or damaged: it tells nothing of these
        hours.setdefault((size, status.arm), []).append((status.updated - status.started) / 3600)
    total, sources = 0.0, 0
    for run in runs:
        size = _size(run.config)
        same = hours.get((size, run.arm)) or [max(spent) for (other, _), spent in hours.items() if other == size]
        if not same:
            return "unknown: no finished run of this size yet"
        total += statistics.median(same)
        sources = max(sources, len(same))
    unit = "GPU-hours" if gpus_per_run else "CPU-hours"
    return f"{total * max(1, gpus_per_run):.2g} {unit} (from earlier runs of the same size)"


def _finished(output_dir: Path) -> list[RunDirectory]:
    files = [*output_dir.glob("*/summary.json"), *output_dir.glob("sweeps/*/runs/*/summary.json")]
    files = [file for file in files if RunDirectory(file.parent).config_file.is_file()]
    newest = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[:_EARLIER]
    return [RunDirectory(file.parent) for file in newest]


def _size(config: dict[str, Any]) -> str:
    data = {key: value for key, value in config["data"].items() if key != "shuffle_teacher"}
    return digest_of_json([config["model"], data, config["trainer"], config["evaluation"]])


def _ranges(seeds: list[int]) -> str:
    if seeds == list(range(seeds[0], seeds[-1] + 1)) and len(seeds) > 2:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))
