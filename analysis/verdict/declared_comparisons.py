"""Which comparisons a sweep holds: the primary one, arms and controls against the baseline, the clean contrasts.

Within each loss the arms are compared with the baseline of that loss; controls stand outside and are compared with
every baseline. Nothing is tested here.
"""

from __future__ import annotations

from analysis.design.cells import Sweep
from analysis.design.criteria import Criteria
from analysis.design.pairing import Grid
from analysis.verdict.comparison import Comparison, estimate, value_limits


def primary_comparison(grid: Grid, sweep: Sweep, criteria: Criteria) -> Comparison | None:
    """The declared primary comparison, not tested yet; None where the sweep lacks the arm or its baseline."""
    primary = criteria.primary
    own = sweep.group_of(primary.arm, primary.loss)
    base = sweep.group_of(sweep.baseline, primary.loss)
    if own is None or base is None or primary.arm == sweep.baseline:
        return None
    return estimate(
        grid,
        "primary",
        primary.arm,
        (primary.arm, own),
        (sweep.baseline, base),
        primary.loss,
        criteria,
        limits=value_limits(sweep),
        expected_percent=sweep.expected_percent.get(primary.arm),
    )


def arm_comparisons(grid: Grid, sweep: Sweep, criteria: Criteria) -> list[Comparison]:
    """Every arm and control against the baseline of each loss, without the primary; not tested yet."""
    found = []
    limits = value_limits(sweep)
    for group in sweep.groups:
        base = sweep.group_of(sweep.baseline, group)
        for arm, own, control in sweep.arms:
            is_primary = (arm, group) == (criteria.primary.arm, criteria.primary.loss)
            if base is None or arm == sweep.baseline or (own != group and not control) or is_primary:
                continue
            found.append(
                estimate(
                    grid,
                    "control" if control else "arm",
                    arm,
                    (arm, own),
                    (sweep.baseline, base),
                    group,
                    criteria,
                    limits=limits,
                    expected_percent=sweep.expected_percent.get(arm),
                )
            )
    return found


def contrast_comparisons(grid: Grid, sweep: Sweep, criteria: Criteria) -> list[Comparison]:
    """The declared clean contrasts that the sweep has the arms for, within each loss; not tested yet."""
    found = []
    for group in sweep.groups:
        for name, contrast in criteria.contrasts.items():
            own, other = sweep.group_of(contrast.arm, group), sweep.group_of(contrast.against, group)
            if own is not None and other is not None:
                found.append(
                    estimate(
                        grid,
                        "contrast",
                        name,
                        (contrast.arm, own),
                        (contrast.against, other),
                        group,
                        criteria,
                        limits=value_limits(sweep),
                    )
                )
    return found
