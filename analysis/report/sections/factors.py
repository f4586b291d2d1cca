"""Section of the report: clean contrasts, factor effects and interactions."""

from __future__ import annotations

from analysis.report.render.document import Block, Heading, Paragraph, Table
from analysis.report.sections.tables import Draw, interval_cell, number_cells, p_cell
from analysis.report.sections.wording import family_sentence, label
from analysis.stats.paired import relative_percent
from analysis.verdict.study import Study
from analysis.words import listed, percent, share


def section(study: Study, draw: Draw) -> list[Block]:
    """4. Clean contrasts, factor effects and interactions."""
    criteria = study.criteria
    blocks: list[Block] = [
        Heading(2, "What makes the difference"),
        Paragraph(
            "An arm may differ from the baseline in several things at once; the declared contrasts take them apart, as "
            "far as what each of them differs in allows. All of this section is exploratory."
        ),
    ]
    interval = f"{share(criteria.confidence)} interval"
    numeric = frozenset({"found", interval, "p", "Hedges g", "wins"})
    if study.contrasts:
        rows = [
            (
                comparison.name,
                f"{comparison.arm[0]} − {comparison.against[0]}",
                ", ".join(study.grid.differing(comparison.arm, comparison.against)) or "–",
                comparison.group,
                *number_cells(comparison, criteria.alpha),
                label(comparison, criteria),
            )
            for comparison in study.contrasts
        ]
        columns = (
            "contrast",
            "difference",
            "differs in",
            "loss",
            "found",
            interval,
            "p",
            "Hedges g",
            "wins",
            "verdict",
        )
        caption = f"Change of perplexity, paired by seed; negative is better. {family_sentence(study.contrasts)}"
        blocks.append(Table(columns, tuple(rows), caption, numeric))
    missing = [name for name in criteria.contrasts if name not in {comparison.name for comparison in study.contrasts}]
    if missing:
        blocks.append(Paragraph(f"Not in this sweep: the declared contrast for {listed(missing)}."))
    if study.effects:
        blocks.append(Heading(3, "Factor effects and interactions"))
        lines: list[tuple[str, ...]] = []
        for effect in study.effects:
            summary = effect.summary
            lines.append(
                (
                    effect.name,
                    str(effect.num_matched),
                    "–" if summary is None else percent(relative_percent(summary.mean)),
                    "–" if summary is None or summary.interval is None else interval_cell(summary.interval),
                    p_cell(effect.adjusted_p, effect.floor, criteria.alpha),
                    "–" if summary is None else f"{summary.wins}/{summary.num_pairs}",
                )
            )
        blocks.append(
            Table(
                ("factor", "matched", "found", interval, "p", "wins"),
                tuple(lines),
                "Mean over all matched pairs of cells that differ in that factor only (matched: how many); × is an "
                "interaction, the change of one effect by the other. What the design lacks is not estimated; seeds "
                "in which one of the runs is missing or diverged are left out. p adjusted by Holm over the effects, "
                "and over the interactions.",
                frozenset({"matched", "found", interval, "p", "wins"}),
            )
        )
    return blocks
