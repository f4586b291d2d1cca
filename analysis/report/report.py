"""`python -m analysis report`: a sweep's results as text, page, tables and figures, and a line of its history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure as Drawing

from analysis.design.history import History, one_at_a_time
from analysis.read.store import write_csv
from analysis.report.render.document import Block, Document, Figure, Paragraph, to_markdown
from analysis.report.render.latex import to_latex
from analysis.report.render.page import to_html
from analysis.report.render.style import figure_style, write_figure
from analysis.report.sections import audit, factors, found, harness, methods, training, verdict
from analysis.report.sections.tables import Draw
from analysis.report.sections.wording import conclusion, headline, label
from analysis.stats.paired import relative_percent
from analysis.stats.sign_flip import MAX_EXACT_PAIRS
from analysis.verdict.study import Study, study_sweep
from kv_align.runs.run_dir import write_atomically
from kv_align.runs.sweep_dir import SweepDirectory

FIGURES = "figures"
SECTIONS: tuple[Callable[[Study, Draw], list[Block]], ...] = (
    verdict.section,
    found.section,
    harness.section,
    training.section,
    factors.section,
    audit.section,
    methods.section,
)
"""The sections of a report in their order: a new one is a module under `sections/` and a line here."""


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
    path: Path,
    *,
    criteria_file: Path | None = None,
    baseline: str | None = None,
    verify: bool = False,
    now: datetime | None = None,
) -> Report:
    """Analyse a sweep, write everything below its `report/`, and append the conclusion to its history.

    Parameters
    ----------
    path
        The sweep's folder.
    criteria_file, baseline
        Instead of the plan's; the report calls itself exploratory then.
    verify
        Whether every file of a finished run is checked by its digest.
    now
        When the report is made; None: now.

    Raises
    ------
    ConfigError
        If the folder is no sweep, or the criteria or the baseline are not allowed.
    """
    with one_at_a_time(SweepDirectory(path)):
        study = study_sweep(path, criteria_file=criteria_file, baseline=baseline, verify=verify)
        return _written(study, SweepDirectory(path), now or datetime.now(UTC))


def _written(study: Study, sweep: SweepDirectory, moment: datetime) -> Report:
    sweep.report.mkdir(parents=True, exist_ok=True)
    for stale in (sweep.report / FIGURES).glob("*.[sp][vn]g"):
        stale.unlink()
    written = make_document(study, drawing_into(sweep.report / FIGURES), moment)
    markdown, page = sweep.report / "report.md", sweep.report / "report.html"
    write_atomically(markdown, to_markdown(written, FIGURES))
    write_atomically(page, to_html(written))
    table = results_table(study)
    table.to_csv(sweep.report / "results.csv", index=False)
    table.to_parquet(sweep.report / "results.parquet", index=False)
    write_atomically(sweep.report / "results.tex", _results_for_a_paper(study))
    write_csv(study.collected.data, study.collected.problems)
    # What the page shows the first lines of: every expected run with its state, and every problem.
    study.grid.cells.to_csv(sweep.report / "runs.csv", index=False)
    study.collected.problems.to_csv(sweep.report / "problems.csv", index=False)
    History(sweep).append(
        now=moment,
        look=study.looks,
        results=study.results,
        tested=study.tested,
        plan=study.collected.plan,
        criteria=study.criteria_hash,
        conclusion=conclusion(study),
    )
    return Report(study, markdown, page)


def drawing_into(folder: Path) -> Draw:
    """Return what draws figures in the report's style and writes them into a folder."""

    def draw(name: str, caption: str, make: Callable[[], Drawing]) -> Figure:
        with figure_style():
            return Figure(name, caption, write_figure(make(), name, folder))

    return draw


def make_document(study: Study, draw: Draw, now: datetime) -> Document:
    """Tell the results in the order of `SECTIONS`."""
    name = study.collected.plan.name if study.collected.plan is not None else study.collected.sweep.resolve().name
    coverage = study.verdict
    made = (
        f"{coverage.ended} of {coverage.expected} runs ended. Report of {now.astimezone(UTC):%Y-%m-%d %H:%M} UTC; "
        f"criteria {study.criteria_hash[:12]}, plan {study.plan_hash[:12] or 'none'}, look {study.looks.number}."
    )
    return Document(
        f"Results of {name}",
        (
            Paragraph(made, tone="note"),
            *(block for section in SECTIONS for block in section(study, draw)),
        ),
    )


def _results_for_a_paper(study: Study) -> str:
    """Return all arms against the baseline, and the declared tests of perplexity against others, in LaTeX."""
    caption = (
        f"Change of validation perplexity, paired by seed, {study.grid.baseline} being the baseline: mean, "
        f"{study.criteria.confidence:.0%} t interval, two-sided sign-flip p (exact up to {MAX_EXACT_PAIRS} pairs) without "
        "correction, pairs won. "
        f"{headline(study.verdict, study.criteria)}"
    )
    declared = [step.comparison for step in study.verdict.sequence[1:] if step.step.metric == "validation_loss"]
    return to_latex([*study.arms, *(each for each in declared if each is not None)], study.criteria.confidence, caption)


def results_table(study: Study) -> pd.DataFrame:
    """All comparisons as one tidy table, in the units of the metric (nats per token) and in percent of perplexity."""
    against = [comparison for control in study.controls for comparison in control.against.values()]
    rows: list[dict[str, Any]] = []
    for comparison in (*study.arms, *against, *study.contrasts):
        summary, interval = comparison.summary, comparison.summary.interval if comparison.summary is not None else None
        rows.append(
            {
                "role": comparison.role,
                "name": comparison.name,
                "loss": comparison.group,
                "arm": comparison.arm[0],
                "against": comparison.against[0],
                "expected_percent": None if comparison.expected_percent is None else -comparison.expected_percent,
                "difference_nats": None if summary is None else summary.mean,
                "low_nats": None if interval is None else interval.low,
                "high_nats": None if interval is None else interval.high,
                "difference_percent": None if summary is None else relative_percent(summary.mean),
                "sd_nats": None if summary is None else summary.sd,
                "dz": None if summary is None else summary.dz,
                "hedges_g": None if summary is None else summary.hedges_g,
                "p": comparison.p_value,
                "p_adjusted": comparison.adjusted_p,
                "adjustment": comparison.family or None,
                "p_floor": comparison.floor,
                "detectable_nats": comparison.detectable,
                "pairs": len(comparison.pairs.seeds),
                "planned_pairs": comparison.pairs.num_planned,
                "wins": comparison.wins,
                "conditional": comparison.conditional,
                "worst_case_nats": None if comparison.bounds is None else comparison.bounds.high,
                "best_case_nats": None if comparison.bounds is None else comparison.bounds.low,
                "verdict": label(comparison, study.criteria),
            }
        )
    return pd.DataFrame(rows)
