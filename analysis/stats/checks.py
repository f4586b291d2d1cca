"""What the statistics accept: arrays of finite numbers of a known shape, and nothing that could poison a mean.

Every refusal is one sentence that names the argument, what came and what is allowed. NaN is never skipped: a missing
pair is left out by the caller, who counts it, and a diverged run goes through the worst-rank test.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def number_array(name: str, values: ArrayLike, *, ndim: int) -> FloatArray:
    """Return `values` as floats with `ndim` axes; NaN and infinity pass."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a rectangular array of numbers, but reading it failed: {error}.") from None
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axis(es), got shape {array.shape}.")
    return array


def finite_array(name: str, values: ArrayLike, *, ndim: int, at_least: tuple[int, ...] = ()) -> FloatArray:
    """Return `values` as finite floats with `ndim` axes, each as long as `at_least` asks."""
    array = number_array(name, values, ndim=ndim)
    if any(length < least for length, least in zip(array.shape, at_least, strict=False)):
        raise ValueError(f"{name} must have at least the shape {at_least}, got {array.shape}.")
    num_bad = int(np.count_nonzero(~np.isfinite(array)))
    if num_bad:
        raise ValueError(
            f"{name} must be finite, got {num_bad} NaN or infinite of {array.size} values: leave missing pairs out "
            "and give diverged runs to worst_rank_test."
        )
    return array


def flag_array(name: str, values: ArrayLike, *, length: int) -> BoolArray:
    """Return `values` as `length` booleans."""
    array = np.asarray(values)
    if array.dtype != np.bool_ or array.shape != (length,):
        raise ValueError(f"{name} must hold {length} booleans, got {array.dtype} of shape {array.shape}.")
    return array


def open_probability(name: str, value: float) -> float:
    """Return `value` if it lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}.")
    return float(value)


def positive(name: str, value: float) -> float:
    """Return `value` if it is finite and above 0."""
    if not (value > 0 and np.isfinite(value)):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")
    return float(value)


def whole(name: str, value: int, *, at_least: int) -> int:
    """Return `value` if it is a whole number of at least `at_least`."""
    if isinstance(value, bool) or int(value) != value or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}.")
    return int(value)
