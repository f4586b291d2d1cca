"""Which comparisons a sweep holds: the primary one, arms and controls against the baseline, the clean contrasts.

Within each loss the arms are compared with the baseline of that loss; controls stand outside and are compared with
every baseline. Nothing is tested here.
"""

from __future__ import annotations

from analysis.design.cells import Grid
from analysis.design.criteria import Criteria
from analysis.design.pairing import PairedGrid
from analysis.verdict.comparison import ArmComparison, estimate, value_limits


def primary_comparison(paired: PairedGrid, grid: Grid, criteria: Criteria) -> ArmComparison | None:
    """The declared primary comparison, not tested yet; None where the sweep lacks the arm or its baseline."""
    primary = criteria.primary
    own = grid.group_of(primary.arm, primary.loss)
    base = grid.group_of(grid.baseline, primary.loss)
    if own is None or base is None or primary.arm == grid.baseline:
        return None
    return estimate(
        paired,
        "primary",
        primary.arm,
        (primary.arm, own),
        (grid.baseline, base),
        primary.loss,
        criteria,
        limits=value_limits(grid),
        expected_percent=grid.expected_percent.get(primary.arm),
    )


def arm_comparisons(paired: PairedGrid, grid: Grid, criteria: Criteria) -> list[ArmComparison]:
    """Every arm and control against the baseline of each loss, without the primary; not tested yet."""
    comparisons = []
    limits = value_limits(grid)
    for group in grid.groups:
        base = grid.group_of(grid.baseline, group)
        for arm, own, control in grid.arms:
            is_primary = (arm, group) == (criteria.primary.arm, criteria.primary.loss)
            if base is None or arm == grid.baseline or (own != group and not control) or is_primary:
                continue
            comparisons.append(
                estimate(
                    paired,
                    "control" if control else "arm",
                    arm,
                    (arm, own),
                    (grid.baseline, base),
                    group,
                    criteria,
                    limits=limits,
                    expected_percent=grid.expected_percent.get(arm),
                )
            )
    return comparisons


def contrast_comparisons(paired: PairedGrid, grid: Grid, criteria: Criteria) -> list[ArmComparison]:
    """The declared clean contrasts that the sweep has the arms for, within each loss; not tested yet."""
    comparisons = []
    for group in grid.groups:
        for name, contrast in criteria.contrasts.items():
            own, other = grid.group_of(contrast.arm, group), grid.group_of(contrast.against, group)
            if own is not None and other is not None:
                comparisons.append(
                    estimate(
                        paired,
                        "contrast",
                        name,
                        (contrast.arm, own),
                        (contrast.against, other),
                        group,
                        criteria,
                        limits=value_limits(grid),
                    )
                )
    return comparisons
