"""Everything a report says of a sweep, as numbers: made once, then told in a page, a file, a terminal and the "
"history."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import cells as cells_module
from analysis.agreement import Agreement, agreement
from analysis.cells import Sweep, coverage, sweep_of
from analysis.collect import Collected, collect
from analysis.compare import (
    Comparison,
    arm_comparisons,
    contrast_comparisons,
    estimate,
)
from analysis.cost import ArmCost, costs
from analysis.criteria import Criteria, criteria_hash, default_criteria_file, load_criteria, parse_criteria
from analysis.curves import CensoredSummary
from analysis.deciding import decide_alone, decide_together, under_holm
from analysis.factorial import Effect, effects
from analysis.history import Looks, looks, results_digest
from analysis.pairing import Grid
from analysis.training import areas, thresholds
from analysis.verdict import Verdict, decide
from analysis.words import count
from kv_align.plans import SweepDirectory


@dataclass(frozen=True, eq=False)
class Study:
    """The results of a sweep.

    Attributes
    ----------
    collected, sweep, criteria
        What was read, laid over the grid, and declared.
    criteria_hash, plan_hash, results
        SHA-256 (hex) of the criteria, of the plan (empty without one) and of the ended runs.
    looks
        How often the results were looked at.
    verdict
        With the primary comparison in it.
    arms
        Every other arm and control against the baseline of its loss; the primary is in its place among them.
    contrasts, effects
        Clean contrasts; factor effects and interactions.
    against_control
        By (arm, loss): the arm against the control it must beat.
    area, probe, exact
        By (arm, loss): the arm against the baseline in training area, probe R² and exact match.
    secondary
        Exact match of the primary comparison: tested if the primary passed.
    agreement
        Of the primary comparison, example by example.
    window
        Steps over which training loss was averaged; None where the runs share none.
    threshold
        By loss: the threshold in nats, and how many steps each arm needed.
    cost
        Of every arm.
    """

    collected: Collected
    sweep: Sweep
    criteria: Criteria
    criteria_hash: str
    plan_hash: str
    results: str
    looks: Looks
    verdict: Verdict
    arms: list[Comparison]
    contrasts: list[Comparison]
    effects: list[Effect]
    against_control: dict[tuple[str, str], Comparison]
    area: dict[tuple[str, str], Comparison]
    probe: dict[tuple[str, str], Comparison]
    exact: dict[tuple[str, str], Comparison]
    secondary: Comparison | None
    agreement: Agreement | None
    window: tuple[float, float] | None
    threshold: dict[str, tuple[float, dict[str, CensoredSummary]]]
    cost: list[ArmCost]

    @property
    def tested(self) -> bool:
        """Whether the primary test was made."""
        return self.verdict.primary is not None and self.verdict.primary.p_value is not None


def study(path: Path, *, criteria_file: Path | None = None, baseline: str | None = None) -> Study:
    """Collect a sweep and compute everything that is reported of it.

    Parameters
    ----------
    path
        The sweep's folder.
    criteria_file
        Criteria to use instead of the plan's.
    baseline
        Arm to compare with instead of the plan's.

    Raises
    ------
    ConfigError
        If the folder is no sweep, or the criteria or the baseline are not allowed.
    """
    collected = collect(path)
    criteria, raw, differ = _criteria(collected, criteria_file)
    sweep = sweep_of(collected, criteria, baseline)
    results = results_digest(sweep.cells)
    ended, expected = coverage(sweep.cells)
    complete = ended >= criteria.coverage * expected
    grid = Grid(sweep.cells)
    history = SweepDirectory(path).history_file
    look = looks(history, results, tested=complete and _has_primary(sweep, criteria))
    exploratory = tuple(_exploratory(collected, sweep, criteria, differ, baseline, look))
    verdict = decide(sweep, criteria, exploratory, grid)
    arms, contrasts = arm_comparisons(grid, sweep, criteria), contrast_comparisons(grid, sweep, criteria)
    if complete:
        arms = [
            done
            for group in sweep.groups
            for done in decide_together([each for each in arms if each.group == group], criteria)
        ]
        contrasts = under_holm(contrasts, criteria)
    arms = _with_primary(arms, verdict.primary, sweep)
    metrics = collected.table("metrics", ["run", "step", "task_loss"])
    finished = list(sweep.cells.loc[sweep.cells["state"] == cells_module.FINISHED, "run"])
    window = areas(metrics, finished, criteria.training_window).window
    others = {
        metric: _others(grid, arms, criteria, metric, lower_is_better=metric == "training_area")
        for metric in ("training_area", "probe_r2", "exact_match")
    }
    return Study(
        collected=collected,
        sweep=sweep,
        criteria=criteria,
        criteria_hash=criteria_hash(raw),
        plan_hash=collected.plan.plan_hash if collected.plan is not None else "",
        results=results,
        looks=look,
        verdict=verdict,
        arms=arms,
        contrasts=contrasts,
        effects=effects(grid, sweep, criteria, test=complete),
        against_control=_against_control(grid, sweep, criteria, arms),
        area=others["training_area"],
        probe=others["probe_r2"],
        exact=others["exact_match"],
        secondary=_secondary(verdict, others["exact_match"], criteria),
        agreement=_agreement(collected, sweep, verdict),
        window=window,
        threshold=_thresholds(metrics, sweep, criteria, window),
        cost=costs(sweep, collected.runs),
    )


def runs_of(sweep: Sweep, arm: str, group: str, *, diverged: bool = False) -> list[str]:
    """Return the finished runs of an arm, and on demand those that diverged."""
    cells = sweep.cells
    wanted = [cells_module.FINISHED, *([cells_module.DIVERGED] if diverged else [])]
    chosen = (cells["arm"] == arm) & (cells["group"] == group) & cells["state"].isin(wanted)
    return list(cells.loc[chosen, "run"])


def arms_in(sweep: Sweep, group: str) -> list[tuple[str, str]]:
    """Return (arm, own group) of all that are compared within a loss, controls last."""
    return [(arm, own) for arm, own, control in sweep.arms if control or own == group]


def _criteria(collected: Collected, file: Path | None) -> tuple[Criteria, dict[str, Any], bool]:
    """Criteria, their plain containers, and whether they are not the plan's."""
    plan = collected.plan
    if file is None and plan is not None:
        return parse_criteria(plan.criteria, "the plan's criteria"), plan.criteria, False
    criteria, raw = load_criteria(file or default_criteria_file())
    return criteria, raw, plan is not None and criteria_hash(raw) != plan.criteria_hash


