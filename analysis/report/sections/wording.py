"""The verdict in words: the same sentences in the report, the history and the terminal."""

from __future__ import annotations

from analysis.design.criteria import Criteria
from analysis.stats.equivalence import Label
from analysis.stats.paired import relative_percent
from analysis.stats.sign_flip import sign_flip_floor
from analysis.stats.sign_flip_power import level_power
from analysis.verdict.comparison import ArmComparison, seeds_needed
from analysis.verdict.controls import control_notes, not_better_than
from analysis.verdict.study import Study
from analysis.verdict.verdict import LEVELS, Level, Verdict
from analysis.words import (
    count,
    declared_percent,
    listed,
    number,
    p_text,
    percent,
    percent_interval,
    share,
    share_of_one,
)

WORDS = {
    Label.SUPERIOR_BY_MARGIN: "Better",
    Label.SUPERIOR: "Better (margin not shown)",
    Label.EQUIVALENT: "Equivalent",
    Label.NON_INFERIOR: "Inconclusive",
    Label.INCONCLUSIVE: "Inconclusive",
    Label.WORSE: "Worse",
    Label.UNDERPOWERED: "Inconclusive",
}
"""The verdict on the primary comparison in a word."""


def verdict_word(verdict: Verdict) -> str:
    """The first word of the report: better, better (margin not shown), equivalent, inconclusive or worse.

    Where nothing may be said yet, or the sweep does not hold what is to be compared: no verdict.
    """
    if verdict.primary is None:
        return "No verdict"
    if not verdict.complete:
        return "No verdict yet"
    judgement = verdict.primary.judgement
    if judgement is None:
        return "Inconclusive"
    # Two one-sided tests can show equivalence where the sign-flip test has too few seeds to show a difference.
    is_equivalent = judgement.label is Label.UNDERPOWERED and judgement.equivalent
    return WORDS[Label.EQUIVALENT if is_equivalent else judgement.label]


def headline(verdict: Verdict, criteria: Criteria) -> str:
    """What was found of the primary comparison in a word, and which level was reached."""
    word = verdict_word(verdict)
    if verdict.primary is None:
        return (
            f"{word}: this sweep does not hold {criteria.primary.arm} and its baseline with loss "
            f"{criteria.primary.loss}, which the criteria compare."
        )
    if not verdict.complete:
        return (
            f"{word}: {verdict.ended} of {count(verdict.expected, 'run')} ended, so what follows are estimates "
            "and nothing is tested."
        )
    return f"{word}{' (exploratory)' if verdict.exploratory else ''}. {levels_sentence(verdict)}"


def levels_sentence(verdict: Verdict) -> str:
    """The highest level that was reached, and the first that was not with its reasons."""
    reached = [name for name in LEVELS if verdict.reached(name)]
    missed = next((level for level in verdict.levels if not level.reached), None)
    parts = [f"{reached[-1].capitalize()} level reached."] if reached else []
    if missed is not None:
        reasons = level_reasons(missed)
        parts.append(f"{missed.name.capitalize()} level not reached: {reasons[0].lower()}{reasons[1:]}")
    return " ".join(parts)


def level_reasons(level: Level) -> str:
    """One sentence on a level: by what it was reached, or what keeps it from being reached."""
    if level.reached is None:
        return "The sweep is not covered as declared."
    clauses = [check.clause for check in level.checks if level.reached or not check.passed]
    if not clauses:
        return "Its own conditions hold, and it asks for the level before it too."
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


