"""What a number of pairs can show: the smallest detectable effect, and the pairs an effect needs.

Power is that of the two-sided paired t test under normality. The sign-flip test that decides has the same power from about
a dozen pairs on, less with fewer, and none at all where its floor is not below alpha: `analysis.stats.sign_flip_power`.
"""

from scipy import optimize, stats

from analysis.stats.checks import finite_array, open_probability, whole
from analysis.stats.sign_flip import pairs_to_reach

# More pairs than this are no plan; they are reported as None.
MAX_PAIRS = 1_000_000

# An effect this large is detected by any number of pairs that can reach alpha; beyond it the series below fails.
MAX_DZ = 1e4


def t_test_power(dz: float, num_pairs: int, *, alpha: float = 0.05) -> float:
    """Return the power of the two-sided paired t test.

    Parameters
    ----------
    dz : float
        True effect in standard deviations of the differences; its sign does not matter.
    num_pairs : int
        Pairs, at least 2.
    alpha : float
        Two-sided level.

    Returns
    -------
    float
        Probability of p < alpha.

    Raises
    ------
    ValueError
        If an argument is NaN, infinite or out of range.

    Notes
    -----
    t*t follows a noncentral F with 1 and n - 1 degrees of freedom and noncentrality n dz*dz. Same numbers as
    statsmodels' `TTestPower`, which goes through the noncentral t and returns NaN for many effects above dz = 2
    (dz = 3.6 with 6 pairs, say), where seeds that hardly differ put real results.
    """
    effect = min(abs(float(finite_array("dz", dz, ndim=0))), MAX_DZ)
    whole("num_pairs", num_pairs, at_least=2)
    open_probability("alpha", alpha)
    if effect == 0:
        return alpha
    critical = stats.f.isf(alpha, 1, num_pairs - 1)
    return float(stats.ncf.sf(critical, 1, num_pairs - 1, num_pairs * effect**2))


def minimal_detectable_dz(num_pairs: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest true effect that a paired t test detects with the given power.

    Parameters
    ----------
    num_pairs : int
        Pairs, at least 2.
    alpha : float
        Two-sided level.
    power : float
        Probability of p < alpha, above `alpha`.

    Returns
    -------
    float
        dz, in standard deviations of the differences: times the observed standard deviation it is in the units of
        the metric.

    Raises
    ------
    ValueError
        If an argument is out of range, or no effect up to `MAX_DZ` is detected.
    """
    whole("num_pairs", num_pairs, at_least=2)
    open_probability("alpha", alpha)
    if open_probability("power", power) <= alpha:
        raise ValueError(f"power must be above alpha = {alpha!r}, which no effect at all gives, got {power!r}.")
    above = 1.0
    while t_test_power(above, num_pairs, alpha=alpha) < power:
        above *= 2
        if above > MAX_DZ:
            raise ValueError(f"num_pairs = {num_pairs} detect no effect at all at alpha = {alpha!r}; use more pairs.")
    return float(optimize.brentq(lambda dz: t_test_power(dz, num_pairs, alpha=alpha) - power, 0.0, above, xtol=1e-12))


def pairs_needed(dz: float, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return the smallest number of pairs that detects an effect with the given power.

    Parameters
    ----------
    dz : float
        True effect in standard deviations of the differences; its sign does not matter.
    alpha : float
        Two-sided level.
    power : float
        Probability of p < alpha.

    Returns
    -------
    int or None
        Never fewer than the sign-flip test needs to reach `alpha` at all, though with one or two pairs more than that
        its power still is below that of the t test, for which this is computed. None above `MAX_PAIRS`.

    Raises
    ------
    ValueError
        If an argument is NaN, infinite or out of range.
    """
    open_probability("power", power)
    enough = pairs_to_reach(alpha)
    too_few = enough - 1
    while t_test_power(dz, enough, alpha=alpha) < power:
        too_few, enough = enough, 2 * enough
        if too_few >= MAX_PAIRS:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if t_test_power(dz, middle, alpha=alpha) >= power:
            enough = middle
        else:
            too_few = middle
    return enough if enough <= MAX_PAIRS else None