def _has_primary(sweep: Sweep, criteria: Criteria) -> bool:
    return sweep.group_of(criteria.primary.arm, criteria.primary.loss) is not None


def _exploratory(
    collected: Collected, sweep: Sweep, criteria: Criteria, differ: bool, baseline: str | None, look: Looks
) -> list[str]:
    reasons = []
    if collected.plan is None:
        reasons.append("The runs were not planned: there is no frozen plan, so nothing was declared before them.")
    if differ:
        reasons.append("The criteria of this report are not the ones that were frozen with the plan.")
    if baseline is not None and collected.plan is not None and baseline != collected.plan.baseline:
        reasons.append(f"The baseline of this report is {baseline}; the plan's is {collected.plan.baseline}.")
    elif sweep.baseline != criteria.primary.baseline:
        reasons.append(f"The baseline is {sweep.baseline}; the criteria declare {criteria.primary.baseline}.")
    if collected.plan is not None and collected.plan.extensions:
        added = count(len(collected.plan.extensions), "time")
        reasons.append(
            f"The sweep was extended {added} after it was frozen, so its p values are not those of one look."
        )
    seeds = sweep.cells["seed"].nunique()
    if seeds > criteria.seeds:
        reasons.append(f"The criteria declare {criteria.seeds} seeds; this sweep has {seeds}.")
    if look.tests > criteria.looks:
        reasons.append(
            f"The primary test was made on {look.tests} different sets of runs, and {criteria.looks} was declared."
        )
    return reasons


def _with_primary(arms: list[Comparison], primary: Comparison | None, sweep: Sweep) -> list[Comparison]:
    """All comparisons with a baseline in the order of the losses and arms, controls last."""
    every = [*arms, *([primary] if primary is not None else [])]
    order = {(arm, own): place for place, (arm, own, _) in enumerate(sweep.arms)}
    return sorted(every, key=lambda each: (sweep.groups.index(each.group), each.role == "control", order[each.arm]))


def _others(
    grid: Grid, arms: list[Comparison], criteria: Criteria, metric: str, *, lower_is_better: bool
) -> dict[tuple[str, str], Comparison]:
    return {
        (each.arm[0], each.group): estimate(
            grid,
            each.role,
            metric,
            each.arm,
            each.against,
            each.group,
            criteria,
            metric=metric,
            lower_is_better=lower_is_better,
        )
        for each in arms
    }


def _against_control(
    grid: Grid, sweep: Sweep, criteria: Criteria, arms: list[Comparison]
) -> dict[tuple[str, str], Comparison]:
    found = {}
    for each in arms:
        own = sweep.group_of(criteria.ideal.better_than, each.group)
        if own is not None and each.arm[0] != criteria.ideal.better_than:
            control = (criteria.ideal.better_than, own)
            found[each.arm[0], each.group] = estimate(
                grid, "contrast", f"against {control[0]}", each.arm, control, each.group, criteria
            )
    return found


def _secondary(verdict: Verdict, exact: dict[tuple[str, str], Comparison], criteria: Criteria) -> Comparison | None:
    """Fixed sequence: exact match is tested only if the primary passed."""
    primary = verdict.primary
    if primary is None or criteria.secondary is None:
        return None
    found = exact.get((primary.arm[0], primary.group))
    passed = primary.judgement is not None and primary.judgement.superior
    return decide_alone(found, criteria) if found is not None and passed else found


def _agreement(collected: Collected, sweep: Sweep, verdict: Verdict) -> Agreement | None:
    if verdict.primary is None:
        return None
    wanted = {verdict.primary.arm, verdict.primary.against}
    rows = zip(*(sweep.cells[name] for name in ("arm", "group", "seed", "run")), strict=True)
    runs = {(arm, group, int(seed)): run for arm, group, seed, run in rows if (arm, group) in wanted}
    outcomes: pd.DataFrame = collected.table("outcomes", ["run", "split", "id", "correct"])
    outcomes = outcomes[outcomes["run"].isin(list(runs.values()))]
    return agreement(outcomes, verdict.primary, runs)


def _thresholds(
    metrics: pd.DataFrame, sweep: Sweep, criteria: Criteria, window: tuple[float, float] | None
) -> dict[str, tuple[float, dict[str, CensoredSummary]]]:
    found = {}
    for group in sweep.groups if window is not None else []:
        by_arm = {arm: runs_of(sweep, arm, own, diverged=True) for arm, own in arms_in(sweep, group)}
        assert window is not None
        reached = thresholds(metrics, by_arm, sweep.baseline, share=criteria.threshold_share, window=window)
        if reached is not None:
            found[group] = reached
    return found
