"""One comparison of two arms: pairs, estimate, bounds, what it could detect. Tests are made by "
"`analysis.verdict.testing`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from analysis.design.cells import Grid
from analysis.design.criteria import Criteria
from analysis.design.pairing import PairedGrid, Pairs
from analysis.stats.divergence import mean_difference_bounds
from analysis.stats.equivalence import Judgement
from analysis.stats.paired import Interval, PairedSummary, Symmetry, paired_summary, symmetry, t_interval
from analysis.stats.sign_flip import sign_flip_floor
from analysis.stats.sign_flip_power import detectable_dz, sign_flip_pairs_needed

Role = Literal["primary", "arm", "control", "contrast"]
JUDGED = "validation_loss"
"""The metric that margins are declared for."""


@dataclass(frozen=True, eq=False)
class ArmComparison:
    """What is known of one arm against another.

    Attributes
    ----------
    role, name
        What it is for; `name` is the contrast's, else the arm's.
    arm, against
        Each (arm, group).
    group
        The loss within which they are compared.
    metric, lower_is_better
        What is compared: validation_loss in nats per token, and so on.
    pairs
        The paired values.
    summary
        Of the pairs in which both runs finished; None where there is none.
    interval_90
        t interval of the same pairs, for equivalence; only of validation loss.
    bounds
        Of the mean over all planned pairs, where one diverged or is missing.
    p_value, adjusted_p
        Two-sided sign-flip p, worst-rank where a run diverged, and the same adjusted for its family.
    statistic
        Whose sign is the direction of the test: the mean difference, or the mean signed score.
    family
        How `adjusted_p` was adjusted, in words.
    floor
        Smallest p that these pairs could have given; None with no pair.
    reason
        Why there is no p; empty where there is one.
    judgement
        What it shows; None where nothing was tested.
    expected_percent
        Improvement that was expected.
    detectable
        Smallest difference that the sign-flip test of so many pairs detects at the declared power and the observed spread,
        in the units of the metric.
    """

    role: Role
    name: str
    arm: tuple[str, str]
    against: tuple[str, str]
    group: str
    metric: str
    lower_is_better: bool
    pairs: Pairs
    summary: PairedSummary | None
    interval_90: Interval | None
    bounds: Interval | None
    p_value: float | None
    adjusted_p: float | None
    statistic: float | None
    family: str
    floor: float | None
    reason: str
    judgement: Judgement | None
    expected_percent: float | None
    detectable: float | None

    @property
    def conditional(self) -> bool:
        """Whether a run of a pair diverged, so that the t interval is conditional on both having finished."""
        return not bool(self.pairs.finished.all())

    @property
    def symmetry(self) -> Symmetry | None:
        """Whether the differences of finished pairs look symmetric, as the test asks; None where it cannot be seen."""
        return symmetry(self.pairs.differences[self.pairs.finished])

    @property
    def num_won(self) -> int:
        """Pairs in which the arm is better; a run that diverged loses to one that did not."""
        won = int((self.pairs.reference_diverged & ~self.pairs.diverged).sum())
        return won + (self.summary.wins if self.summary else 0)

    @property
    def wins(self) -> str:
        """`7/8`: pairs in which the arm is better, of all pairs."""
        return f"{self.num_won}/{len(self.pairs.seeds)}"


def estimate(
    paired: PairedGrid,
    role: Role,
    name: str,
    arm: tuple[str, str],
    against: tuple[str, str],
    group: str,
    criteria: Criteria,
    *,
    metric: str = "validation_loss",
    lower_is_better: bool = True,
    limits: tuple[float, float] | None = None,
    expected_percent: float | None = None,
) -> ArmComparison:
    """Estimate a difference, and test nothing. On a sweep that is not complete the summary has neither interval nor t.

    Parameters
    ----------
    limits
        Lowest and highest value that an unobserved run could have had, for the bounds.
    """
    pairs = paired.pair(arm, against, metric)
    observed, judged = pairs.differences[pairs.finished], metric == JUDGED
    summary = (
        paired_summary(observed, confidence=criteria.confidence, lower_is_better=lower_is_better)
        if observed.size
        else None
    )
    if summary is not None and not paired.complete:
        summary = replace(summary, interval=None, t=None, p_value=None)
    return ArmComparison(
        role=role,
        name=name,
        arm=arm,
        against=against,
        group=group,
        metric=metric,
        lower_is_better=lower_is_better,
        pairs=pairs,
        summary=summary,
        interval_90=t_interval(observed, 1 - 2 * criteria.alpha)
        if observed.size and judged and paired.complete
        else None,
        bounds=_bounds(paired, pairs, arm, against, metric, limits),
        p_value=None,
        adjusted_p=None,
        statistic=None,
        family="",
        floor=sign_flip_floor(len(pairs.seeds)) if pairs.seeds else None,
        reason="not tested",
        judgement=None,
        expected_percent=expected_percent,
        detectable=_detectable(summary, criteria),
    )


def value_limits(grid: Grid) -> tuple[float, float] | None:
    """Return the lowest and highest validation loss that an unobserved run is taken to have had.

    Nothing better than the best run of the sweep, nothing worse than the worst run or the untrained student.
    """
    losses = grid.cells["validation_loss"].dropna()
    untrained = grid.cells["untrained_validation_loss"].dropna()
    if losses.empty:
        return None
    return float(losses.min()), float(max(losses.max(), untrained.max() if len(untrained) else losses.max()))


def seeds_needed(comparison: ArmComparison, criteria: Criteria) -> int | None:
    """Seeds with which p < alpha would find the asked-for improvement at the observed spread; None without a spread."""
    summary = comparison.summary
    if summary is None or not summary.sd or summary.reason is not None:
        return None
    dz = criteria.improvement_nats / summary.sd
    return sign_flip_pairs_needed(dz, alpha=criteria.alpha, power=criteria.power)


def _detectable(summary: PairedSummary | None, criteria: Criteria) -> float | None:
    """Smallest detectable difference; None where p < alpha is out of reach, whatever the difference."""
    if summary is None or summary.sd is None or summary.reason is not None:
        return None
    dz = detectable_dz(summary.num_pairs, alpha=criteria.alpha, power=criteria.power)
    return None if dz is None else dz * summary.sd


def _bounds(
    paired: PairedGrid,
    pairs: Pairs,
    arm: tuple[str, str],
    against: tuple[str, str],
    metric: str,
    limits: tuple[float, float] | None,
) -> Interval | None:
    """Bounds of the mean over all planned pairs; None where nothing is missing, or no limits are known."""
    unobserved = [pair.seed for pair in pairs.unpaired]
    unobserved += [seed for seed, finished in zip(pairs.seeds, pairs.finished, strict=True) if not finished]
    if limits is None or not unobserved:
        return None

    def span(cell: tuple[str, str], seed: int) -> tuple[float, float]:
        row = paired.cell(*cell)[seed]
        value = row[metric]
        known = row["state"] == "finished" and value is not None and np.isfinite(value)
        return (float(value), float(value)) if known else limits

    refused = {pair.seed for pair in pairs.unpaired if pair.refused}
    spans = []
    for seed in unobserved:
        ours = limits if seed in refused else span(arm, seed)
        theirs = limits if seed in refused else span(against, seed)
        spans.append((ours[0] - theirs[1], ours[1] - theirs[0]))
    return mean_difference_bounds(pairs.differences[pairs.finished], spans)
