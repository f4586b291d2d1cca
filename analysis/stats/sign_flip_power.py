"""What the exact sign-flip test itself can show: its power, the smallest effect it detects, the pairs it needs.

The power of the paired t test (`analysis.stats.power`) is that of the sign-flip test from a dozen pairs on; with fewer the
floor of the exact test matters (six pairs at the effect that gives t 80 %: .63), so it is simulated here, from normal
differences drawn with a fixed seed: standard error below .008, and the same numbers in every report.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from analysis.stats.checks import FloatArray, finite_array, open_probability, positive, whole
from analysis.stats.power import minimal_detectable_dz, pairs_needed
from analysis.stats.sign_flip import all_signs, pairs_to_reach, sign_flip_floor

MAX_SIMULATED_PAIRS = 10
"""Above, the power of the t test is said."""
NUM_DRAWS = 4000
_SEED = 20_240_229


@dataclass(frozen=True)
class LevelPower:
    """How often a level would be reached that asks for p < alpha and for an estimate.

    Attributes
    ----------
    test
        Probability of p < alpha with the estimate on the better side.
    level
        Probability of that and of an estimate at least as good as was declared.
    """

    test: float
    level: float


def level_power(effect: float, sd: float, num_pairs: int, *, asked: float, alpha: float = 0.05) -> LevelPower:
    """Return the power of the sign-flip test, and of a level that also asks for an estimate.

    Parameters
    ----------
    effect : float
        True mean difference, in the units of `sd`; its size, an improvement being positive.
    sd : float
        True standard deviation of the differences.
    num_pairs : int
        Pairs, at least 2.
    asked : float
        Improvement that the estimate has to reach.
    alpha : float
        Two-sided level of the test.

    Raises
    ------
    ValueError
        If an argument is NaN, infinite or out of range.

    Notes
    -----
    At `effect == asked` the level is reached at most half of the time, whatever the number of pairs.
    """
    finite_array("effect", effect, ndim=0)
    positive("sd", sd)
    draws = _draws(whole("num_pairs", num_pairs, at_least=2))
    significant_F = _significant(effect / sd, num_pairs, open_probability("alpha", alpha))
    mean_F = draws.mean(axis=1) * sd + effect
    return LevelPower(
        test=float((significant_F & (mean_F > 0)).mean()), level=float((significant_F & (mean_F >= asked)).mean())
    )


@cache
def detectable_dz(num_pairs: int, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Return the smallest effect, in standard deviations of the differences, that the sign-flip test finds.

    None where its floor is not below `alpha`. Arguments and errors are those of `minimal_detectable_dz`.
    """
    low = minimal_detectable_dz(num_pairs, alpha=alpha, power=power)
    if sign_flip_floor(num_pairs) >= alpha:
        return None
    if num_pairs > MAX_SIMULATED_PAIRS:
        return low
    high = 2 * low
    while _significant(high, num_pairs, alpha).mean() < power:
        high *= 2
    low /= 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _significant(middle, num_pairs, alpha).mean() >= power else (middle, high)
    return high


@cache
def sign_flip_pairs_needed(dz: float, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return the smallest number of pairs with which the sign-flip test finds an effect; None where no plan has so many.

    Arguments and errors are those of `analysis.stats.power.pairs_needed`.
    """
    for_t = pairs_needed(dz, alpha=alpha, power=power)
    if for_t is None or for_t > MAX_SIMULATED_PAIRS:
        return for_t
    simulated = range(max(for_t, pairs_to_reach(alpha)), MAX_SIMULATED_PAIRS + 1)
    return next((n for n in simulated if _significant(abs(dz), n, alpha).mean() >= power), MAX_SIMULATED_PAIRS + 1)


@cache
def _draws(num_pairs: int) -> FloatArray:
    """Standard normal differences, shape (NUM_DRAWS, num_pairs), in mirrored pairs, so that they have no side."""
    half = np.random.default_rng(_SEED + num_pairs).standard_normal((NUM_DRAWS // 2, num_pairs))
    return np.concatenate([half, -half])


@cache
def _signed_sums(num_pairs: int) -> tuple[FloatArray, FloatArray]:
    """Of every assignment that leaves the first pair as it is: the signed sum of each draw, and of ones."""
    signs_FS = np.concatenate([np.ones((2 ** (num_pairs - 1), 1)), all_signs(num_pairs - 1)], axis=1)
    return np.asarray(_draws(num_pairs) @ signs_FS.T), signs_FS.sum(axis=1)


def _significant(dz: float, num_pairs: int, alpha: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each draw, moved by an effect, has p < alpha: exact sign-flip, or t above `MAX_SIMULATED_PAIRS`."""
    if num_pairs > MAX_SIMULATED_PAIRS:
        moved = _draws(num_pairs) + dz
        t_F = moved.mean(axis=1) / (moved.std(axis=1, ddof=1) / np.sqrt(num_pairs))
        return np.asarray(np.abs(t_F) > stats.t.isf(alpha / 2, num_pairs - 1))
    sums, ones = _signed_sums(num_pairs)
    extreme_F = np.abs(_draws(num_pairs).sum(axis=1) + dz * num_pairs) * (1 - 1e-12)
    # Flipping all signs leaves the size: half of the assignments are looked at, the observed one among them.
    as_extreme_F = (np.abs(sums + dz * ones) >= extreme_F[:, None]).sum(axis=1)
    return np.asarray(as_extreme_F / 2 ** (num_pairs - 1) < alpha)