def primary_sentence(comparison: ArmComparison, criteria: Criteria) -> str:
    """The primary estimate with interval, p and seeds; with the spread between seeds where there is no interval yet."""
    arm, against = comparison.arm[0], comparison.against[0]
    start = f"With loss {comparison.group}, {arm} has"
    summary, pairs = comparison.summary, comparison.pairs
    if summary is None:
        return f"With loss {comparison.group} there is no pair of finished runs of {arm} and {against}."
    change = relative_percent(summary.mean)
    size = f"{percent(abs(change), signed=False)} {'lower' if change < 0 else 'higher'} perplexity than {against}"
    inside = []
    if summary.interval is not None:
        low, high = (relative_percent(end) for end in summary.interval)
        conditional = ", conditional on both having finished" if comparison.conditional else ""
        inside.append(f"{share(criteria.confidence)} interval {percent_interval(low, high)}{conditional}")
    elif summary.sd is not None:
        inside.append(f"spread between seeds {_spread(summary.sd)}")
    inside.append(test_phrase(comparison, criteria))
    seeds = f"{count(len(pairs.seeds), 'seed')}, better in {comparison.wins.replace('/', ' of ')}"
    return f"{start} {size} ({'; '.join(inside)}; {seeds})."


def _spread(sd: float) -> str:
    """A standard deviation of log perplexity as percent of perplexity."""
    return percent(relative_percent(sd), signed=False)


def test_phrase(comparison: ArmComparison, criteria: Criteria) -> str:
    """The p value, or in words why there is none or what these seeds cannot reach."""
    if comparison.adjusted_p is None:
        return f"no p value: {comparison.reason}"
    if comparison.floor is not None and comparison.floor >= criteria.alpha:
        what = count(len(comparison.pairs.seeds), "seed")
        family = f" in a family of this size ({comparison.family})" if comparison.family.startswith("Holm") else ""
        return f"{what} cannot reach p < {criteria.alpha:g}{family}"
    kind = "worst-rank sign-flip" if comparison.conditional else "sign-flip"
    how = f"exact {kind}" if len(comparison.pairs.seeds) <= 20 else f"{kind}, signs drawn"
    return p_text(comparison.adjusted_p) + f", {how}"


def power_sentence(comparison: ArmComparison, criteria: Criteria) -> str:
    """What was to be expected of so many seeds: the power of p, and of the level, which asks for an estimate too."""
    summary, asked = comparison.summary, declared_percent(criteria.ideal.improvement_percent)
    if summary is None or not summary.sd or summary.reason is not None or summary.num_pairs < 2:
        return "No spread between seeds was observed, so power cannot be said."
    seeds = count(summary.num_pairs, "seed")
    sentence = f"At the observed spread between seeds ({_spread(summary.sd)}) "
    if sign_flip_floor(summary.num_pairs) >= criteria.alpha:
        sentence += f"{seeds} show no improvement, however large"
    else:
        strong = declared_percent(criteria.ideal.strong_percent)
        at_asked, at_strong = (
            level_power(nats, summary.sd, summary.num_pairs, asked=criteria.improvement_nats, alpha=criteria.alpha)
            for nats in (criteria.improvement_nats, criteria.strong_nats)
        )
        sentence += (
            f"{seeds} show a true improvement of {asked} (p < {criteria.alpha:g}) with power "
            f"{share_of_one(at_asked.test)} and of {strong} with {share_of_one(at_strong.test)}; the paper level, "
            f"which asks for an estimate of {asked} too, is reached with at most {share_of_one(at_asked.level)} and "
            f"{share_of_one(at_strong.level)}"
        )
    needed = seeds_needed(comparison, criteria)
    more = (
        f"{share(criteria.power)} power for p < {criteria.alpha:g} at {asked} needs {count(needed, 'seed')}"
        if needed is not None
        else f"no practical number of seeds has {share(criteria.power)} power at {asked}"
    )
    return f"{sentence}; {more}."


def label(comparison: ArmComparison, criteria: Criteria) -> str:
    """The verdict on one comparison, in a few words."""
    judged = comparison.judgement
    if judged is None:
        return "estimate only" if comparison.reason == "not tested" else comparison.reason
    margin = declared_percent(criteria.minimum.tolerated_percent)
    asked = declared_percent(criteria.ideal.improvement_percent)
    words = {
        Label.SUPERIOR_BY_MARGIN: f"better by > {asked}",
        Label.SUPERIOR: "better",
        Label.EQUIVALENT: f"equivalent ±{margin}",
        Label.NON_INFERIOR: f"not worse by {margin}",
        Label.INCONCLUSIVE: "inconclusive",
        Label.WORSE: "worse",
        Label.UNDERPOWERED: f"cannot reach p < {criteria.alpha:g}",
    }
    text = words[judged.label]
    if judged.label is Label.INCONCLUSIVE and comparison.detectable is not None and not comparison.conditional:
        # Beside every null result: what these seeds would have found.
        text += f" (detects {percent(-relative_percent(-comparison.detectable), signed=False)})"
    if judged.label is Label.UNDERPOWERED and (judged.equivalent or judged.non_inferior):
        text += f"; {words[Label.EQUIVALENT if judged.equivalent else Label.NON_INFERIOR]}"
    return text


