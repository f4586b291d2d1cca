"""Margins: TOST against its reference, both margin tests against their intervals, and every label with its rank."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from analysis.stats.equivalence import Label, judge
from analysis.stats.paired import Interval, paired_summary
from analysis.stats.sign_flip import sign_flip_test

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
SLEEP = np.array([-1.2, -2.4, -1.3, -1.3, 0.0, -1.0, -1.8, -0.8, -4.6, -1.4])
differences = arrays(
    np.float64, st.integers(3, 12), elements=st.integers(-1000, 1000).map(lambda number: number / 640)
).filter(lambda d: np.ptp(d) > 0)
margins = st.floats(0.01, 3)

# -3 % and +1 % of perplexity, in nats, as declared for the primary comparison.
IMPROVEMENT, TOLERATED = -math.log(0.97), math.log(1.01)


def label_of(estimate, p_value, interval, interval_90=None, *, floor=2 / 2**8, **changed):
    return judge(
        estimate=estimate,
        p_value=p_value,
        floor=floor,
        interval=interval and Interval(*interval),
        interval_90=interval_90 and Interval(*interval_90),
        superiority_margin=IMPROVEMENT,
        non_inferiority_margin=TOLERATED,
        **changed,
    )


def judge_of(d, margin=1.0, *, tolerated=TOLERATED, lower_is_better=True):
    """The judgement of differences by their own test and intervals."""
    test, summary = sign_flip_test(d), paired_summary(d)
    return judge(
        estimate=summary.mean,
        p_value=test.p_value,
        floor=test.floor,
        interval=summary.interval,
        interval_90=paired_summary(d, confidence=0.9).interval,
        superiority_margin=margin,
        non_inferiority_margin=tolerated,
        lower_is_better=lower_is_better,
    )


def test_equivalence_is_decided_as_by_the_reference_of_two_one_sided_tests():
    # Schuirmann (1987) for Student's data: p = .02111686 at a margin of 2.5, so equivalent at .05; not so at 2.
    assert DescrStatsW(SLEEP).ttost_mean(-2.5, 2.5)[0] == pytest.approx(0.02111686, abs=5e-9)
    assert judge_of(SLEEP, tolerated=2.5).equivalent
    assert not judge_of(SLEEP, tolerated=2.0).equivalent


@PROPERTY
@given(differences, margins)
def test_equivalence_agrees_with_two_one_sided_tests(d, margin):
    assert judge_of(d, tolerated=margin).equivalent == (DescrStatsW(d).ttost_mean(-margin, margin)[0] < 0.05)
    assert judge_of(-d, tolerated=margin).equivalent == judge_of(d, tolerated=margin).equivalent


@PROPERTY
@given(differences, margins)
def test_non_inferiority_agrees_with_the_one_sided_test_at_half_of_alpha(d, margin):
    shown = stats.ttest_1samp(d, margin, alternative="less").pvalue < 0.025
    assert judge_of(d, tolerated=margin).non_inferior == shown
    assert judge_of(-d, tolerated=margin, lower_is_better=False).non_inferior == shown


@PROPERTY
@given(differences, margins, margins)
def test_a_wider_margin_is_easier(d, first, second):
    narrow, wide = (judge_of(d, tolerated=margin) for margin in sorted((first, second)))
    assert wide.equivalent >= narrow.equivalent
    assert wide.non_inferior >= narrow.non_inferior


@pytest.mark.parametrize("mean", [0.2, -0.2])
def test_equivalence_at_the_margin_keeps_its_level(mean):
    rng, num_simulations = np.random.default_rng(41), 1000
    shown = sum(judge_of(d, tolerated=0.2).equivalent for d in rng.normal(mean, 0.1, size=(num_simulations, 8)))
    low, high = stats.binom.interval(0.9999, num_simulations, 0.05)
    assert low <= shown <= high


def test_without_variance_no_margin_is_shown():
    judgement = judge_of(np.full(8, 0.001))
    assert (judgement.equivalent, judgement.non_inferior, judgement.superior_by_margin) == (False, False, False)


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        ((-0.05, 0.0078, (-0.06, -0.04), (-0.058, -0.042)), Label.SUPERIOR_BY_MARGIN),
        ((-0.03, 0.0078, (-0.04, -0.02), (-0.038, -0.022)), Label.SUPERIOR),
        ((-0.004, 0.0078, (-0.006, -0.002), (-0.005, -0.003)), Label.SUPERIOR),
        ((-0.004, 0.3, (-0.009, 0.001), (-0.008, 0.0)), Label.EQUIVALENT),
        ((-0.02, 0.1, (-0.05, 0.005), (-0.04, 0.0)), Label.NON_INFERIOR),
        ((-0.02, 0.2, (-0.06, 0.02), (-0.05, 0.01)), Label.INCONCLUSIVE),
        ((0.03, 0.0078, (0.02, 0.04), (0.022, 0.038)), Label.WORSE),
        ((0.004, 0.0078, (0.002, 0.006), (0.003, 0.005)), Label.WORSE),
        ((-0.05, 0.0078, None, None), Label.SUPERIOR),
        ((0.05, 0.0078, None, None), Label.WORSE),
        ((-0.05, None, None, None), Label.INCONCLUSIVE),
    ],
)
def test_labels(arguments, label):
    assert label_of(*arguments).label is label
    estimate, p_value, *intervals = arguments
    mirrored = [interval and (-interval[1], -interval[0]) for interval in intervals]
    assert label_of(-estimate, p_value, *mirrored, lower_is_better=False).label is label


def test_below_the_floor_the_label_is_underpowered_and_the_findings_remain():
    judgement = label_of(-0.05, 0.0625, (-0.06, -0.04), (-0.058, -0.042), floor=0.0625)
    assert judgement.label is Label.UNDERPOWERED
    assert (judgement.reachable, judgement.superior, judgement.superior_by_margin) == (False, False, False)
    assert judgement.non_inferior


def test_a_floor_equal_to_alpha_is_not_below_it():
    assert label_of(-0.05, 0.0625, None, floor=0.0625, alpha=0.0625).label is Label.UNDERPOWERED


def test_one_seed_is_underpowered():
    assert label_of(-0.05, None, None, floor=1.0).label is Label.UNDERPOWERED


def test_harm_inside_the_tolerated_margin_is_named_and_still_non_inferior():
    judgement = label_of(0.004, 0.0078, (0.002, 0.006), (0.003, 0.005))
    assert (judgement.label, judgement.worse) == (Label.WORSE, True)
    assert judgement.non_inferior
    assert judgement.equivalent


def test_p_has_to_be_strictly_below_alpha():
    assert not label_of(-0.05, 0.05, (-0.06, -0.04)).superior
    assert label_of(-0.05, 0.05, (-0.06, -0.04), alpha=0.051).superior


def test_an_estimate_on_the_wrong_side_is_never_superior():
    # The sign-flip test decides whether, the estimate decides in which direction.
    assert label_of(0.0, 0.0078, (-0.06, 0.06)).label is Label.INCONCLUSIVE


@PROPERTY
@given(differences, margins, margins, st.booleans())
def test_findings_never_contradict_each_other(d, superiority, tolerated, lower_is_better):
    judgement = judge_of(d, superiority, tolerated=tolerated, lower_is_better=lower_is_better)
    assert not (judgement.superior and judgement.worse)
    assert judgement.superior or not judgement.superior_by_margin
    assert judgement.non_inferior or not judgement.superior_by_margin
    assert (judgement.label is Label.UNDERPOWERED) == (not judgement.reachable)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"estimate": np.nan}, "estimate"),
        ({"p_value": np.nan}, "p_value"),
        ({"p_value": 1.2}, "p_value"),
        ({"floor": np.nan}, "floor"),
        ({"interval": Interval(0.1, np.nan)}, "interval"),
        ({"interval_90": Interval(0.2, 0.1)}, "interval_90"),
        ({"superiority_margin": -0.03}, "superiority_margin"),
        ({"non_inferiority_margin": np.nan}, "non_inferiority_margin"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_judge_refuses(changed, name):
    arguments = {
        "estimate": -0.05,
        "p_value": 0.0078,
        "floor": 0.0078,
        "interval": Interval(-0.06, -0.04),
        "interval_90": Interval(-0.058, -0.042),
        "superiority_margin": IMPROVEMENT,
        "non_inferiority_margin": TOLERATED,
    }
    with pytest.raises(ValueError, match=rf"^{name} must [^\n]*\.$"):
        judge(**(arguments | changed))
