"""Which comparisons are tested together, and what the tests show: alone, by max-T, under Holm.

The primary comparison is tested by itself, the other arms of a loss by a shared max-T sign-flip test, and everything else
as one exploratory family under Holm. Where a run of a pair diverged the worst-rank test decides.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from analysis.design.criteria import Criteria
from analysis.stats.checks import FloatArray
from analysis.stats.divergence import worst_rank_scores, worst_rank_test
from analysis.stats.equivalence import Judgement, judge
from analysis.stats.paired import holm
from analysis.stats.sign_flip import max_t_test, sign_flip_test
from analysis.verdict.comparison import JUDGED, ArmComparison

RNG_SEED = 20_240_229
"""Signs are drawn only above 20 seeds; the same ones in every report, so that rendering again changes nothing."""


def shown_better(comparison: ArmComparison, criteria: Criteria) -> bool:
    """Whether a tested comparison has its p below alpha, in the direction that is better."""
    return _significant(comparison, criteria) and _is_better(comparison)


def shown_worse(comparison: ArmComparison, criteria: Criteria) -> bool:
    """Whether a tested comparison has its p below alpha, in the direction that is harm."""
    return _significant(comparison, criteria) and comparison.statistic != 0 and not _is_better(comparison)


def _significant(comparison: ArmComparison, criteria: Criteria) -> bool:
    return comparison.adjusted_p is not None and comparison.adjusted_p < criteria.alpha


def _is_better(comparison: ArmComparison) -> bool:
    statistic = comparison.statistic or 0.0
    return statistic < 0 if comparison.lower_is_better else statistic > 0


def harm_excluded(comparison: ArmComparison, criteria: Criteria) -> bool | None:
    """Whether a harm as large as is tolerated is excluded; None where neither interval nor test can say so.

    By the interval. Where a run of a pair diverged there is none over all pairs, and the worst-rank test decides: of the
    differences moved by the tolerated harm, in which a diverged run stays the worst outcome.
    """
    pairs, tolerated = comparison.pairs, criteria.tolerated_nats
    if not comparison.conditional:
        interval = comparison.summary.interval if comparison.summary is not None else None
        return None if interval is None else interval.high < tolerated
    if len(pairs.seeds) < 2:
        return None
    moved = worst_rank_test(
        pairs.differences - tolerated, pairs.diverged, pairs.reference_diverged, rng=np.random.default_rng(RNG_SEED)
    )
    return moved.p_value < criteria.alpha and moved.statistic < 0


def decide_alone(comparison: ArmComparison, criteria: Criteria) -> ArmComparison:
    """Test a comparison that is a family by itself."""
    pairs = comparison.pairs
    if len(pairs.seeds) < 2:
        return replace(comparison, reason="one seed gives no p value" if pairs.seeds else "there is no pair")
    rng = np.random.default_rng(RNG_SEED)
    if pairs.finished.all():
        test = sign_flip_test(pairs.differences, rng=rng)
    else:
        test = worst_rank_test(
            pairs.differences,
            pairs.diverged,
            pairs.reference_diverged,
            lower_is_better=comparison.lower_is_better,
            rng=rng,
        )
    tested = replace(
        comparison,
        p_value=test.p_value,
        adjusted_p=test.p_value,
        statistic=test.statistic,
        floor=test.floor,
        reason="",
        family="alone",
    )
    return replace(tested, judgement=_judge(tested, criteria))


def decide_together(comparisons: list[ArmComparison], criteria: Criteria) -> list[ArmComparison]:
    """Test arms against one baseline by max-T: one sign per seed, shared by all arms.

    Seeds that one of the arms lacks are left out of the test of all (not of the estimates); an arm with no pair is left
    out of the family.
    """
    usable = [comparison for comparison in comparisons if len(comparison.pairs.seeds) >= 2]
    common = sorted(set.intersection(*(set(comparison.pairs.seeds) for comparison in usable))) if usable else []
    if len(common) < 2:
        reason = "fewer than two seeds are common to the arms that are tested together"
        return [
            replace(comparison, reason=reason if len(comparison.pairs.seeds) > 1 else "one seed gives no p value")
            for comparison in comparisons
        ]
    scores_SA = np.stack([_scores(comparison, common) for comparison in usable], axis=1)
    test = max_t_test(scores_SA, rng=np.random.default_rng(RNG_SEED))
    fewer = f", {len(common)} seeds" if len(common) < max(len(comparison.pairs.seeds) for comparison in usable) else ""
    family, tested = f"max-T over {len(usable)} arms{fewer}", {}
    for place, comparison in enumerate(usable):
        done = replace(
            comparison,
            p_value=float(test.p_values[place]),
            adjusted_p=float(test.adjusted_p_values[place]),
            statistic=float(scores_SA[:, place].mean()),
            floor=float(test.floors[place]),
            reason="",
            family=family,
        )
        tested[id(comparison)] = replace(done, judgement=_judge(done, criteria))
    return [
        tested.get(id(comparison), replace(comparison, reason="one seed gives no p value"))
        for comparison in comparisons
    ]


def under_holm(comparisons: list[ArmComparison], criteria: Criteria) -> list[ArmComparison]:
    """Test each alone and adjust all of them as one exploratory family."""
    alone = [decide_alone(comparison, criteria) for comparison in comparisons]
    made = [comparison for comparison in alone if comparison.p_value is not None]
    p_values = [comparison.p_value for comparison in made if comparison.p_value is not None]
    adjusted = dict(zip(map(id, made), holm(p_values), strict=True))
    done = []
    for comparison in alone:
        if id(comparison) in adjusted:
            # The smallest p of a family is multiplied by the family's size.
            floor = None if comparison.floor is None else min(1.0, len(made) * comparison.floor)
            family = f"Holm over {len(made)}"
            comparison = replace(comparison, adjusted_p=float(adjusted[id(comparison)]), family=family, floor=floor)
            comparison = replace(comparison, judgement=_judge(comparison, criteria))
        done.append(comparison)
    return done


def _judge(comparison: ArmComparison, criteria: Criteria) -> Judgement | None:
    if comparison.statistic is None or comparison.floor is None or comparison.metric != JUDGED:
        return None
    usable = comparison.summary is not None and not comparison.conditional
    return judge(
        estimate=comparison.statistic,
        p_value=comparison.adjusted_p,
        floor=comparison.floor,
        interval=comparison.summary.interval if usable and comparison.summary else None,
        interval_90=comparison.interval_90 if usable else None,
        superiority_margin=criteria.improvement_nats,
        non_inferiority_margin=criteria.tolerated_nats,
        alpha=criteria.alpha,
        lower_is_better=comparison.lower_is_better,
    )


def _scores(comparison: ArmComparison, seeds: list[int]) -> FloatArray:
    """Differences on the given seeds; signed worst-rank scores where a run diverged."""
    pairs = comparison.pairs
    places = [pairs.seeds.index(seed) for seed in seeds]
    if pairs.finished[places].all():
        return pairs.differences[places]
    return worst_rank_scores(
        pairs.differences[places],
        pairs.diverged[places],
        pairs.reference_diverged[places],
        lower_is_better=comparison.lower_is_better,
    )
