"""Sign-flip tests against brute force, against what must not change them, and at their level under the null."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from analysis.stats.sign_flip import max_t_test, pairs_to_reach, sign_flip_floor, sign_flip_test

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SLEEP = np.array([-1.2, -2.4, -1.3, -1.3, 0.0, -1.0, -1.8, -0.8, -4.6, -1.4])
numbers = st.integers(-1000, 1000).map(lambda number: number / 64)
differences = arrays(np.float64, st.integers(2, 10), elements=numbers)
several_arms = arrays(np.float64, st.tuples(st.integers(2, 8), st.integers(1, 4)), elements=numbers)
multiples = st.floats(0.001, 1000)


def brute_force_p(d):
    """Count, in plain Python and exact binary fractions, the assignments at least as extreme as the observed one."""
    sums = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))
    ]
    return sum(total >= abs(sum(d)) for total in sums) / len(sums)


def brute_force_max_t(d_SA):
    """Recompute each arm's t for every assignment, instead of the correlation that the fast path compares."""

    def size_of_t(flipped_SA):
        mean, spread = flipped_SA.mean(axis=0), flipped_SA.std(axis=0, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(np.abs(mean) / spread * np.sqrt(len(flipped_SA)), posinf=1e9)

    observed = size_of_t(d_SA)
    flipped = np.array([size_of_t(d_SA * np.array(s)[:, None]) for s in itertools.product((1, -1), repeat=len(d_SA))])
    adjusted, remaining, smallest = np.ones(len(observed)), list(range(len(observed))), 0.0
    while remaining:
        arm = max(remaining, key=lambda candidate: observed[candidate])
        smallest = max(smallest, np.mean(flipped[:, remaining].max(axis=1) >= observed[arm] * (1 - 1e-9)))
        adjusted[arm] = smallest
        remaining.remove(arm)
    return adjusted


def within_binomial_error(rejections, num_simulations, level):
    """Whether a count of rejections is one that a test of exactly this level gives with probability .9999."""
    low, high = stats.binom.interval(0.9999, num_simulations, level)
    return low <= rejections <= high


def test_sleep_data_give_the_reference_answer():
    test = sign_flip_test(SLEEP)
    assert test.p_value == 4 / 1024
    assert test.statistic == pytest.approx(-1.58)
    assert test.exact
    # One difference is zero, so flipping it changes nothing: 9 pairs are left to reach significance.
    assert test.floor == 2 / 2**9


@pytest.mark.parametrize(("num_pairs", "floor"), [(1, 1.0), (5, 0.0625), (6, 0.03125), (8, 0.0078125), (20, 2 / 2**20)])
def test_floor(num_pairs, floor):
    assert sign_flip_floor(num_pairs) == floor


@pytest.mark.parametrize("num_pairs", [2, 5, 8, 13, 14, 20])
def test_floor_is_attained_when_all_signs_agree(num_pairs):
    test = sign_flip_test(np.linspace(1, 2, num_pairs))
    assert test.p_value == test.floor == sign_flip_floor(num_pairs)


@pytest.mark.parametrize(("alpha", "num_pairs"), [(0.05, 6), (0.01, 8), (0.0625, 6), (0.0626, 5), (0.001, 11)])
def test_pairs_to_reach_is_the_first_strictly_below_alpha(alpha, num_pairs):
    assert pairs_to_reach(alpha) == num_pairs


@PROPERTY
@given(differences)
def test_exact_equals_brute_force(d):
    assert sign_flip_test(d).p_value == brute_force_p(d.tolist())


def test_blocks_beyond_the_first_are_enumerated():
    d = np.random.default_rng(1).normal(0.4, 1.0, size=15)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=15)))
    assert sign_flip_test(d).p_value == np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9)


@PROPERTY
@given(differences, multiples)
def test_p_ignores_sign_and_scale_and_order(d, multiple):
    p_value = sign_flip_test(d).p_value
    assert sign_flip_test(-d).p_value == p_value
    assert sign_flip_test(d * multiple).p_value == p_value
    assert sign_flip_test(d[::-1]).p_value == p_value


@PROPERTY
@given(differences)
def test_p_lies_between_its_floor_and_one(d):
    test = sign_flip_test(d)
    assert test.floor <= test.p_value <= 1


