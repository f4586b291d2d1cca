"""The conditions of the three declared levels, each as a clause that says what was found; `verdict` puts them
together.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.design.criteria import Criteria, SequenceStep
from analysis.design.pairing import PairedGrid
from analysis.stats.paired import relative_percent
from analysis.verdict.comparison import ArmComparison
from analysis.verdict.sequence import StepResult
from analysis.verdict.testing import harm_excluded, shown_worse
from analysis.words import count, declared_percent, effect, metric_name, p_text, percent, share


@dataclass(frozen=True)
class Check:
    """One condition of a level.

    Attributes
    ----------
    name
        Which condition, in a word or two.
    passed
        None where it cannot be judged, which is not enough for the level.
    clause
        What was found, as a clause that a sentence can be made of.
    """

    name: str
    passed: bool | None
    clause: str


def minimum_checks(primary: ArmComparison, criteria: Criteria, ended: int, expected: int) -> tuple[Check, ...]:
    """Conditions of the minimum level: the runs ended, harm beyond what is tolerated is excluded, and none is shown."""
    tolerated = declared_percent(criteria.minimum.tolerated_percent, signed=True)
    excluded = harm_excluded(primary, criteria)
    if primary.conditional:
        by = "by the worst-rank test, since a run diverged"
    elif primary.summary is None or primary.summary.interval is None:
        by = (
            "without a pair" if primary.summary is None else f"since {primary.summary.reason or 'there is no interval'}"
        )
    else:
        end = percent(relative_percent(primary.summary.interval.high))
        by = f"by the {share(criteria.confidence)} interval, which ends at {end}"
    arm, against = primary.arm[0], primary.against[0]
    worse = shown_worse(primary, criteria)
    tested = "" if primary.adjusted_p is None else f" ({p_text(primary.adjusted_p)})"
    return (
        Check("all ended", ended == expected, _of(ended, expected, "planned run", "ended")),
        Check(
            "harm excluded", excluded, f"harm of {tolerated} perplexity is {'' if excluded else 'not '}excluded {by}"
        ),
        Check("not worse", not worse, f"{arm} is {'' if worse else 'not '}shown to be worse than {against}{tested}"),
    )


def ideal_checks(
    paired: PairedGrid, primary: ArmComparison, sequence: tuple[StepResult, ...], criteria: Criteria
) -> tuple[Check, ...]:
    """Conditions of the ideal level beyond the minimum: estimates, of which none is a test."""
    asked = declared_percent(-criteria.ideal.improvement_percent)
    mean = None if primary.summary is None else primary.summary.mean
    if mean is None:
        reached, clause = None, "there is no pair to estimate the change of perplexity from"
    else:
        reached = mean <= -criteria.improvement_nats
        strong = declared_percent(-criteria.ideal.strong_percent)
        more = f"beyond {strong}" if mean <= -criteria.strong_nats else f"where {asked} was asked for"
        clause = f"perplexity is estimated to change by {percent(relative_percent(mean))}, {more}"
    leanings = tuple(_leaning(result, primary.arm[0]) for result in sequence[1:])
    return (Check("estimate", reached, clause), *leanings, _nothing_collapsed(paired, primary, criteria))


def paper_checks(
    sequence: tuple[StepResult, ...], criteria: Criteria, ended: int, expected: int, exploratory: tuple[str, ...]
) -> tuple[Check, ...]:
    """Conditions of the paper level beyond the ideal: the sequence of tests, coverage, and everything as declared."""
    shown = sum(result.outcome == "shown" for result in sequence)
    clause = _of(shown, len(sequence), "test of the sequence", "passed", "tests of the sequence")
    if shown < len(sequence):
        clause += f": {_stopped(sequence[shown], criteria)}"
    compared = [result.comparison for result in sequence if result.comparison is not None]
    pairs, planned = (
        sum(len(comparison.pairs.seeds) for comparison in compared),
        sum(comparison.pairs.num_planned for comparison in compared),
    )
    covered = (
        f"{ended} of {count(expected, 'run')} and {pairs} of the {count(planned, 'pair')} of the sequence are there"
    )
    reasons = count(len(exploratory), "reason")
    return (
        Check("sequence", shown == len(sequence), clause),
        Check("coverage", ended == expected and pairs == planned, covered),
        Check(
            "declared",
            not exploratory,
            "everything is as it was declared before the runs"
            if not exploratory
            else f"this is not what was declared before the runs ({reasons})",
        ),
    )


def step_words(step: SequenceStep) -> str:
    """What a step of the sequence claims: `v4_0_2 has lower perplexity than none`."""
    return f"{step.arm} has {step.direction} {metric_name(step.metric)} than {step.against}"


def _stopped(result: StepResult, criteria: Criteria) -> str:
    """Why the sequence stopped at a step."""
    claim, comparison = step_words(result.step), result.comparison
    if comparison is None:
        return f"that {claim} cannot be tested in this sweep"
    if comparison.p_value is None:
        return f"that {claim} was not tested ({comparison.reason})"
    if comparison.floor is not None and comparison.floor >= criteria.alpha:
        seeds = count(len(comparison.pairs.seeds), "seed")
        return f"that {claim} is out of reach, since {seeds} cannot reach p < {criteria.alpha:g}"
    return f"that {claim} is not shown ({p_text(comparison.p_value)})"


def _leaning(result: StepResult, primary_arm: str) -> Check:
    """Whether the estimate is on the declared side: in the mean and in most of the pairs. Another arm is named."""
    step, comparison = result.step, result.comparison
    whose = "" if step.arm == primary_arm else f" of {step.arm}"
    name = f"{step.metric}{whose} against {step.against}"
    what = f"{metric_name(step.metric)}{whose} against {step.against}"
    if comparison is None or comparison.summary is None:
        missing = "is not in this sweep" if comparison is None else "was not measured in any pair"
        return Check(name, None, f"{what} {missing}")
    size = effect(comparison.summary.mean, step.metric)
    return Check(
        name,
        result.leans,
        f"{what} by {size}, {step.direction} in {comparison.wins.replace('/', ' of ')} pairs",
    )


def _nothing_collapsed(paired: PairedGrid, primary: ArmComparison, criteria: Criteria) -> Check:
    shares = {
        f"{row['arm']} seed {seed}": row["variance_share_min"]
        for cell in (primary.arm, primary.against)
        for seed, row in sorted(paired.cell(*cell).items())
        if row["variance_share_min"] is not None and row["variance_share_min"] == row["variance_share_min"]
    }
    collapsed = [name for name, least in shares.items() if least < criteria.collapse_share]
    limit = f"{share(criteria.collapse_share)} of its start"
    if not shares:
        return Check("nothing collapsed", None, "variances were not measured, so a collapse cannot be excluded")
    names = ", ".join(collapsed[:4]) + (" and more" if len(collapsed) > 4 else "")
    clause = f"a variance fell below {limit} ({names})" if collapsed else f"no variance fell below {limit}"
    return Check("nothing collapsed", not collapsed, clause)


def _of(number: int, whole: int, noun: str, verb: str, plural: str | None = None) -> str:
    """`all 96 planned runs ended`, `94 of 96 planned runs ended`."""
    counted = count(whole, noun, plural)
    return f"all {counted} {verb}" if number == whole else f"{number} of {counted} {verb}"
