"""Sections of the report: the verdict, and expected against found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure as Drawing

from analysis import figures
from analysis.answer import (
    control_warnings,
    family_sentence,
    headline,
    label,
    power_sentence,
    primary_notes,
    primary_sentence,
)
from analysis.compare import Comparison
from analysis.document import Block, Bullets, Figure, Heading, Paragraph, Table, Tone
from analysis.significance import relative_percent
from analysis.study import Study
from analysis.style import colours
from analysis.words import declared_percent, number, p_number, percent, percent_interval, share

OUT_OF_REACH = "out of reach"
"""Stands for a p value that could not have been below alpha, whatever the runs had given."""

Draw = Callable[[str, str, Callable[[], Drawing]], Figure]
"""Draws a figure in the report's style, writes it, and returns its block: (name, caption, how to draw it)."""


def verdict_section(study: Study) -> list[Block]:
    """1. The verdict."""
    verdict, criteria = study.verdict, study.criteria
    blocks: list[Block] = [Heading(2, "Verdict")]
    if verdict.exploratory:
        blocks.append(Paragraph(" ".join(verdict.exploratory), "This report is exploratory.", "warning"))
    tone: Tone = "reached" if verdict.reached("minimum") else "missed"
    text = ""
    if verdict.primary is not None:
        text = f"{primary_sentence(verdict.primary, criteria)} {power_sentence(verdict.primary, criteria)}"
    blocks.append(Paragraph(text, headline(verdict, criteria), tone))
    blocks += [Paragraph(warning, "Warning.", "warning") for warning in control_warnings(study)]
    notes = primary_notes(study)
    if notes:
        blocks.append(Bullets(tuple(notes)))
    rows = [
        (level.name, check.asked, check.found, {True: "yes", False: "no", None: "not judged"}[check.passed])
        for level in verdict.levels
        for check in level.checks
    ]
    if rows:
        shown = [
            (level if place == 0 or rows[place - 1][0] != level else "", *rest)
            for place, (level, *rest) in enumerate(rows)
        ]
        blocks.append(
            Table(
                ("level", "asked", "found", "holds"),
                tuple(shown),
                "The declared levels; each asks for those above it too. What is not in this sweep cannot hold.",
            )
        )
    return blocks


def found_section(study: Study, draw: Draw) -> list[Block]:
    """2. Expected against found."""
    sweep, criteria = study.sweep, study.criteria
    control = criteria.ideal.better_than
    blocks: list[Block] = [Heading(2, "Expected against found")]
    if not study.arms:
        return [*blocks, Paragraph("There is nothing to compare: the sweep holds one arm only.")]
    palette = arm_colours(study)
    panels = {
        f"loss {group}": [
            _forest_row(each, palette) for each in study.arms if each.group == group and each.pairs.num_planned
        ]
        for group in sweep.groups
    }
    caption = (
        f"Perplexity on the validation split against {sweep.baseline}, paired by seed: mean, "
        f"{share(criteria.confidence)} t interval (bar), every seed (ticks) and what was expected (open diamond)."
    )
    blocks.append(draw("differences", caption, lambda: figures.forest(panels, sweep.baseline)))
    for group in sweep.groups:
        members = [each for each in study.arms if each.group == group]
        rows = [_baseline_row(study, group), *(_row(each, study) for each in members)]
        tail = f"{family_sentence(members)} " if family_sentence(members) else ""
        blocks.append(Heading(3, f"Loss {group}"))
        blocks.append(
            Table(
                (
                    "arm",
                    "perplexity",
                    "expected",
                    "found",
                    f"{share(criteria.confidence)} interval",
                    "p",
                    "Hedges g",
                    "wins",
                    f"against {control}",
                    "verdict",
                ),
                tuple(rows),
                f"Change of perplexity against {sweep.baseline} with the same loss; negative is better. {tail}"
                + (
                    "The primary comparison stands out; the others are exploratory. "
                    if any(each.role == "primary" for each in members)
                    else "All of this table is exploratory. "
                )
                + f"{_label_words(study)} Expected improvements are written as lower perplexity; Hedges g is paired "
                "(dz with the exact small-sample correction).",
                frozenset(
                    {
                        "perplexity",
                        "expected",
                        "found",
                        f"{share(criteria.confidence)} interval",
                        "p",
                        "Hedges g",
                        "wins",
                        f"against {control}",
                    }
                ),
                frozenset(place for place, each in enumerate(members, 1) if each.role == "primary"),
            )
        )
    blocks.append(draw(*_seed_lines(study, palette)))
    return blocks