def test_ties_made_by_rounding_count_as_ties():
    # 0.62 - 0.60 and 0.61 - 0.59 are both two points, and differ in the last bit.
    d = np.array([0.62 - 0.60, 0.61 - 0.59, 0.57 - 0.59, 0.75 - 0.73])
    assert sign_flip_test(d).p_value == brute_force_p([2, 2, -2, 2])


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_extreme_units_do_not_overflow(scale):
    assert sign_flip_test(SLEEP * scale).p_value == 4 / 1024


def test_differences_that_are_all_zero_show_nothing():
    test = sign_flip_test(np.zeros(8))
    assert (test.p_value, test.floor) == (1.0, 1.0)


def test_sampled_p_is_near_the_exact_one():
    d = np.random.default_rng(2).normal(0.5, 1.0, size=21)
    sums = np.zeros(1)
    for number in d:
        sums = np.concatenate([sums + number, sums - number])
    exact = np.mean(np.abs(sums) >= abs(d.sum()) - 1e-9)
    test = sign_flip_test(d, rng=np.random.default_rng(5), num_flips=50_000)
    assert not test.exact
    assert test.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 50_000))
    assert test.p_value == sign_flip_test(d, rng=np.random.default_rng(5), num_flips=50_000).p_value


def test_sampled_p_is_never_zero_and_names_its_floor():
    test = sign_flip_test(np.linspace(5, 6, 40), rng=np.random.default_rng(0), num_flips=999)
    assert test.p_value == test.floor == 1 / 1000


def test_sampling_without_a_generator_is_refused():
    with pytest.raises(ValueError, match=r"rng must be given for 21 pairs"):
        sign_flip_test(np.arange(21.0))


@PROPERTY
@given(several_arms)
def test_max_t_equals_brute_force(d_SA):
    assert max_t_test(d_SA).adjusted_p_values == pytest.approx(brute_force_max_t(d_SA), abs=1e-12)


@PROPERTY
@given(several_arms)
def test_max_t_is_never_below_the_marginal_p(d_SA):
    test = max_t_test(d_SA)
    marginal = [sign_flip_test(d_S).p_value for d_S in d_SA.T]
    assert test.p_values == pytest.approx(marginal, abs=0)
    assert (test.adjusted_p_values >= test.p_values).all()
    assert (test.p_values >= test.floors).all()


@PROPERTY
@given(several_arms, st.lists(multiples, min_size=4, max_size=4), st.permutations(range(4)))
def test_max_t_ignores_units_direction_and_order_of_arms(d_SA, scales, order):
    num_arms = d_SA.shape[1]
    order_A = [arm for arm in order if arm < num_arms]
    expected = max_t_test(d_SA).adjusted_p_values[order_A]
    changed = max_t_test(-(d_SA * np.array(scales[:num_arms]))[:, order_A]).adjusted_p_values
    assert changed == pytest.approx(expected, abs=0)


def test_max_t_floor_does_not_depend_on_the_number_of_arms():
    d_SA = np.random.default_rng(6).normal(5.0, 0.1, size=(8, 7))
    d_SA[:, 3] = 1.0  # the same difference for every seed: an infinite t
    test = max_t_test(d_SA)
    assert test.adjusted_p_values == pytest.approx(np.full(7, 2 / 2**8), abs=0)
    assert test.floors == pytest.approx(np.full(7, 2 / 2**8), abs=0)


def test_arms_that_are_copies_pay_nothing():
    d_S = np.random.default_rng(7).normal(0.6, 1.0, size=9)
    test = max_t_test(np.stack([d_S, 2 * d_S, -d_S], axis=1))
    assert test.adjusted_p_values == pytest.approx(np.full(3, sign_flip_test(d_S).p_value), abs=0)


def test_one_sign_per_seed_is_shared_by_all_arms():
    # The second arm mirrors the first one up to a little noise: independent signs would double p, shared ones do not.
    d_S = np.array([0.9, 1.1, 1.3, 0.7, 1.2, 1.0, -0.1, 0.8])
    noise_S = np.array([1, -1, 1, 1, -1, 1, -1, 1]) * 1e-6
    test = max_t_test(np.stack([d_S, -d_S + noise_S], axis=1))
    assert test.adjusted_p_values == pytest.approx(test.p_values, abs=1e-12)


