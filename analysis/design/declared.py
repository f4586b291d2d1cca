"""What was declared before the runs, and in what a report departs from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.design.cells import Grid
from analysis.design.criteria import Criteria, criteria_hash, default_criteria_file, load_criteria, parse_criteria
from analysis.design.history import Looks
from analysis.design.pairing import inputs_of
from analysis.read.collect import Collected
from analysis.words import count
from kv_align.runs.sweep_dir import SweepDirectory


def criteria_for(collected: Collected, file: Path | None) -> tuple[Criteria, dict[str, Any], bool]:
    """Return the criteria to judge by, their plain containers, and whether they are not the plan's.

    Parameters
    ----------
    collected
        Its plan's criteria are used where no file is given; without a plan it is the default ones.
    file
        Criteria to use instead.

    Raises
    ------
    ConfigError
        If the file cannot be read, or something in it is not allowed.
    """
    plan = collected.plan
    if file is None and plan is not None:
        return parse_criteria(plan.criteria, "the plan's criteria"), plan.criteria, False
    criteria, raw = load_criteria(file or default_criteria_file())
    return criteria, raw, plan is not None and criteria_hash(raw) != plan.criteria_hash


def holds_primary(grid: Grid, criteria: Criteria) -> bool:
    """Whether the sweep has the arm of the primary comparison and a baseline to compare it with."""
    arms = (criteria.primary.arm, grid.baseline)
    return arms[0] != arms[1] and all(grid.group_of(arm, criteria.primary.loss) is not None for arm in arms)


def departures(
    collected: Collected,
    grid: Grid,
    criteria: Criteria,
    differ: bool,
    baseline: str | None,
    look: Looks,
    broken: list[str],
) -> tuple[str, ...]:
    """Say why a report is exploratory; nothing where everything is as it was declared.

    Parameters
    ----------
    differ
        Whether the criteria are not the plan's.
    baseline
        The one asked for instead of the plan's.
    look
        How often the results were looked at.
    broken
        What is wrong with the history of earlier looks, in sentences.
    """
    reasons = [*_not_before_the_runs(collected, grid), *broken]
    if differ:
        reasons.append("The criteria of this report are not the ones that were frozen with the plan.")
    if criteria.sequence is None and collected.plan is not None:
        reasons.append(
            "The criteria declare no sequence of tests for the paper level, as version 0.1.0 froze them: the one that is "
            "shown here follows from their primary comparison and control, and was not declared before the runs."
        )
    if baseline is not None and collected.plan is not None and baseline != collected.plan.baseline:
        reasons.append(f"The baseline of this report is {baseline}; the plan's is {collected.plan.baseline}.")
    elif grid.baseline != criteria.primary.baseline:
        reasons.append(f"The baseline is {grid.baseline}; the criteria declare {criteria.primary.baseline}.")
    if collected.plan is not None and collected.plan.extensions:
        added = count(len(collected.plan.extensions), "time")
        reasons.append(
            f"The sweep was extended {added} after it was frozen, so its p values are not those of one look."
        )
    seeds = grid.cells["seed"].nunique()
    if seeds > criteria.seeds:
        reasons.append(f"The criteria declare {criteria.seeds} seeds; this sweep has {seeds}.")
    if look.tests > criteria.looks:
        reasons.append(
            f"The primary test was made on {look.tests} different sets of runs, and {criteria.looks} was declared."
        )
    return tuple(reasons)


CLOCKS_S = 120.0
"""By how much the clocks of two machines may differ."""


def _not_before_the_runs(collected: Collected, grid: Grid) -> list[str]:
    """Say what contradicts that the plan was there, as it is now, before its runs: their own records are asked."""
    plan = collected.plan
    if plan is None and SweepDirectory(collected.sweep).runs.is_dir():
        return ["There is no plan.json beside runs/: it was removed, or nothing was declared before these runs."]
    if plan is None:
        return ["The runs were not planned: there is no frozen plan, so nothing was declared before them."]
    reasons = []
    used = collected.runs.loc[[run for run in grid.cells["run"] if run in collected.runs.index]]
    started = used["first_started"].astype(float)
    early = int((started < plan.created - CLOCKS_S).sum())
    if early:
        reasons.append(
            f"{count(early, 'run')} had started before the plan was made, so it was not declared before them."
        )
    recorded = used["criteria_sha256"].fillna("").astype(str)
    other = int(((recorded != "") & (recorded != plan.criteria_hash)).sum())
    if other:
        reasons.append(f"{count(other, 'run')} recorded other criteria than those of the plan.")
    planned = {run.content_hash: run.config.get("inputs") or {} for run in plan.runs}
    recorded_inputs = zip(used["content_hash"], used["inputs"], strict=True)
    read = [(planned.get(identity, {}), inputs_of({"inputs": own})) for identity, own in recorded_inputs]
    # What a hub gives is known only when it has been read: the plan has no name for it.
    changed = sum(any(own.get(name) != digest for name, digest in known.items()) for known, own in read if own)
    if changed:
        reasons.append(f"{count(changed, 'run')} read other inputs (data, models or tokenizers) than were planned.")
    return reasons
