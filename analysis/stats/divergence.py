"""Pairs without a difference: a diverged run is an outcome, the worst one; a lost run is a missing pair.

The worst-rank test decides when a run of a pair diverged (the t interval of the others is then conditional on both
having finished); the bounds say what the mean difference could be over all planned pairs.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from analysis.stats.checks import FloatArray, finite_array, flag_array, number_array
from analysis.stats.paired import Interval
from analysis.stats.sign_flip import DEFAULT_NUM_FLIPS, SignFlipResult, sign_flip_test


def worst_rank_test(
    differences: ArrayLike,
    arm_diverged: ArrayLike,
    baseline_diverged: ArrayLike,
    *,
    lower_is_better: bool = True,
    rng: np.random.Generator | None = None,
    num_flips: int = DEFAULT_NUM_FLIPS,
) -> SignFlipResult:
    """Test paired runs of which some diverged, divergence being the worst outcome.

    Without divergence it is the exact Wilcoxon signed-rank test. Parameters and errors are those of
    `worst_rank_scores` and `sign_flip_test`; `statistic` of the result is the mean signed score.
    """
    scores_S = worst_rank_scores(differences, arm_diverged, baseline_diverged, lower_is_better=lower_is_better)
    return sign_flip_test(scores_S, rng=rng, num_flips=num_flips)


def worst_rank_scores(
    differences: ArrayLike, arm_diverged: ArrayLike, baseline_diverged: ArrayLike, *, lower_is_better: bool = True
) -> FloatArray:
    """Turn paired differences into signed ranks in which a diverged run is the worst outcome.

    Parameters
    ----------
    differences : array_like, shape (num_pairs,)
        Arm minus baseline. Where a run of the pair diverged the value is ignored and may be NaN.
    arm_diverged, baseline_diverged : array_like of bool, shape (num_pairs,)
        Whether that run diverged. A run lost to the infrastructure is a missing pair and is left out instead.
    lower_is_better : bool
        Direction of the metric, which decides the sign of the pairs with one diverged run.

    Returns
    -------
    ndarray, shape (num_pairs,)
        Sign of the difference times the rank of its size among those that are not zero, ties sharing their mean rank.
        A pair with one diverged run ranks above all others, against the run that diverged; a pair in which both
        diverged is a tie and scores 0.

    Raises
    ------
    ValueError
        If a flag array has another length or is not boolean, or a difference between two finished runs is not finite.

    Notes
    -----
    Worst-rank scores as in Lachin (1999), for pairs; zeros are left out before ranking as in Wilcoxon (1945).
    """
    d_S = number_array("differences", differences, ndim=1).copy()
    arm_S = flag_array("arm_diverged", arm_diverged, length=d_S.size)
    baseline_S = flag_array("baseline_diverged", baseline_diverged, length=d_S.size)
    finite_array("differences of finished pairs", d_S[~(arm_S | baseline_S)], ndim=1)
    worst = np.inf if lower_is_better else -np.inf
    d_S[arm_S & ~baseline_S] = worst
    d_S[baseline_S & ~arm_S] = -worst
    d_S[arm_S & baseline_S] = 0.0
    scores_S = np.zeros_like(d_S)
    untied_S = d_S != 0
    scores_S[untied_S] = np.sign(d_S[untied_S]) * stats.rankdata(np.abs(d_S[untied_S]))
    return scores_S


def mean_difference_bounds(differences: ArrayLike, unobserved_limits: ArrayLike) -> Interval:
    """Bound the mean difference over all planned pairs when some were not observed.

    Nothing is assumed about why a pair is unobserved: the bounds are what the mean would be if each such difference
    took the lowest, or the highest, value it can have (Horowitz and Manski 2000).

    Parameters
    ----------
    differences : array_like, shape (num_observed,)
        Observed differences, arm minus baseline; may be empty.
    unobserved_limits : array_like, shape (num_unobserved, 2)
        Lowest and highest possible difference of each missing or diverged pair, in the same units; may be empty.

    Returns
    -------
    Interval
        Both ends equal the observed mean when no pair is unobserved.

    Raises
    ------
    ValueError
        If there is no pair at all, a limit is not finite, or a lowest value is above its highest.
    """
    d_S = finite_array("differences", differences, ndim=1)
    limits_U2 = (
        np.zeros((0, 2))
        if np.size(unobserved_limits) == 0
        else finite_array("unobserved_limits", unobserved_limits, ndim=2)
    )
    if limits_U2.shape[1] != 2 or (limits_U2[:, 0] > limits_U2[:, 1]).any():
        raise ValueError(f"unobserved_limits must be (lowest, highest) per pair, got {limits_U2.tolist()}.")
    num_planned = d_S.size + len(limits_U2)
    if num_planned == 0:
        raise ValueError("differences and unobserved_limits are both empty, so there is no mean to bound.")
    low, high = (d_S.sum() + limits_U2.sum(axis=0)) / num_planned
    return Interval(float(low), float(high))