def primary_notes(study: Study) -> list[str]:
    """What has to be known to read the primary number."""
    primary, notes = study.verdict.primary, list[str]()
    if primary is None:
        return notes
    seeds = study.grid.cells["seed"].nunique()
    if seeds < study.criteria.seeds:
        notes.append(f"The criteria declare {count(study.criteria.seeds, 'seed')}; this sweep was made with {seeds}.")
    if primary.conditional:
        lost = int((~primary.pairs.finished).sum())
        notes.append(
            f"In {count(lost, 'pair')} a run diverged: divergence counts as the worst outcome in the test, and the "
            "interval speaks of the other pairs only."
        )
    if primary.bounds is not None and study.verdict.complete:
        low, high = (relative_percent(end) for end in primary.bounds)
        notes.append(
            f"Over all {primary.pairs.num_planned} planned pairs the mean difference lies between "
            f"{percent_interval(low, high)} if no missing or diverged run would have been better than the best run of "
            "this sweep, nor worse than its worst run or the untrained student."
        )
    if primary.symmetry is not None and primary.symmetry.doubtful:
        notes.append(
            f"The differences are skewed (G1 = {number(primary.symmetry.skewness, 2, signed=True)}), and the "
            "sign-flip test asks for differences that are symmetric about zero where nothing differs: its p may be "
            "too small. The exact sign test of the median, which does not, gives "
            f"{p_text(primary.symmetry.sign_test_p)}."
        )
    for pair in primary.pairs.unpaired:
        if pair.refused:
            notes.append(f"Seed {pair.seed} was not paired: {pair.reason}.")
    differing = study.grid.differing(primary.arm, primary.against)
    if len(differing) > 1 or "aligner" in differing:
        parameters = {each.aligner for each in study.cost if (each.arm, each.group) in (primary.arm, primary.against)}
        sizes = ", and so in the aligner's number of parameters" if len(parameters) > 1 else ""
        contrasts = "; the contrasts below take it apart" if study.contrasts else ""
        notes.append(f"The two arms differ in {listed(list(differing))}{sizes}{contrasts}.")
    starts = {(config.get("model") or {}).get("student_start") for config in study.grid.configs.values() if config}
    if "pretrained" in starts:
        notes.append(
            "The student was given, so p covers data order and aligner start only, not the student's own start."
        )
    return notes


def conclusion(study: Study) -> str:
    """One paragraph: headline, primary numbers, what would change them, and which controls were not beaten."""
    verdict, criteria = study.verdict, study.criteria
    parts = [headline(verdict, criteria)]
    if verdict.primary is not None:
        parts.append(primary_sentence(verdict.primary, criteria))
        parts.append(power_sentence(verdict.primary, criteria))
        short = not_better_than(study.controls, verdict.primary.arm[0], verdict.primary.group)
        if short:
            parts.append(f"{verdict.primary.arm[0]} is not better than {listed(short)}.")
        parts += control_notes(study.controls, verdict.primary) if verdict.complete else []
    return " ".join(parts)


def family_sentence(comparisons: list[ArmComparison]) -> str:
    """How the p values of a table were adjusted."""
    conditional = " * conditional on both runs of a pair having finished: one diverged, and the worst-rank p decides."
    conditional = conditional if any(comparison.conditional for comparison in comparisons) else ""
    families = list(
        dict.fromkeys(
            comparison.family for comparison in comparisons if comparison.family and comparison.family != "alone"
        )
    )
    return (f"p adjusted by {listed(families)}." if families else "") + conditional
