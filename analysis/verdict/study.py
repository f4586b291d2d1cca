"""Everything a report says of a sweep, as numbers: made once, then told in a page, a file and a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.design import cells as cells_module
from analysis.design.cells import Grid, grid_of
from analysis.design.cost import ArmCost, costs
from analysis.design.criteria import Criteria, criteria_hash, load_criteria
from analysis.design.declared import criteria_for, departures, holds_primary
from analysis.design.history import History, Looks, results_digest
from analysis.design.pairing import PairedGrid
from analysis.design.training import thresholds
from analysis.read.collect import Collected, collect
from analysis.stats.curves import CensoredSummary
from analysis.verdict.agreement import Agreement, agreement
from analysis.verdict.comparison import ArmComparison, estimate
from analysis.verdict.controls import Control, controls_to_beat
from analysis.verdict.declared_comparisons import arm_comparisons, contrast_comparisons
from analysis.verdict.factorial import Effect, effects
from analysis.verdict.testing import decide_alone, decide_together, under_holm
from analysis.verdict.verdict import Verdict, decide, paired_grid
from kv_align.runs.sweep_dir import SweepDirectory


@dataclass(frozen=True, eq=False)
class Study:
    """The results of a sweep.

    Attributes
    ----------
    collected, grid, criteria
        What was read, the expected grid with what was found of it, and what was declared.
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
    controls
        Every arm against the controls that it has to beat.
    area, probe, exact
        By (arm, loss): the arm against the baseline in training area, probe R² and exact match.
    secondary
        Exact match of the primary comparison: tested if the primary passed.
    agreement
        Of the primary comparison, example by example.
    threshold
        By loss: the threshold in nats, and how many steps each arm needed.
    cost
        Of every arm.
    """

    collected: Collected
    grid: Grid
    criteria: Criteria
    criteria_hash: str
    plan_hash: str
    results: str
    looks: Looks
    verdict: Verdict
    arms: list[ArmComparison]
    contrasts: list[ArmComparison]
    effects: list[Effect]
    controls: list[Control]
    area: dict[tuple[str, str], ArmComparison]
    probe: dict[tuple[str, str], ArmComparison]
    exact: dict[tuple[str, str], ArmComparison]
    secondary: ArmComparison | None
    agreement: Agreement | None
    threshold: dict[str, tuple[float, dict[str, CensoredSummary]]]
    cost: list[ArmCost]

    @property
    def tested(self) -> bool:
        """Whether the primary test was made."""
        return self.verdict.primary is not None and self.verdict.primary.p_value is not None


def study_sweep(
    path: Path, *, criteria_file: Path | None = None, baseline: str | None = None, verify: bool = False
) -> Study:
    """Collect a sweep and compute everything that is reported of it.

    Parameters
    ----------
    path
        The sweep's folder.
    criteria_file
        Criteria to use instead of the plan's.
    baseline
        Arm to compare with instead of the plan's.
    verify
        Whether every file of a finished run is checked by its digest.

    Raises
    ------
    ConfigError
        If the folder is no sweep, or the criteria or the baseline are not allowed.
    """
    if criteria_file is not None:
        load_criteria(criteria_file)  # before anything is written
    collected = collect(path, verify=verify)
    criteria, raw, differ = criteria_for(collected, criteria_file)
    grid = grid_of(collected, criteria, baseline)
    results = results_digest(grid.cells, collected.runs)
    paired = paired_grid(grid, criteria)
    history = History(SweepDirectory(path))
    look = history.looks(results, tested=paired.complete and holds_primary(grid, criteria))
    exploratory = departures(collected, grid, criteria, differ, baseline, look, history.problems(collected.plan))
    verdict = decide(grid, criteria, exploratory, paired)
    arms, contrasts = arm_comparisons(paired, grid, criteria), contrast_comparisons(paired, grid, criteria)
    if paired.complete:
        arms = [
            done
            for group in grid.groups
            for done in decide_together([comparison for comparison in arms if comparison.group == group], criteria)
        ]
        contrasts = under_holm(contrasts, criteria)
    arms = _with_primary(arms, verdict.primary, grid)
    metrics = collected.training()
    others = {
        metric: _others(paired, arms, criteria, metric, lower_is_better=metric == "training_area")
        for metric in ("training_area", "probe_r2", "exact_match")
    }
    return Study(
        collected=collected,
        grid=grid,
        criteria=criteria,
        criteria_hash=criteria_hash(raw),
        plan_hash=collected.plan.plan_hash if collected.plan is not None else "",
        results=results,
        looks=look,
        verdict=verdict,
        arms=arms,
        contrasts=contrasts,
        effects=effects(paired, grid, criteria),
        controls=controls_to_beat(paired, grid, criteria),
        area=others["training_area"],
        probe=others["probe_r2"],
        exact=others["exact_match"],
        secondary=_secondary(verdict, others["exact_match"], criteria),
        agreement=_agreement(collected, grid, verdict),
        threshold=_thresholds(metrics, grid, criteria),
        cost=costs(grid, collected.runs, collected.table("metrics", ["run", "elapsed_s"])),
    )


def runs_of(grid: Grid, arm: str, group: str, *, diverged: bool = False) -> list[str]:
    """Return the finished runs of an arm, and on demand those that diverged."""
    cells = grid.cells
    wanted = [cells_module.FINISHED, *([cells_module.DIVERGED] if diverged else [])]
    chosen = (cells["arm"] == arm) & (cells["group"] == group) & cells["state"].isin(wanted)
    return list(cells.loc[chosen, "run"])


def arms_in(grid: Grid, group: str) -> list[tuple[str, str]]:
    """Return (arm, own group) of all that are compared within a loss, controls last."""
    return [(arm, own) for arm, own, control in grid.arms if control or own == group]


def _with_primary(arms: list[ArmComparison], primary: ArmComparison | None, grid: Grid) -> list[ArmComparison]:
    """All comparisons with a baseline in the order of the losses and arms, controls last."""
    every = [*arms, *([primary] if primary is not None else [])]
    order = {(arm, own): place for place, (arm, own, _) in enumerate(grid.arms)}
    return sorted(
        every,
        key=lambda comparison: (
            grid.groups.index(comparison.group),
            comparison.role == "control",
            order[comparison.arm],
        ),
    )


def _others(
    paired: PairedGrid, arms: list[ArmComparison], criteria: Criteria, metric: str, *, lower_is_better: bool
) -> dict[tuple[str, str], ArmComparison]:
    return {
        (comparison.arm[0], comparison.group): estimate(
            paired,
            comparison.role,
            metric,
            comparison.arm,
            comparison.against,
            comparison.group,
            criteria,
            metric=metric,
            lower_is_better=lower_is_better,
        )
        for comparison in arms
    }


def _secondary(
    verdict: Verdict, exact: dict[tuple[str, str], ArmComparison], criteria: Criteria
) -> ArmComparison | None:
    """Fixed sequence: exact match is tested only if the primary passed."""
    primary = verdict.primary
    if primary is None or criteria.secondary is None:
        return None
    comparison = exact.get((primary.arm[0], primary.group))
    passed = primary.judgement is not None and primary.judgement.superior
    return decide_alone(comparison, criteria) if comparison is not None and passed else comparison


def _agreement(collected: Collected, grid: Grid, verdict: Verdict) -> Agreement | None:
    if verdict.primary is None:
        return None
    wanted = {verdict.primary.arm, verdict.primary.against}
    runs = {cell: run for cell, run in grid.run_of.items() if cell[:2] in wanted}
    outcomes: pd.DataFrame = collected.table("outcomes", ["run", "split", "id", "correct"])
    outcomes = outcomes[outcomes["run"].isin(list(runs.values()))]
    return agreement(outcomes, verdict.primary, runs)


def _thresholds(
    metrics: pd.DataFrame, grid: Grid, criteria: Criteria
) -> dict[str, tuple[float, dict[str, CensoredSummary]]]:
    by_loss: dict[str, tuple[float, dict[str, CensoredSummary]]] = {}
    if grid.window is None:
        return by_loss
    for group in grid.groups:
        by_arm = {arm: runs_of(grid, arm, own, diverged=True) for arm, own in arms_in(grid, group)}
        reached = thresholds(metrics, by_arm, grid.baseline, share=criteria.threshold_share, window=grid.window)
        if reached is not None:
            by_loss[group] = reached
    return by_loss