def _label_words(study: Study) -> str:
    margin = declared_percent(study.criteria.minimum.tolerated_percent)
    return (
        f"Better by > {declared_percent(study.criteria.ideal.improvement_percent)}: the whole interval is; not worse by "
        f"{margin}: the interval excludes that harm; equivalent ±{margin}: two one-sided tests; detects: the smallest "
        f"difference found with {share(study.criteria.power)} power."
    )


def arm_colours(study: Study) -> dict[str, str]:
    """One colour for each arm, the same in every figure."""
    return colours(list(dict.fromkeys(arm for arm, _, _ in study.sweep.arms)), study.sweep.baseline)


def _forest_row(comparison: Comparison, palette: dict[str, str]) -> figures.ForestRow:
    summary, expected = comparison.summary, comparison.expected_percent
    differences = comparison.pairs.differences[comparison.pairs.finished]
    interval = None
    if summary is not None and summary.interval is not None:
        interval = type(summary.interval)(*(relative_percent(end) for end in summary.interval))
    return figures.ForestRow(
        comparison.arm[0],
        palette[comparison.arm[0]],
        None if summary is None else relative_percent(summary.mean),
        interval,
        None if expected is None else -expected,
        tuple(relative_percent(each) for each in differences),
    )


def _seed_lines(study: Study, palette: dict[str, str]) -> tuple[str, str, Callable[[], Drawing]]:
    primary = study.verdict.primary
    group = primary.group if primary is not None else study.sweep.groups[0]
    members = [each for each in study.arms if each.group == group]
    seeds = sorted({seed for each in members for seed in each.pairs.seeds})
    percent_SA = np.full((len(seeds), len(members)), np.nan)
    for column, each in enumerate(members):
        for seed, difference in zip(each.pairs.seeds, each.pairs.differences, strict=True):
            percent_SA[seeds.index(seed), column] = 100 * np.expm1(difference)
    arms = [each.arm[0] for each in members]
    caption = f"Paired differences to {study.sweep.baseline} with loss {group}: one line per seed."
    return "seeds", caption, lambda: figures.seed_lines(arms, percent_SA, seeds, palette, study.sweep.baseline)


def _baseline_row(study: Study, group: str) -> tuple[str, ...]:
    baseline = study.sweep.baseline
    return (
        baseline,
        _perplexity(study, baseline, group),
        "–",
        "reference",
        "–",
        "–",
        "–",
        "–",
        _against(study, baseline, group),
        "",
    )


def _row(comparison: Comparison, study: Study) -> tuple[str, ...]:
    arm, group = comparison.arm[0], comparison.group
    expected = comparison.expected_percent
    name = f"{arm} (control)" if comparison.role == "control" else arm
    return (
        name,
        _perplexity(study, arm, group),
        "–" if expected is None else percent(-expected),
        *number_cells(comparison, study.criteria.alpha),
        _against(study, arm, group),
        label(comparison, study.criteria),
    )


def number_cells(comparison: Comparison, alpha: float) -> tuple[str, str, str, str, str]:
    """Cells for found, interval, p, Hedges g, wins."""
    summary = comparison.summary
    if summary is None:
        return ("–", "–", "–", "–", f"0/{comparison.pairs.num_planned}")
    conditional = "*" if comparison.conditional else ""
    return (
        percent(relative_percent(summary.mean)) + conditional,
        "–" if summary.interval is None else interval_cell(summary.interval) + conditional,
        p_cell(comparison.adjusted_p, comparison.floor, alpha),
        number(summary.hedges_g, 2, signed=True),
        comparison.wins,
    )


def p_cell(value: float | None, floor: float | None, alpha: float) -> str:
    """A p value for a table: one that could not have been below alpha is no result and is not printed."""
    if value is None:
        return "–"
    return p_number(value) if floor is None or floor < alpha else OUT_OF_REACH


def interval_cell(interval: tuple[float, float]) -> str:
    """An interval of log perplexity as change of perplexity."""
    return percent_interval(*(relative_percent(end) for end in interval))


def _perplexity(study: Study, arm: str, group: str) -> str:
    own = study.sweep.group_of(arm, group)
    cells = study.sweep.cells
    losses = cells.loc[(cells["arm"] == arm) & (cells["group"] == own), "validation_loss"].dropna()
    return "–" if losses.empty else number(float(np.exp(losses.astype(float).mean())), 4)


def _against(study: Study, arm: str, group: str) -> str:
    control = study.criteria.ideal.better_than
    if arm == control:
        return "–"
    if arm == study.sweep.baseline:
        other = next((each for each in study.arms if each.arm[0] == control and each.group == group), None)
        mean = None if other is None or other.summary is None else -other.summary.mean
    else:
        found = study.against_control.get((arm, group))
        mean = None if found is None or found.summary is None else found.summary.mean
    return "–" if mean is None else percent(relative_percent(mean))
