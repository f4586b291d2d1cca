"""Paired differences between an arm and the baseline: estimate, interval, effect size, and Holm.

The unit of replication is the seed: a seed fixes data order and student start in every arm, so the analysis sees one
difference per seed, arm minus baseline. Arrays in, numbers out: this module knows no run folder, no table and no
random state. Whether a difference is significant is decided by the sign-flip test in `analysis.stats.sign_flip`; the t
interval computed here stands beside it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

from analysis.stats.checks import FloatArray, finite_array, open_probability, positive

# Differences whose spread is below this share of their size differ by rounding alone.
ROUNDING = 1e-12


class Interval(NamedTuple):
    """Two ends of an interval, in the units of what it is about."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedSummary:
    """What `num_pairs` paired differences say.

    Everything that the data do not define is None, never NaN; where there is no t, `reason` says why in words.

    Attributes
    ----------
    num_pairs, wins, ties, losses : int
        Pairs, and those in which the arm is better than, equal to and worse than the baseline.
    mean, sd : float
        Mean and standard deviation (divisor n - 1) of the differences, in the units of the metric.
    interval : Interval or None
        Two-sided t interval of the mean.
    t, p_value : float or None
        Paired t statistic and its two-sided p.
    dz, hedges_g : float or None
        mean / sd, and the same times the exact small-sample correction (which needs three pairs). Signed like `mean`.
    reason : str or None
        Why there is no t.
    """

    num_pairs: int
    mean: float
    sd: float | None
    interval: Interval | None
    t: float | None
    p_value: float | None
    dz: float | None
    hedges_g: float | None
    wins: int
    ties: int
    losses: int
    reason: str | None


def paired_summary(differences: ArrayLike, *, confidence: float = 0.95, lower_is_better: bool = True) -> PairedSummary:
    """Summarise paired differences: raw difference, t interval, dz, Hedges g, wins.

    Parameters
    ----------
    differences : array_like, shape (num_pairs,)
        Arm minus baseline, one per seed, in the units of the metric.
    confidence : float
        Coverage of the t interval.
    lower_is_better : bool
        Whether a negative difference is a win of the arm.

    Returns
    -------
    PairedSummary
        With one pair, or with differences that do not vary, it has a mean, no t, and the reason.

    Raises
    ------
    ValueError
        If `differences` is empty, not one-dimensional, or holds NaN or infinity.

    Notes
    -----
    dz is the mean over the standard deviation of the differences (Cohen 1988, chapter 2). The correction is the
    exact J(m) = Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)) with m = n - 1 (Hedges 1981, equation 6e), not 1 - 3/(4m - 1).
    """
    d_S = finite_array("differences", differences, ndim=1, at_least=(1,))
    open_probability("confidence", confidence)
    gain_S = -d_S if lower_is_better else d_S
    num_pairs, mean, reason = d_S.size, float(d_S.mean()), no_t_reason(d_S)
    sd = float(d_S.std(ddof=1)) if num_pairs > 1 else None
    interval, t, p_value, dz, hedges_g = None, None, None, None, None
    if reason is None and sd is not None:
        interval, t, dz = t_interval(d_S, confidence), mean / (sd / np.sqrt(num_pairs)), mean / sd
        p_value = float(2 * special.stdtr(num_pairs - 1, -abs(t)))
        hedges_g = dz * hedges_correction(num_pairs - 1) if num_pairs > 2 else None
    return PairedSummary(
        num_pairs=num_pairs,
        mean=mean,
        sd=sd,
        interval=interval,
        t=t,
        p_value=p_value,
        dz=dz,
        hedges_g=hedges_g,
        wins=int((gain_S > 0).sum()),
        ties=int((gain_S == 0).sum()),
        losses=int((gain_S < 0).sum()),
        reason=reason,
    )


def no_t_reason(d_S: FloatArray) -> str | None:
    """Say in words why finite differences of shape (num_pairs,) have no t statistic, or None if they have one."""
    if d_S.size < 2:
        return "one pair has no spread, so there is no t statistic"
    if d_S.std(ddof=1) <= ROUNDING * np.abs(d_S).max():
        return "the differences do not vary, so there is no t statistic"
    return None


