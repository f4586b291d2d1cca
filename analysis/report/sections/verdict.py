"""Section of the report: the verdict, what has to be known to read it, the declared levels and the sequence of tests."""

from __future__ import annotations

from analysis.report.render.document import Banner, Block, Bullets, Heading, Paragraph, Table, Tone
from analysis.report.sections.tables import Draw, p_cell
from analysis.report.sections.wording import (
    WORDS,
    headline,
    level_reasons,
    levels_sentence,
    power_sentence,
    primary_notes,
    primary_sentence,
    verdict_word,
)
from analysis.stats.equivalence import Label
from analysis.verdict.controls import control_notes, control_warnings
from analysis.verdict.levels import step_words
from analysis.verdict.provenance import pairs_made_differently
from analysis.verdict.sequence import StepResult
from analysis.verdict.study import Study
from analysis.verdict.verdict import Verdict
from analysis.words import effect


def section(study: Study, draw: Draw) -> list[Block]:
    """1. The verdict."""
    verdict, criteria = study.verdict, study.criteria
    blocks: list[Block] = [Heading(2, "Verdict"), _banner(study)]
    if verdict.exploratory:
        blocks.append(Paragraph(" ".join(verdict.exploratory), "This report is exploratory.", "warning"))
    warnings = control_warnings(study.controls, study.arms) if verdict.complete else []
    if verdict.primary is not None:
        warnings = (control_notes(study.controls, verdict.primary) if verdict.complete else []) + warnings
        warnings.append(pairs_made_differently(study.collected.runs, verdict.primary, study.grid.run_of))
    blocks += [Paragraph(warning, "Warning.", "warning") for warning in warnings if warning]
    if verdict.primary is not None:
        blocks += [_levels(verdict)] if verdict.complete else []
        blocks.append(_sequence(study))
        blocks.append(Paragraph(power_sentence(verdict.primary, criteria)))
    notes = primary_notes(study)
    return [*blocks, Bullets(tuple(notes))] if notes else blocks


def _banner(study: Study) -> Banner:
    """The word, the numbers behind it, and how far the levels are reached."""
    verdict, criteria = study.verdict, study.criteria
    # The colour is that of the word; how far the levels are reached says the table.
    worse = verdict_word(verdict) == WORDS[Label.WORSE]
    tone: Tone = "reached" if verdict_word(verdict).startswith("Better") else "missed" if worse else "lead"
    if verdict.primary is None:
        word, _, rest = headline(verdict, criteria).partition(": ")
        return Banner(word, rest[:1].upper() + rest[1:], tone)
    if not verdict.complete:
        word, _, rest = headline(verdict, criteria).partition(": ")
        return Banner(word, f"{rest} {primary_sentence(verdict.primary, criteria)}", tone)
    word = verdict_word(verdict) + (" (exploratory)" if verdict.exploratory else "")
    return Banner(word, f"{primary_sentence(verdict.primary, criteria)} {levels_sentence(verdict)}", tone)


def _levels(verdict: Verdict) -> Table:
    marks = {True: "yes", False: "no", None: "not judged"}
    rows = tuple((level.name, marks[level.reached], level_reasons(level)) for level in verdict.levels)
    caption = (
        "The declared levels; each asks for those above it too. The ideal level is one of estimates, not of tests."
    )
    return Table(("level", "reached", "why"), rows, caption, marked=frozenset({"reached"}))


def _sequence(study: Study) -> Table:
    rows = tuple(
        (f"{place}. {step_words(result.step)}", result.outcome, *_numbers(result, study))
        for place, result in enumerate(study.verdict.sequence, 1)
    )
    declared = "declared before the runs" if study.criteria.sequence is not None else "not declared before the runs"
    caption = (
        f"The tests of the paper level in their order, {declared}: each two-sided at {study.criteria.alpha:g}, made "
        "only if the one before passed in its direction."
    )
    numeric = frozenset({"p", "estimate", "wins"})
    return Table(("test", "outcome", "p", "estimate", "wins"), rows, caption, numeric, marked=frozenset({"outcome"}))


def _numbers(result: StepResult, study: Study) -> tuple[str, str, str]:
    comparison = result.comparison
    if comparison is None or comparison.summary is None:
        return "–", "–", "–"
    p_value = p_cell(comparison.p_value, comparison.floor, study.criteria.alpha)
    return p_value, effect(comparison.summary.mean, result.step.metric), comparison.wins
