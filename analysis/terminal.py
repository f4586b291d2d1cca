"""The verdict in a terminal of 80 columns: for `python -m analysis report` and `make demo`."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from analysis.answer import control_warnings, headline, power_sentence, primary_sentence
from analysis.report import Report
from analysis.sections_results import OUT_OF_REACH, p_cell
from analysis.significance import relative_percent
from analysis.words import percent, percent_interval, share

WIDTH = 80


def print_verdict(report: Report, console: Console | None = None) -> None:
    """Print verdict, the table of arms, and where the page is.

    Parameters
    ----------
    report
        What was written.
    console
        Where to print; None: standard output, at most 80 columns wide.
    """
    out = console or Console(width=min(WIDTH, Console().width), highlight=False)
    found = report.study
    verdict, criteria = found.verdict, found.criteria
    out.print()
    out.print(Text(headline(verdict, criteria), style="bold"))
    if verdict.primary is not None:
        said = f"{primary_sentence(verdict.primary, criteria)} {power_sentence(verdict.primary, criteria)}"
        out.print(Padding(Text(said), (1, 0, 0, 0)))
    for warning in control_warnings(found):
        out.print(Padding(Text(f"Warning: {warning}", style="yellow"), (1, 0, 0, 0)))
    if found.arms:
        out.print(Padding(_table(report), (1, 0, 0, 0)))
    if len(found.collected.problems):
        out.print(Text(f"{len(found.collected.problems)} problem(s) with run folders are named in the report."))
    out.print(Text(f"Report: {report.page}"), soft_wrap=True)


def _table(report: Report) -> Table:
    found = report.study
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("arm")
    table.add_column("loss")
    for title in ("expected", "perplexity", f"{share(found.criteria.confidence)} interval", "p", "wins"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in found.arms:
        summary, expected = each.summary, each.expected_percent
        interval = None if summary is None else summary.interval
        table.add_row(
            Text(each.arm[0], style="bold" if each.role == "primary" else "dim" if each.role == "control" else ""),
            Text(each.group),
            "" if expected is None else percent(-expected),
            "–" if summary is None else percent(relative_percent(summary.mean)),
            "–" if interval is None else percent_interval(*(relative_percent(end) for end in interval)),
            p_cell(each.adjusted_p, each.floor, found.criteria.alpha).replace(OUT_OF_REACH, "–"),
            each.wins,
        )
    return table
