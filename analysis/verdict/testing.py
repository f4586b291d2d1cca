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
    usable = [each for each in comparisons if len(each.pairs.seeds) >= 2]
    common = sorted(set.intersection(*(set(each.pairs.seeds) for each in usable))) if usable else []
    if len(common) < 2:
        reason = "fewer than two seeds are common to the arms that are tested together"
        return [
            replace(each, reason=reason if len(each.pairs.seeds) > 1 else "one seed gives no p value")
            for each in comparisons
        ]
    scores_SA = np.stack([_scores(each, common) for each in usable], axis=1)
    test = max_t_test(scores_SA, rng=np.random.default_rng(RNG_SEED))
    fewer = f", {len(common)} seeds" if len(common) < max(len(each.pairs.seeds) for each in usable) else ""
    family, tested = f"max-T over {len(usable)} arms{fewer}", {}
    for place, each in enumerate(usable):
        done = replace(
            each,
            p_value=float(test.p_values[place]),
            adjusted_p=float(test.adjusted_p_values[place]),
            statistic=float(scores_SA[:, place].mean()),
            floor=float(test.floors[place]),
            reason="",
            family=family,
        )
        tested[id(each)] = replace(done, judgement=_judge(done, criteria))
    return [tested.get(id(each), replace(each, reason="one seed gives no p value")) for each in comparisons]


def under_holm(comparisons: list[ArmComparison], criteria: Criteria) -> list[ArmComparison]:
    """Test each alone and adjust all of them as one exploratory family."""
    alone = [decide_alone(each, criteria) for each in comparisons]
    made = [each for each in alone if each.p_value is not None]
    p_values = [each.p_value for each in made if each.p_value is not None]
    adjusted = dict(zip(map(id, made), holm(p_values), strict=True))
    done = []
    for each in alone:
        if id(each) in adjusted:
            # The smallest p of a family is multiplied by the family's size.
            floor = None if each.floor is None else min(1.0, len(made) * each.floor)
            family = f"Holm over {len(made)}"
            each = replace(each, adjusted_p=float(adjusted[id(each)]), family=family, floor=floor)
            each = replace(each, judgement=_judge(each, criteria))
        done.append(each)
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
