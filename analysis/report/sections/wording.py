"""The verdict in words: the same sentences in the report, the history and the terminal."""

from __future__ import annotations

from analysis.design.criteria import Criteria
from analysis.stats.equivalence import Label
from analysis.stats.paired import relative_percent
from analysis.verdict.comparison import ArmComparison, seeds_needed
from analysis.verdict.controls import control_notes, not_better_than
from analysis.verdict.study import Study
from analysis.verdict.verdict import LEVELS, Verdict
from analysis.words import count, declared_percent, listed, p_text, percent, percent_interval, share


def headline(verdict: Verdict, criteria: Criteria) -> str:
    """Which level was reached, in one sentence."""
    if verdict.primary is None:
        return (
            f"No verdict: this sweep does not hold {criteria.primary.arm} and its baseline with loss "
            f"{criteria.primary.loss}, which the criteria compare."
        )
    if not verdict.complete:
        return (
            f"No verdict yet: {verdict.ended} of {count(verdict.expected, 'run')} ended, so what follows are estimates "
            "and nothing is tested."
        )
    reached = [name for name in LEVELS if verdict.reached(name)]
    said = f"{reached[-1].capitalize()} level reached" if reached else "No level reached"
    missed = next((level for level in verdict.levels if not level.reached), None)
    if missed is not None:
        failed = [f"{check.asked} ({check.found})" for check in missed.checks if not check.passed]
        said += f"; {missed.name} level not reached: {'; '.join(failed)}" if reached else f": {'; '.join(failed)}"
    return ("Exploratory. " if verdict.exploratory else "") + said + "."


def primary_sentence(comparison: ArmComparison, criteria: Criteria) -> str:
    """The primary estimate with interval, p and seeds."""
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
    inside.append(test_phrase(comparison, criteria))
    seeds = f"{count(len(pairs.seeds), 'seed')}, better in {comparison.wins.replace('/', ' of ')}"
    return f"{start} {size} ({'; '.join(inside)}; {seeds})."


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
    """What these seeds can detect, and how many the asked-for improvement needs at the observed spread."""
    needed = seeds_needed(comparison, criteria)
    asked = declared_percent(criteria.ideal.improvement_percent)
    if needed is None:
        return "No spread between seeds was observed, so the seeds that are needed cannot be said."
    sentence = (
        f"At the observed spread between seeds an improvement of {asked} needs {count(needed, 'seed')} "
        f"for {share(criteria.power)} power"
    )
    if comparison.detectable is not None and comparison.summary is not None:
        found = percent(-relative_percent(-comparison.detectable), signed=False)
        sentence += f"; the {comparison.summary.num_pairs} at hand detect {found} or more"
    return sentence + "."


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
    said = words[judged.label]
    if judged.label is Label.INCONCLUSIVE and comparison.detectable is not None and not comparison.conditional:
        # Beside every null result: what these seeds would have found.
        said += f" (detects {percent(-relative_percent(-comparison.detectable), signed=False)})"
    if judged.label is Label.UNDERPOWERED and (judged.equivalent or judged.non_inferior):
        said += f"; {words[Label.EQUIVALENT if judged.equivalent else Label.NON_INFERIOR]}"
    return said


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
    if primary.bounds is not None:
        low, high = (relative_percent(end) for end in primary.bounds)
        notes.append(
            f"Over all {primary.pairs.num_planned} planned pairs the mean difference lies between "
            f"{percent_interval(low, high)} if no missing or diverged run would have been better than the best run of "
            "this sweep, nor worse than its worst run or the untrained student."
        )
    for pair in primary.pairs.unpaired:
        if pair.refused:
            notes.append(f"Seed {pair.seed} was not paired: {pair.reason}.")
    if primary.arm[0] == "v4_0_2" and primary.against[0] == "baseline":
        notes.append(
            "This comparison changes the aligner, its start and its number of parameters at once; the clean contrasts "
            "below change one thing each."
        )
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
        parts += control_notes(study.controls, verdict.primary)
    return " ".join(parts)


def family_sentence(comparisons: list[ArmComparison]) -> str:
    """How the p values of a table were adjusted."""
    conditional = " * conditional on both runs of a pair having finished: one diverged, and the worst-rank p decides."
    conditional = conditional if any(each.conditional for each in comparisons) else ""
    families = list(dict.fromkeys(each.family for each in comparisons if each.family and each.family != "alone"))
    return (f"p adjusted by {listed(families)}." if families else "") + conditional
