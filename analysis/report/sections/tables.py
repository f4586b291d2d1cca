"""What the sections of a report share: cells of tables, colours of arms, and how a figure is drawn."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure as Drawing

from analysis.report.render.document import Figure
from analysis.report.render.style import colours
from analysis.stats.paired import relative_percent
from analysis.verdict.comparison import ArmComparison
from analysis.verdict.study import Study
from analysis.words import number, p_number, percent, percent_interval

OUT_OF_REACH = "out of reach"
"""Stands for a p value that could not have been below alpha, whatever the runs had given."""

Draw = Callable[[str, str, Callable[[], Drawing]], Figure]
"""Draws a figure in the report's style, writes it, and returns its block: (name, caption, how to draw it)."""


def arm_colours(study: Study) -> dict[str, str]:
    """One colour for each arm, the same in every figure."""
    return colours(list(dict.fromkeys(arm for arm, _, _ in study.grid.arms)), study.grid.baseline)


def number_cells(comparison: ArmComparison, alpha: float) -> tuple[str, str, str, str, str]:
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
