"""`python -m analysis compare A B`: two runs, or two arms, in one Markdown file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.compare.looks import caveat, criteria_of, planned_sweeps, record_looks
from analysis.compare.sections import audit, configuration, mean_of, quality
from analysis.compare.sides import Side, read_side
from analysis.design.cells import COLUMNS, FINISHED, cell_of
from analysis.design.criteria import Criteria, default_criteria_file, load_criteria
from analysis.design.pairing import PairedGrid
from analysis.design.training import areas, curves
from analysis.report.render.document import Block, Document, Figure, Heading, Paragraph, Table, to_markdown
from analysis.report.render.figures import Curve, CurvePanel
from analysis.report.render.figures import curves as draw_curves
from analysis.report.render.style import INK, PALETTE, figure_style, write_figure
from analysis.report.sections.wording import test_phrase
from analysis.stats.curves import pointwise_band
from analysis.stats.paired import relative_percent
from analysis.verdict.comparison import ArmComparison, estimate
from analysis.verdict.testing import decide_alone
from analysis.words import count, number, percent, percent_interval, share
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import write_atomically

EARLY_STEPS = 500
"""Loss curves are shown over the first steps up to here."""
ROWS = 12
"""Steps in a table; the figure shows all."""


def write_comparison(a: str, b: str, output: Path) -> Path:
    """Compare two sides and write the result.

    Parameters
    ----------
    a, b
        Run folders, SWEEP:ARM or SWEEP:ARM:LOSS; differences are `a` minus `b`.
    output
        The Markdown file; its figure is written beside it under the same name.

    Returns
    -------
    The Markdown file.

    Raises
    ------
    ConfigError
        If a side is neither a run nor an arm, both are the same, or the output's folder does not exist.
    """
    if Path(a).resolve() == Path(b).resolve():
        raise ConfigError(f"A and B are both {a}: name two different runs or arms.")
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output} is not allowed: there is no folder {output.parent}; create it.")
    criteria, _ = load_criteria(default_criteria_file())
    sides = (read_side("A", a, criteria), read_side("B", b, criteria))
    criteria = criteria_of(sides, criteria)
    comparison = _compare(sides, criteria, complete=all(sweep.complete for sweep in planned_sweeps(sides)))
    result = _result(sides, comparison, criteria)
    looks = record_looks(sides, comparison, result)
    blocks: list[Block] = [
        Paragraph(result, "Result."),
        caveat(sides, comparison, criteria, looks),
        *_curves(sides, comparison, criteria, output),
        *_validation(sides),
        *quality(sides),
        *configuration(sides),
        *audit(sides, comparison),
    ]
    document = Document(f"{sides[0].name} against {sides[1].name}", tuple(blocks))
    write_atomically(output, to_markdown(document, "."))
    return output


def _compare(sides: tuple[Side, Side], criteria: Criteria, *, complete: bool) -> ArmComparison:
    metrics = pd.concat([side.metrics for side in sides])
    finished = (record for side in sides for record in side.records if cell_of(record)["state"] == FINISHED)
    runs = [record["run"] for record in finished]
    area_of = areas(metrics, runs, criteria.training_window).by_run
    cells = [
        {
            "arm": letter,
            "group": "",
            "control": False,
            "seed": int(record["seed"]),
            **cell_of({**record, "training_area": area_of.get(record["run"])}),
        }
        for letter, side in zip("AB", sides, strict=True)
        for record in side.records
        if record.get("seed") is not None and record["seed"] == record["seed"]
    ]
    paired = PairedGrid(pd.DataFrame(cells, columns=list(COLUMNS)), complete=complete)
    comparison = estimate(paired, "contrast", "A − B", ("A", ""), ("B", ""), "", criteria)
    return decide_alone(comparison, criteria) if complete else comparison


def _result(sides: tuple[Side, Side], comparison: ArmComparison, criteria: Criteria) -> str:
    a, b = sides
    summary = comparison.summary
    if summary is None:
        return _unpaired(sides)
    change = relative_percent(summary.mean)
    sentence = (
        f"A ({a.name}) has {percent(abs(change), signed=False)} {'lower' if change < 0 else 'higher'} "
        f"validation perplexity than B ({b.name}), paired over {count(summary.num_pairs, 'seed')}"
    )
    if summary.interval is not None:
        low, high = (relative_percent(end) for end in summary.interval)
        interval = f"{share(criteria.confidence)} interval {percent_interval(low, high)}"
        sentence += f" ({interval}; {test_phrase(comparison, criteria)})"
    elif summary.sd is not None:
        sentence += f" (spread between seeds {percent(relative_percent(summary.sd), signed=False)})"
    return f"{sentence}."


def _unpaired(sides: tuple[Side, Side]) -> str:
    values = [mean_of(side, "validation_loss") for side in sides]
    if values[0] is None or values[1] is None:
        return "There is no validation loss at the end of both, so their ends cannot be compared."
    change = relative_percent(values[0] - values[1])
    return (
        f"A ({sides[0].name}) ended {percent(abs(change), signed=False)} {'lower' if change < 0 else 'higher'} in "
        f"validation perplexity than B ({sides[1].name}); the two are not paired (see the audit below), so the "
        f"difference holds their seeds' difference too."
    )


def _curves(sides: tuple[Side, Side], comparison: ArmComparison, criteria: Criteria, output: Path) -> list[Block]:
    drawn, tables = [], []
    for letter, side, colour in zip("AB", sides, (PALETTE[1], INK), strict=True):
        drawable = curves(side.metrics, _runs(side), "task_loss", until=EARLY_STEPS)
        if drawable is None or len(drawable.steps) < 2:
            return [Heading(2, "Training loss"), Paragraph(f"{letter} logged no training loss that can be drawn.")]
        drawn.append(
            Curve(letter, colour, drawable.steps, pointwise_band(drawable.values, confidence=criteria.confidence))
        )
        tables.append(drawable)
    common = np.intersect1d(tables[0].steps, tables[1].steps)
    if len(common) < 2:
        return [
            Heading(2, "Training loss"),
            Paragraph("A and B logged at different steps, so no step can be compared."),
        ]
    mean_a, mean_b = (table.values[:, np.isin(table.steps, common)].mean(axis=0) for table in tables)
    difference = Curve("A − B", PALETTE[1], common, pointwise_band((mean_a - mean_b)[None, :]))
    last = common[-1]
    with figure_style():
        figure = draw_curves(
            {f"first {last:g} steps": CurvePanel(drawn, [difference])},
            ylabel="training loss\n(nats per token)",
            difference_label="difference\n(nats per token)",
        )
        caption = (
            f"Training loss (cross-entropy) over the first {last:g} steps: A and B (ink) above, their difference below."
        )
        block = Figure(output.stem, caption, write_figure(figure, output.stem, output.parent))
    shown = common[np.unique(np.linspace(0, len(common) - 1, ROWS).round().astype(int))]
    rows = tuple(
        (
            f"{step:g}",
            number(float(mean_a[common == step][0]), 4),
            number(float(mean_b[common == step][0]), 4),
            number(float((mean_a - mean_b)[common == step][0]), 3, signed=True),
        )
        for step in shown
    )
    early = float(np.trapezoid(mean_a - mean_b, common) / (common[-1] - common[0]))
    text = (
        f"Averaged over these steps A is {number(abs(early), 3)} nats per token {'below' if early < 0 else 'above'} B."
    )
    columns = ("step", "A", "B", "A − B")
    return [
        Heading(2, "Training loss"),
        block,
        Table(columns, rows, "Training loss, nats per token, mean over runs.", frozenset(columns)),
        Paragraph(text),
    ]


def _validation(sides: tuple[Side, Side]) -> list[Block]:
    by_side = [curves(side.evaluations, _runs(side), "validation_loss") for side in sides]
    a, b = by_side
    if a is None or b is None or len(np.intersect1d(a.steps, b.steps)) == 0:
        return [Heading(2, "Validation at equal steps"), Paragraph("There is no step at which both were evaluated.")]
    common = np.intersect1d(a.steps, b.steps)
    losses = [table.values[:, np.isin(table.steps, common)].mean(axis=0) for table in (a, b)]
    rows = tuple(
        (f"{step:g}", number(float(np.exp(x)), 4), number(float(np.exp(y)), 4), percent(relative_percent(float(x - y))))
        for step, x, y in zip(common, *losses, strict=True)
    )
    columns = ("step", "A", "B", "A against B")
    return [
        Heading(2, "Validation at equal steps"),
        Table(columns, rows, "Validation perplexity (geometric mean over runs).", frozenset(columns)),
    ]


def _runs(side: Side) -> list[str]:
    """Its finished runs; a single run whatever became of it."""
    if len(side.records) == 1:
        return [side.records[0]["run"]]
    return [record["run"] for record in side.records if record["state"] == FINISHED]
