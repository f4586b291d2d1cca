"""Section of the report: how the arms trained, how well they aligned, and which examples they solve."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.design.cells import FINISHED
from analysis.design.training import Curves, curves
from analysis.report.render import figures
from analysis.report.render.document import Block, Heading, Paragraph, Table
from analysis.report.render.heat_maps import heat_maps
from analysis.report.sections.tables import Draw, arm_colours
from analysis.report.sections.wording import test_phrase
from analysis.stats.checks import FloatArray
from analysis.stats.curves import pointwise_band
from analysis.verdict.study import Study, arms_in, runs_of
from analysis.words import count, number, p_text, share

FEW_BANDS = 3
"""Bands that can be told apart when they lie over each other."""


def section(study: Study, draw: Draw) -> list[Block]:
    """3. Curves, early training, thresholds, alignment, agreement."""
    blocks: list[Block] = [Heading(2, "Training and alignment")]
    metrics = study.collected.training()
    evaluations = study.collected.table("evaluations", ["run", "step", "validation_perplexity"])
    until = study.grid.window[1] if study.grid.window is not None else float(study.criteria.training_window[1])
    blocks += _curves(study, draw, metrics, "task_loss", "training", "training loss\n(nats per token)", until)
    blocks += _curves(
        study, draw, evaluations, "validation_perplexity", "validation", "validation perplexity", float("inf"), log=True
    )
    blocks += _early_table(study)
    blocks += _alignment(study, draw)
    blocks += _agreement(study)
    return (
        blocks if len(blocks) > 1 else [*blocks, Paragraph("No run of this sweep logged anything that can be shown.")]
    )


def _curves(
    study: Study,
    draw: Draw,
    table: pd.DataFrame,
    column: str,
    name: str,
    ylabel: str,
    until: float,
    *,
    log: bool = False,
) -> list[Block]:
    palette, confidence = arm_colours(study), study.criteria.confidence
    banded = _banded(study)
    primary_arm = study.verdict.primary.arm[0] if study.verdict.primary is not None else ""
    panels = {}
    for group in study.grid.groups:
        drawn, differences = [], []
        base = study.grid.group_of(study.grid.baseline, group)
        for arm, own in arms_in(study.grid, group):
            drawable = curves(table, runs_of(study.grid, arm, own), column, until=until)
            if drawable is not None and len(drawable.steps) > 1:
                band = pointwise_band(drawable.values, confidence=confidence)
                drawn.append(figures.Curve(arm, palette[arm], drawable.steps, band, strong=arm == primary_arm))
            if base is not None and arm != study.grid.baseline:
                against = _differences(study, table, column, (arm, own), (study.grid.baseline, base), until, log)
                if against is not None:
                    band = pointwise_band(against.values, confidence=confidence)
                    # On an incomplete sweep a band of the differences would be the test that is not made yet.
                    shown = study.verdict.complete and (banded is None or arm == banded)
                    band = band if shown else replace(band, low=None, high=None)
                    differences.append(figures.Curve(arm, palette[arm], against.steps, band, strong=arm == primary_arm))
        if drawn:
            panels[f"loss {group}"] = figures.CurvePanel(drawn, differences)
    if not panels:
        return []
    what = "Training loss (cross-entropy)" if name == "training" else "Validation perplexity at equal steps"
    if not study.verdict.complete:
        only = ". The differences have none until the sweep is complete"
    elif banded is not None:
        only = f"; in the differences only {banded} has one, since so many would hide each other"
    else:
        only = ""
    caption = (
        f"{what}: mean over the finished seeds, and below it the difference to {study.grid.baseline} paired by "
        f"seed. The band is the {share(confidence)} t interval of each step by itself, not of the curve as a whole, "
        f"and may run beyond the frame{only}."
    )
    below = "difference (%)" if log else "difference\n(nats per token)"
    return [draw(name, caption, lambda: figures.curves(panels, ylabel=ylabel, difference_label=below, log=log))]


def _banded(study: Study) -> str | None:
    """The one arm whose differences are drawn with a band; None where there are few enough for all."""
    most = max((len(arms_in(study.grid, group)) - 1 for group in study.grid.groups), default=0)
    primary = study.verdict.primary
    return primary.arm[0] if primary is not None and most > FEW_BANDS else None


def _differences(
    study: Study,
    table: pd.DataFrame,
    column: str,
    arm: tuple[str, str],
    baseline: tuple[str, str],
    until: float,
    relative: bool,
) -> Curves | None:
    """Curves of the paired differences, one per audited seed; in percent where `relative`."""
    comparison = next(
        (candidate for candidate in study.arms if candidate.arm == arm and candidate.against == baseline), None
    )
    if comparison is None:
        return None
    runs = study.grid.run_of
    pairs = [
        (runs[*arm, seed], runs[*baseline, seed])
        for seed, finished in zip(comparison.pairs.seeds, comparison.pairs.finished, strict=True)
        if finished
    ]
    aligned = curves(table, [run for pair in pairs for run in pair], column, until=until)
    if aligned is None or len(aligned.steps) < 2:
        return None
    by_run = dict(zip(aligned.runs, aligned.values, strict=True))
    rows_T = [
        100 * (by_run[a] / by_run[b] - 1) if relative else by_run[a] - by_run[b]
        for a, b in pairs
        if a in by_run and b in by_run
    ]
    return Curves(aligned.runs, aligned.steps, np.stack(rows_T)) if rows_T else None


def _early_table(study: Study) -> list[Block]:
    if study.grid.window is None:
        return []
    first, last = study.grid.window
    rows = []
    for group in study.grid.groups:
        threshold, reached = study.threshold.get(group, (float("nan"), {}))
        for arm, own in arms_in(study.grid, group):
            cells = study.grid.cells
            areas = cells.loc[(cells["arm"] == arm) & (cells["group"] == own), "training_area"].dropna().astype(float)
            steps = reached.get(arm)
            difference = study.area.get((arm, group))
            summary = difference.summary if difference is not None else None
            rows.append(
                (
                    group,
                    arm,
                    "–" if areas.empty else number(float(areas.mean()), 4),
                    "–" if summary is None else number(summary.mean, 2, signed=True),
                    "–" if summary is None or difference is None else difference.wins,
                    number(threshold, 3),
                    "–" if steps is None else f"{steps.num_reached}/{steps.num_runs}",
                    "–" if steps is None else "not reached by most" if steps.median is None else f"{steps.median:g}",
                )
            )
    caption = (
        f"Training loss averaged over steps {first:g} to {last:g} (area under the curve over its length, nats per "
        f"token), and the steps until it had fallen by {share(study.criteria.threshold_share)} of "
        f"{study.grid.baseline}'s own fall: runs that did not get there are censored, not dropped (Kaplan-Meier "
        f"median)."
    )
    columns = ("loss", "arm", "area", "difference", "wins", "threshold", "reached", "median step")
    return [Table(columns, tuple(rows), caption, frozenset(columns[2:]))]


def _alignment(study: Study, draw: Draw) -> list[Block]:
    group = study.verdict.primary.group if study.verdict.primary is not None else study.grid.groups[0]
    palette, blocks = arm_colours(study), list[Block]()
    members = arms_in(study.grid, group)
    maps: dict[str, dict[str, FloatArray]] = {}
    for kind in ("key", "value"):
        for arm, own in members:
            mean_LH = _mean_by_head(study, arm, own, f"cosine_{kind}_by_head")
            if mean_LH is not None:
                maps.setdefault(f"{kind}s", {})[arm] = mean_LH
    rows = []
    for arm, own in members:
        cells = study.grid.cells
        chosen = (cells["arm"] == arm) & (cells["group"] == own) & (cells["state"] == FINISHED)
        cosine, probe = (cells.loc[chosen, name].dropna().astype(float).tolist() for name in ("cosine", "probe_r2"))
        if cosine or probe:
            rows.append((arm, palette[arm], cosine, probe))
    if rows:
        caption = (
            f"Alignment with loss {group}, mean of keys and values, one tick per seed. Each arm's cosine is seen "
            f"through its own aligner and cannot be compared across arms; the probe (ridge regression from raw "
            f"teacher to student states on held-out text) is the same for all."
        )
        blocks.append(draw("alignment", caption, lambda: figures.probe_against_cosine(rows)))
    if maps:
        caption = f"Cosine between student and projected teacher by layer and head, loss {group}, mean over seeds."
        blocks.append(draw("heads", caption, lambda: heat_maps(maps)))
    return blocks


def _mean_by_head(study: Study, arm: str, group: str, column: str) -> FloatArray | None:
    """(L, H) mean over the finished runs of an arm; None where none of them recorded it."""
    runs = study.collected.runs
    if column not in runs.columns:
        return None
    maps: list[FloatArray] = []
    for text in runs.loc[runs_of(study.grid, arm, group), column].dropna():
        try:
            values = np.array(json.loads(text), dtype=np.float64)
        except (ValueError, TypeError):
            continue
        if values.ndim == 2 and np.isfinite(values).all() and (not maps or maps[0].shape == values.shape):
            maps.append(values)
    return np.asarray(np.mean(maps, axis=0)) if maps else None


def _agreement(study: Study) -> list[Block]:
    primary, agreement, secondary = study.verdict.primary, study.agreement, study.secondary
    if primary is None or agreement is None:
        return []
    arm, against = primary.arm[0], primary.against[0]
    (both, only_arm), (only_other, neither) = agreement.table.astype(int).tolist()
    sentences = (
        f"{p_text(agreement.checkpoints.exact_p_value)} (McNemar, exact) speaks of {agreement.checkpoints.scope}."
    )
    if secondary is not None and secondary.summary is not None:
        seeds = count(len(secondary.pairs.seeds), "seed")
        sentences += f" For the method: {_points(secondary.summary.mean)} points of exact match over {seeds}, "
        sentences += (
            "not tested, because the primary comparison did not pass"
            if secondary.p_value is None
            else test_phrase(secondary, study.criteria)
        )
        if agreement.method is not None and agreement.method.interval is not None:
            low, high = (_points(end) for end in agreement.method.interval)
            sentences += f"; interval over seeds and examples {low} to {high} points"
        sentences += "."
    table = Table(
        ("", f"{against} solves", f"{against} does not"),
        ((f"{arm} solves", str(both), str(only_arm)), (f"{arm} does not", str(only_other), str(neither))),
        f"Answers to the same examples, {count(agreement.num_seeds, 'seed')} × "
        f"{count(agreement.num_examples, 'example')}.",
        frozenset({f"{against} solves", f"{against} does not"}),
    )
    return [Heading(3, "Exact match, example by example"), table, Paragraph(sentences)]


def _points(share: float) -> str:
    return number(100 * share, 2, signed=True)
