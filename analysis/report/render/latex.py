r"""The table of results for a paper: `\input{results.tex}`, with the package booktabs.

Percentages are changes of perplexity, negative where the arm is better; nothing is rounded beyond what the page shows.
"""

from __future__ import annotations

import re

import pandas as pd

from analysis.stats.paired import relative_percent
from analysis.verdict.comparison import ArmComparison
from analysis.words import MINUS, SPACE, p_number, percent

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{each: f"\\{each}" for each in "&%$#_{}"},
}


def to_latex(comparisons: list[ArmComparison], confidence: float, caption: str) -> str:
    """Return comparisons as one LaTeX table, a row each.

    Parameters
    ----------
    comparisons
        In the order in which they are shown.
    confidence
        Of the intervals, such as 0.95.
    caption
        A plain sentence.
    """
    rows = [_row(comparison) for comparison in comparisons]
    if any(comparison.conditional for comparison in comparisons):
        caption += (
            " * Change and interval are of the pairs of which both runs finished; p has a diverged run as the worst."
        )
    columns = ["arm", "against", "loss", "change", f"{100 * confidence:g}\\,\\% interval", "$p$", "wins"]
    table = pd.DataFrame(rows, columns=columns)
    body = table.to_latex(index=False, escape=False, column_format="lllrrrr")
    return f"\\begin{{table}}\n\\centering\n\\caption{{{escaped(caption)}}}\n{body}\\end{{table}}\n"


def escaped(text: str) -> str:
    """Return a text in which nothing is a command of LaTeX's."""
    return re.sub(r"[\\~^&%$#_{}]", lambda match: _ESCAPED[match[0]], text).replace("−", "$-$").replace("±", r"$\pm$")


def _row(comparison: ArmComparison) -> list[str]:
    summary, p = comparison.summary, comparison.p_value
    interval = None if summary is None else summary.interval
    mark = "$^{*}$" if comparison.conditional else ""
    return [
        escaped(comparison.arm[0]),
        escaped(comparison.against[0]),
        escaped(comparison.group),
        "--" if summary is None else _percent(summary.mean) + mark,
        "--" if interval is None else f"[{_percent(interval.low)}, {_percent(interval.high)}]{mark}",
        "--" if p is None else f"${p_number(p)}$",
        escaped(comparison.wins),
    ]


def _percent(nats: float) -> str:
    text = percent(relative_percent(nats)).replace(MINUS, "-").replace(SPACE, r"\,").replace("%", r"\%")
    return f"${text}$"
