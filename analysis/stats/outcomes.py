"""Per-example outcomes such as exact match: two checkpoints against each other, and the method.

Examples are not replicates of a training method. McNemar's test compares two given checkpoints over examples; pooled
over seeds it still speaks of these checkpoints. `crossed_mean` speaks of the method: it takes seeds and examples both
as drawn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from analysis.stats.checks import finite_array, open_probability
from analysis.stats.paired import ROUNDING, Interval


@dataclass(frozen=True)
class McNemarResult:
    """McNemar's test of two checkpoints on the same examples.

    Attributes
    ----------
    statistic, p_value : float or None
        Chi-squared with one degree of freedom, without continuity correction, and its p.
    exact_p_value : float
        Two-sided binomial p of the discordant examples, for when they are few.
    num_discordant : int
        Examples on which the two differ.
    scope : str
        What the p value speaks of; to be printed beside it.
    reason : str or None
        Why there is no statistic.
    """

    statistic: float | None
    p_value: float | None
    exact_p_value: float
    num_discordant: int
    scope: str
    reason: str | None


@dataclass(frozen=True)
class CrossedMean:
    """Mean of an array of seeds by examples, both taken as random.

    Attributes
    ----------
    mean, standard_error : float
        In the units of the outcome.
    interval : Interval or None
        Two-sided t interval with num_seeds - 1 degrees of freedom.
    t, p_value : float or None
        mean / standard_error and its two-sided p.
    variance_seed, variance_item, variance_residual : float
        V_seed, V_item and V_resid: what seed means, item means and residuals each say the variance of the mean is.
    num_seeds, num_items : int
        Shape of the array.
    reason : str or None
        Why there is no t.
    """

    mean: float
    standard_error: float
    interval: Interval | None
    t: float | None
    p_value: float | None
    variance_seed: float
    variance_item: float
    variance_residual: float
    num_seeds: int
    num_items: int
    reason: str | None


def mcnemar(table: ArrayLike) -> McNemarResult:
    """Compare two checkpoints on the same examples.

    Parameters
    ----------
    table : array_like of int, shape (2, 2)
        Counts of examples: rows solved or not by the first, columns solved or not by the second checkpoint.

    Returns
    -------
    McNemarResult
        Without discordant examples it has no statistic, p = 1 exactly, and the reason.

    Raises
    ------
    ValueError
        If the table is not 2 by 2 or holds anything but counts.

    Notes
    -----
    McNemar (1947): (b - c)**2 / (b + c). Summed over seeds this is no test of the method: with 5 seeds, 1,319 items
    and seeds that differ by 1.5 points it finds a difference where there is none in a quarter of all cases.
    """
    counts = finite_array("table", table, ndim=2)
    if counts.shape != (2, 2) or (counts < 0).any() or (counts != np.floor(counts)).any():
        raise ValueError(f"table must hold counts of shape (2, 2), got {counts.tolist()}.")
    num_discordant = int(counts[0, 1] + counts[1, 0])
    scope = "these checkpoints, not the method"
    if num_discordant == 0:
        reason = "the checkpoints agree on every example, so there is no statistic"
        return McNemarResult(None, None, 1.0, 0, scope, reason)
    test = statsmodels_mcnemar(counts, exact=False, correction=False)
    exact = statsmodels_mcnemar(counts, exact=True)
    return McNemarResult(
        float(test.statistic), float(test.pvalue), min(1.0, float(exact.pvalue)), num_discordant, scope, None
    )


def crossed_mean(differences: ArrayLike, *, confidence: float = 0.95) -> CrossedMean:
    """Test the mean paired difference of per-example outcomes over new seeds and new examples.

    Parameters
    ----------
    differences : array_like, shape (num_seeds, num_items)
        Outcome of the arm minus outcome of the baseline for the same seed and example: -1, 0 or 1 for exact match.
    confidence : float
        Coverage of the interval.

    Returns
    -------
    CrossedMean
        Where the variance is zero it has a mean, no t, and the reason.

    Raises
    ------
    ValueError
        If there are fewer than two seeds or items, or a value is NaN or infinite.

    Notes
    -----
    Two-way random effects without replication (Searle, Casella and McCulloch 1992, chapter 4): with mean squares
    MS of seeds, items and residual, V_seed = MS_seed / (S I), V_item = MS_item / (S I), V_resid = MS_resid / (S I),
    and the variance of the grand mean is estimated without bias by V_seed + V_item - V_resid, here with t(S - 1).
    Where V_item < V_resid the component of the items is estimated as negative; it is then taken as zero, that is
    V = V_seed, the paired t test over seeds. Without that floor the test is too bold at few seeds (simulated level
    .088 at 3 seeds and nominal .05). It is conservative where the variance comes from the items.
    """
    d_SI = finite_array("differences", differences, ndim=2, at_least=(2, 2))
    open_probability("confidence", confidence)
    num_seeds, num_items = d_SI.shape
    seed_S, item_I, mean = d_SI.mean(axis=1), d_SI.mean(axis=0), float(d_SI.mean())
    residual_SI = d_SI - seed_S[:, None] - item_I[None, :] + mean
    variance_seed = float(seed_S.var(ddof=1)) / num_seeds
    variance_item = float(item_I.var(ddof=1)) / num_items
    residual_freedom = (num_seeds - 1) * (num_items - 1)
    variance_residual = float(np.square(residual_SI).sum()) / residual_freedom / d_SI.size
    standard_error = float(np.sqrt(variance_seed + max(variance_item - variance_residual, 0.0)))
    interval, t, p_value, reason = None, None, None, None
    if standard_error <= ROUNDING * np.abs(d_SI).max():
        reason = "the differences do not vary over seeds or items, so there is no t statistic"
    else:
        t = mean / standard_error
        p_value = 2 * float(stats.t.sf(abs(t), num_seeds - 1))
        half = float(stats.t.ppf((1 + confidence) / 2, num_seeds - 1)) * standard_error
        interval = Interval(mean - half, mean + half)
    return CrossedMean(
        mean=mean,
        standard_error=standard_error,
        interval=interval,
        t=t,
        p_value=p_value,
        variance_seed=variance_seed,
        variance_item=variance_item,
        variance_residual=variance_residual,
        num_seeds=num_seeds,
        num_items=num_items,
        reason=reason,
    )
