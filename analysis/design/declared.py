"""What was declared before the runs, and in what a report departs from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.design.cells import Grid
from analysis.design.criteria import Criteria, criteria_hash, default_criteria_file, load_criteria, parse_criteria
from analysis.design.history import Looks
from analysis.read.collect import Collected
from analysis.words import count


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
    collected: Collected, grid: Grid, criteria: Criteria, differ: bool, baseline: str | None, look: Looks
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
    """
    reasons = []
    if collected.plan is None:
        reasons.append("The runs were not planned: there is no frozen plan, so nothing was declared before them.")
    if differ:
        reasons.append("The criteria of this report are not the ones that were frozen with the plan.")
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
