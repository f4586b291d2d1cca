"""The fixed sequence of the paper level: each declared test at the full alpha, made only if the one before passed.

No correction is paid for several tests, since one that has no real advantage stops the sequence with probability
1 - alpha before anything behind it is looked at (Maurer, Hothorn and Lehmacher 1995). A sign of a mean never passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analysis.design.cells import Grid
from analysis.design.criteria import Criteria, SequenceStep
from analysis.design.pairing import PairedGrid
from analysis.verdict.comparison import ArmComparison, estimate
from analysis.verdict.testing import decide_alone, shown_better

Outcome = Literal["shown", "not shown", "not tested", "not in this sweep"]


@dataclass(frozen=True, eq=False)
class StepResult:
    """A test of the sequence and what became of it.

    Attributes
    ----------
    step
        As it was declared.
    comparison
        The estimate, tested where the sequence got so far; None where the sweep lacks one of the arms.
    outcome
        `shown`: p below alpha in the declared direction. `not tested`: a step before it was not shown, or nothing is
        tested at all.
    """

    step: SequenceStep
    comparison: ArmComparison | None
    outcome: Outcome

    @property
    def leans(self) -> bool | None:
        """Whether the mean and most of the pairs are on the declared side, which shows nothing; None without a pair."""
        if self.comparison is None or self.comparison.summary is None:
            return None
        summary = self.comparison.summary
        mean_better = summary.mean < 0 if self.step.lower_is_better else summary.mean > 0
        return mean_better and 2 * self.comparison.num_won > len(self.comparison.pairs.seeds)


def run_sequence(paired: PairedGrid, grid: Grid, criteria: Criteria, primary: ArmComparison) -> tuple[StepResult, ...]:
    """Go through the declared tests in their order.

    Parameters
    ----------
    paired, grid, criteria
        What was found, and what was declared.
    primary
        The first step, tested already where that is allowed.
    """
    results: list[StepResult] = []
    open_so_far = paired.complete
    for place, step in enumerate(criteria.steps):
        comparison = primary if place == 0 else _estimate(paired, grid, criteria, step)
        if comparison is not None and place and open_so_far:
            comparison = decide_alone(comparison, criteria)
        outcome: Outcome = "not tested"
        if comparison is None:
            outcome = "not in this sweep"
        elif open_so_far:
            outcome = "shown" if shown_better(comparison, criteria) else "not shown"
        open_so_far = open_so_far and outcome == "shown"
        results.append(StepResult(step, comparison, outcome))
    return tuple(results)


def _estimate(paired: PairedGrid, grid: Grid, criteria: Criteria, step: SequenceStep) -> ArmComparison | None:
    # Another baseline than the declared one takes its place in every step; the report calls itself exploratory then.
    against = grid.baseline if step.against == criteria.primary.baseline else step.against
    own, other = grid.group_of(step.arm, step.loss), grid.group_of(against, step.loss)
    if own is None or other is None or step.arm == against:
        return None
    return estimate(
        paired,
        "contrast",
        f"{step.metric} against {against}",
        (step.arm, own),
        (against, other),
        step.loss,
        criteria,
        metric=step.metric,
        lower_is_better=step.lower_is_better,
    )
