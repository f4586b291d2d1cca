"""The verdict in a terminal of 80 columns: for `python -m analysis report` and `make demo`."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from analysis.report.report import Report
from analysis.report.sections.tables import OUT_OF_REACH, p_cell
from analysis.report.sections.wording import headline, power_sentence, primary_sentence
from analysis.stats.paired import relative_percent
from analysis.verdict.controls import control_notes, control_warnings
from analysis.words import count, percent, percent_interval, share

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
    study = report.study
    verdict, criteria = study.verdict, study.criteria
    out.print()
    for reason in verdict.exploratory:
        _say(out, f"Exploratory: {reason}", "yellow")
        out.print()
    _say(out, headline(verdict, criteria), "bold")
    if verdict.primary is not None:
        sentences = f"{primary_sentence(verdict.primary, criteria)} {power_sentence(verdict.primary, criteria)}"
        out.print()
        _say(out, sentences)
    uncertain = [] if verdict.primary is None else control_notes(study.controls, verdict.primary)
    for warning in uncertain + control_warnings(study.controls, study.arms):
        out.print()
        _say(out, f"Warning: {warning}", "yellow")
    if study.arms:
        out.print(Padding(_table(report), (1, 0, 0, 0)))
    if any(comparison.conditional for comparison in study.arms):
        _say(out, "* of the pairs in which no run diverged; a diverged run counts as the worst outcome in p and wins.")
    if len(study.collected.broken):
        many = count(len(study.collected.broken), "problem")
        _say(out, f"{many} with run folders: see the section on coverage in the report.")
    out.print(Text(f"Report: {report.page}"), soft_wrap=True)


def _say(out: Console, text: str, style: str = "") -> None:
    """Print a paragraph; rich would break it between a number and its unit."""
    out.print(Text(textwrap.fill(text, out.width), style=style))


def _table(report: Report) -> Table:
    study = report.study
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("arm")
    table.add_column("loss")
    for title in ("expected", "perplexity", f"{share(study.criteria.confidence)} interval", "p", "wins"):
        table.add_column(title, justify="right", no_wrap=True)
    styles = {"primary": "bold", "control": "dim"}
    for comparison in study.arms:
        marked = "*" if comparison.conditional else ""
        summary, expected = comparison.summary, comparison.expected_percent
        interval = None if summary is None else summary.interval
        table.add_row(
            Text(comparison.arm[0], style=styles.get(comparison.role, "")),
            Text(comparison.group),
            "" if expected is None else percent(-expected),
            "–" if summary is None else percent(relative_percent(summary.mean)) + marked,
            "–" if interval is None else percent_interval(*(relative_percent(end) for end in interval)) + marked,
            p_cell(comparison.adjusted_p, comparison.floor, study.criteria.alpha).replace(OUT_OF_REACH, "–"),
            comparison.wins,
        )
    return table