def t_interval(d_S: FloatArray, confidence: float) -> Interval | None:
    """Return the two-sided t interval of the mean of finite differences (num_pairs,), None where there is no t."""
    if no_t_reason(d_S) is not None:
        return None
    # The quantile itself: a test object takes milliseconds to make, and simulations ask for many thousand intervals.
    half = float(special.stdtrit(d_S.size - 1, (1 + confidence) / 2) * d_S.std(ddof=1) / np.sqrt(d_S.size))
    return Interval(float(d_S.mean()) - half, float(d_S.mean()) + half)


@dataclass(frozen=True)
class Symmetry:
    """Whether differences look symmetric, as the sign-flip test needs them to be where nothing differs.

    Attributes
    ----------
    skewness : float
        Adjusted Fisher-Pearson skewness G1; 0 for symmetric differences.
    standard_error : float
        Of G1 for normal differences.
    sign_test_p : float
        Two-sided exact sign test of the median, which asks for no symmetry; ties are left out.
    """

    skewness: float
    standard_error: float
    sign_test_p: float

    @property
    def doubtful(self) -> bool:
        """Whether the skewness lies beyond two standard errors."""
        return abs(self.skewness) > 2 * self.standard_error


def symmetry(differences: ArrayLike) -> Symmetry | None:
    """Look at the symmetry of differences of shape (num_pairs,); None with fewer than three, or where they do not vary.

    Raises
    ------
    ValueError
        If a difference is NaN or infinite.

    Notes
    -----
    Joanes and Gill (1998) for G1 and its standard error. Of eight pairs not much can be seen: an inconspicuous skewness
    is no proof.
    """
    d_S = finite_array("differences", differences, ndim=1)
    n = d_S.size
    if n < 3 or no_t_reason(d_S) is not None:
        return None
    wins, losses = int((d_S < 0).sum()), int((d_S > 0).sum())
    return Symmetry(
        skewness=float(stats.skew(d_S, bias=False)),
        standard_error=float(np.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))),
        sign_test_p=float(stats.binomtest(min(wins, losses), wins + losses).pvalue),
    )


def hedges_correction(degrees_of_freedom: int) -> float:
    """Return the exact J(m) that makes g = J d unbiased under normality (Hedges 1981, equation 6e); m at least 2."""
    half = degrees_of_freedom / 2
    return float(np.exp(special.gammaln(half) - special.gammaln(half - 0.5)) / np.sqrt(half))


def relative_percent(difference: float, *, baseline: float | None = None) -> float:
    """Express a difference as percent of the baseline.

    Parameters
    ----------
    difference : float
        Arm minus baseline: of logarithms in nats where `baseline` is None, else in the units of `baseline`.
    baseline : float, optional
        Mean of the baseline, above 0. Left out for log perplexity, whose difference already is relative.

    Returns
    -------
    float
        Percent: 100 (exp(difference) - 1), or 100 difference / baseline.

    Raises
    ------
    ValueError
        If `difference` is not finite or `baseline` is not a finite number above 0.
    """
    number = float(finite_array("difference", difference, ndim=0))
    return 100 * float(np.expm1(number)) if baseline is None else 100 * number / positive("baseline", baseline)


def holm(p_values: ArrayLike) -> FloatArray:
    """Adjust the p values of an exploratory family by Holm's step-down method.

    Parameters
    ----------
    p_values : array_like, shape (num_tests,)
        Raw p values in [0, 1]; may be empty.

    Returns
    -------
    ndarray, shape (num_tests,)
        Adjusted p values in the order given.

    Raises
    ------
    ValueError
        If a p value is NaN or outside [0, 1]; a test that was not made does not belong in the family.
    """
    p_T = finite_array("p_values", p_values, ndim=1)
    if ((p_T < 0) | (p_T > 1)).any():
        raise ValueError(f"p_values must lie in [0, 1], got {p_T.tolist()}.")
    return np.asarray(multipletests(p_T, method="holm")[1], dtype=np.float64) if p_T.size else p_T
