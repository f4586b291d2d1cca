"""Differences against a margin: superiority, equivalence, non-inferiority, and the label of one comparison.

Margins are positive numbers in the units of the metric; which side of zero is better is said by `lower_is_better`.
The sign-flip p decides on superiority and harm, the t interval on margins.
"""

from dataclasses import dataclass
from enum import StrEnum

from analysis.stats.checks import finite_array, open_probability, positive
from analysis.stats.paired import Interval


class Label(StrEnum):
    """What one comparison showed; the words for a reader are the report's."""

    SUPERIOR_BY_MARGIN = "superior_by_margin"
    SUPERIOR = "superior"
    EQUIVALENT = "equivalent"
    NON_INFERIOR = "non_inferior"
    INCONCLUSIVE = "inconclusive"
    WORSE = "worse"
    UNDERPOWERED = "underpowered"


@dataclass(frozen=True)
class Judgement:
    """The label of one comparison, and the single findings, of which several may hold at once.

    Attributes
    ----------
    label : Label
        The strongest thing to be said.
    superior, worse : bool
        p < alpha, and the estimate on the better, or the worse, side of zero.
    superior_by_margin : bool
        Superior, and the 95 % interval wholly better than the superiority margin.
    non_inferior : bool
        The 95 % interval wholly better than the non-inferiority margin.
    equivalent : bool
        The 90 % interval inside plus and minus the non-inferiority margin.
    reachable : bool
        Whether p < alpha was possible with these pairs.
    """

    label: Label
    superior: bool
    worse: bool
    superior_by_margin: bool
    non_inferior: bool
    equivalent: bool
    reachable: bool


def judge(
    *,
    estimate: float,
    p_value: float | None,
    floor: float,
    interval: Interval | None,
    interval_90: Interval | None,
    superiority_margin: float,
    non_inferiority_margin: float,
    alpha: float = 0.05,
    lower_is_better: bool = True,
) -> Judgement:
    """Label one comparison.

    Parameters
    ----------
    estimate : float
        Mean difference, or the mean signed score of the worst-rank test; only its sign is used.
    p_value : float or None
        Two-sided p that decides (sign-flip, adjusted where there are several arms); None where no test was made.
    floor : float
        Smallest p that these pairs could have given.
    interval, interval_90 : Interval or None
        t intervals of coverage 1 - alpha and 1 - 2 alpha. None where there is no t, and where a run diverged and they
        would be conditional: nothing is then said about margins.
    superiority_margin : float
        Improvement that matters, above 0.
    non_inferiority_margin : float
        Harm that would be tolerated, above 0; on both sides of zero it is the equivalence margin.
    alpha : float
        Two-sided level; p has to be strictly below it.
    lower_is_better : bool
        Direction of the metric.

    Returns
    -------
    Judgement
        The label is the first that holds of: underpowered (p < alpha out of reach, whatever the intervals say),
        superior by margin, superior, worse (also inside the tolerated margin: harm shown is harm named), equivalent,
        non-inferior, inconclusive.

    Raises
    ------
    ValueError
        If a number is NaN, infinite or out of range.
    """
    positive("superiority_margin", superiority_margin)
    positive("non_inferiority_margin", non_inferiority_margin)
    open_probability("alpha", alpha)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor!r}.")
    if p_value is not None and not 0 <= p_value <= 1:
        raise ValueError(f"p_value must lie in [0, 1], got {p_value!r}.")
    harm = float(finite_array("estimate", estimate, ndim=0)) * (1 if lower_is_better else -1)
    bounds, bounds_90 = _harm("interval", interval, lower_is_better), _harm("interval_90", interval_90, lower_is_better)

    reachable = bool(floor < alpha)
    significant = reachable and p_value is not None and p_value < alpha
    superior, worse = significant and harm < 0, significant and harm > 0
    superior_by_margin = superior and bounds is not None and bounds.high < -superiority_margin
    non_inferior = bounds is not None and bounds.high < non_inferiority_margin
    equivalent = (
        bounds_90 is not None and -non_inferiority_margin < bounds_90.low and bounds_90.high < non_inferiority_margin
    )
    label = next(
        candidate
        for candidate, holds in (
            (Label.UNDERPOWERED, not reachable),
            (Label.SUPERIOR_BY_MARGIN, superior_by_margin),
            (Label.SUPERIOR, superior),
            (Label.WORSE, worse),
            (Label.EQUIVALENT, equivalent),
            (Label.NON_INFERIOR, non_inferior),
            (Label.INCONCLUSIVE, True),
        )
        if holds
    )
    return Judgement(label, superior, worse, superior_by_margin, non_inferior, equivalent, reachable)


def _harm(name: str, interval: Interval | None, lower_is_better: bool) -> Interval | None:
    """Turn an interval so that positive numbers are harm."""
    if interval is None:
        return None
    low, high = finite_array(name, interval, ndim=1)
    if low > high:
        raise ValueError(f"{name} must be (low, high), got {tuple(interval)}.")
    return Interval(float(low), float(high)) if lower_is_better else Interval(-float(high), -float(low))