def test_an_effect_in_one_arm_does_not_raise_the_p_of_the_next():
    # Against a maximum over all arms, the strong first arm would stand in the way of the second.
    d_SA = np.random.default_rng(13).normal([3.0, 0.8], 1.0, size=(10, 2))
    test = max_t_test(d_SA)
    assert test.adjusted_p_values[1] == test.p_values[1] > test.adjusted_p_values[0]


def test_sampled_max_t_is_near_the_exact_one():
    d_SA = np.random.default_rng(8).normal(0.35, 1.0, size=(20, 3))
    exact = max_t_test(d_SA)
    padded = np.concatenate([d_SA, np.zeros((1, 3))])  # a seed without a difference adds one pair and no information
    sampled = max_t_test(padded, rng=np.random.default_rng(9), num_flips=40_000)
    error = 4 * np.sqrt(0.25 / 40_000)
    assert exact.exact
    assert not sampled.exact
    assert sampled.adjusted_p_values == pytest.approx(exact.adjusted_p_values, abs=error)
    assert sampled.p_values == pytest.approx(exact.p_values, abs=error)


def test_sign_flip_keeps_its_level():
    # Skewed pairs: arm and baseline from one lognormal law, so that d is symmetric but far from normal.
    rng, num_simulations = np.random.default_rng(10), 4000
    d = np.exp(rng.normal(size=(num_simulations, 8, 2))) @ np.array([1.0, -1.0])
    rejections = sum(sign_flip_test(d_S).p_value < 0.05 for d_S in d)
    # p is uniform on multiples of 2/256, so P(p < .05) = 12/256 exactly.
    assert within_binomial_error(rejections, num_simulations, 12 / 256)


def test_max_t_keeps_its_family_wise_level():
    # Five arms against one shared baseline, all of the same law: differences are correlated by .5.
    rng, num_simulations = np.random.default_rng(11), 3000
    runs = rng.standard_t(3, size=(num_simulations, 8, 6))
    d = runs[:, :, 1:] - runs[:, :, :1]
    tests = [max_t_test(d_SA) for d_SA in d]
    any_adjusted = sum((test.adjusted_p_values < 0.05).any() for test in tests)
    any_raw = sum((test.p_values < 0.05).any() for test in tests)
    # The smallest adjusted p is the sign-flip p of the maximum, uniform up to ties in which two arms share a maximum.
    assert within_binomial_error(any_adjusted, num_simulations, 12 / 256)
    assert any_raw > 2 * any_adjusted


def test_max_t_keeps_its_level_beside_an_arm_with_an_effect():
    rng, num_simulations = np.random.default_rng(12), 2000
    d = rng.normal(size=(num_simulations, 8, 3)) + np.array([3.0, 0.0, 0.0])
    tests = [max_t_test(d_SA).adjusted_p_values for d_SA in d]
    false = sum((p_values[1:] < 0.05).any() for p_values in tests)
    found = sum(p_values[0] < 0.05 for p_values in tests)
    assert false <= stats.binom.ppf(0.9999, num_simulations, 0.05)
    assert found > 0.95 * num_simulations


@pytest.mark.parametrize("bad", [[1.0], [], [1.0, np.nan], [1.0, -np.inf], [[1.0, 2.0]], [1.0, None]])
def test_sign_flip_refuses_nan_and_a_single_pair(bad):
    with pytest.raises(ValueError, match=r"^differences must [^\n]*\.$"):
        sign_flip_test(bad)


@pytest.mark.parametrize("bad", [[[1.0, 2.0]], [1.0, 2.0], [[], []], [[1.0, np.nan], [1.0, 2.0]]])
def test_max_t_refuses_a_missing_seed_and_other_shapes(bad):
    with pytest.raises(ValueError, match=r"^differences must [^\n]*\.$"):
        max_t_test(bad)


@pytest.mark.parametrize(("function", "bad"), [(sign_flip_floor, 0), (sign_flip_floor, 2.5), (pairs_to_reach, 0.0)])
def test_planning_refuses_what_makes_no_sense(function, bad):
    with pytest.raises(ValueError, match=r"must (be a whole number|lie strictly)"):
        function(bad)
