"""`python -m analysis report`: a sweep's results as text, page, tables and figures, and a line of its history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure as Drawing

from analysis.design import history
from analysis.report.document import Document, Figure, Paragraph, to_markdown
from analysis.report.page import to_html
from analysis.report.sections.audit import audit_section
from analysis.report.sections.factors import factors_section
from analysis.report.sections.found import found_section
from analysis.report.sections.methods import methods_section
from analysis.report.sections.training import training_section
from analysis.report.sections.verdict import verdict_section
from analysis.report.style import figure_style, write_figure
from analysis.report.wording import conclusion, label
from analysis.stats.paired import relative_percent
from analysis.verdict.study import Study, study
from kv_align.runs.run_dir import write_atomically
from kv_align.runs.sweep_dir import SweepDirectory

FIGURES = "figures"


@dataclass(frozen=True, eq=False)
class Report:
    """A report that was written.

    Attributes
    ----------
    study
        Its results.
    markdown, page
        The two files.
    """

    study: Study
    markdown: Path
    page: Path


def write_report(
    path: Path, *, criteria_file: Path | None = None, baseline: str | None = None, now: datetime | None = None
) -> Report:
    """Analyse a sweep, write everything below its `report/`, and append the conclusion to its history.

    Parameters
    ----------
    path
        The sweep's folder.
    criteria_file, baseline
        Instead of the plan's; the report calls itself exploratory then.
    now
        When the report is made; None: now.

    Raises
    ------
    ConfigError
        If the folder is no sweep, or the criteria or the baseline are not allowed.
    """
    found = study(path, criteria_file=criteria_file, baseline=baseline)
    sweep = SweepDirectory(path)
    sweep.report.mkdir(parents=True, exist_ok=True)
    moment = now or datetime.now(UTC)
    for stale in (sweep.report / FIGURES).glob("*.[sp][vn]g"):
        stale.unlink()
    written = make_document(found, sweep.report / FIGURES, moment)
    markdown, page = sweep.report / "report.md", sweep.report / "report.html"
    write_atomically(markdown, to_markdown(written, FIGURES))
    write_atomically(page, to_html(written))
    table = results_table(found)
    table.to_csv(sweep.report / "results.csv", index=False)
    table.to_parquet(sweep.report / "results.parquet", index=False)
    # What the page shows the first lines of: every expected run with its state, and every problem.
    found.sweep.cells.to_csv(sweep.report / "runs.csv", index=False)
    found.collected.problems.to_csv(sweep.report / "problems.csv", index=False)
    history.append(
        sweep.history_file,
        now=moment,
        look=found.looks,
        results=found.results,
        tested=found.tested,
        plan=found.plan_hash,
        criteria=found.criteria_hash,
        conclusion=conclusion(found),
    )
    return Report(found, markdown, page)


def make_document(found: Study, figure_folder: Path, now: datetime) -> Document:
    """Tell the results in the order of a report; figures are written as they are drawn."""

    def draw(name: str, caption: str, make: Callable[[], Drawing]) -> Figure:
        with figure_style():
            return Figure(name, caption, write_figure(make(), name, figure_folder))

    name = found.collected.plan.name if found.collected.plan is not None else found.collected.sweep.resolve().name
    verdict = found.verdict
    made = (
        f"{verdict.ended} of {verdict.expected} runs ended. Report of {now.astimezone(UTC):%Y-%m-%d %H:%M} UTC; "
        f"criteria {found.criteria_hash[:12]}, plan {found.plan_hash[:12] or 'none'}, look {found.looks.number}."
    )
    return Document(
        f"Results of {name}",
        (
            Paragraph(made, tone="note"),
            *verdict_section(found),
            *found_section(found, draw),
            *training_section(found, draw),
            *factors_section(found),
            *audit_section(found),
            *methods_section(found),
        ),
    )


def results_table(found: Study) -> pd.DataFrame:
    """All comparisons as one tidy table, in the units of the metric (nats per token) and in percent of perplexity."""
    against = [each for control in found.controls for each in control.against.values()]
    rows: list[dict[str, Any]] = []
    for each in (*found.arms, *against, *found.contrasts):
        summary, interval = each.summary, each.summary.interval if each.summary is not None else None
        rows.append(
            {
                "role": each.role,
                "name": each.name,
                "loss": each.group,
                "arm": each.arm[0],
                "against": each.against[0],
                "expected_percent": None if each.expected_percent is None else -each.expected_percent,
                "difference_nats": None if summary is None else summary.mean,
                "low_nats": None if interval is None else interval.low,
                "high_nats": None if interval is None else interval.high,
                "difference_percent": None if summary is None else relative_percent(summary.mean),
                "sd_nats": None if summary is None else summary.sd,
                "dz": None if summary is None else summary.dz,
                "hedges_g": None if summary is None else summary.hedges_g,
                "p": each.p_value,
                "p_adjusted": each.adjusted_p,
                "adjustment": each.family or None,
                "p_floor": each.floor,
                "detectable_nats": each.detectable,
                "pairs": len(each.pairs.seeds),
                "planned_pairs": each.pairs.num_planned,
                "wins": each.wins,
                "conditional": each.conditional,
                "worst_case_nats": None if each.bounds is None else each.bounds.high,
                "best_case_nats": None if each.bounds is None else each.bounds.low,
                "verdict": label(each, found.criteria),
            }
        )
    return pd.DataFrame(rows)
