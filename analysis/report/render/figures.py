"""The figures of the report, from numbers to matplotlib figures. Nothing is computed here but where to draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import blended_transform_factory

from analysis.report.render.style import INK, new_figure
from analysis.stats.checks import FloatArray
from analysis.stats.curves import PointwiseBand
from analysis.stats.paired import Interval

FEW = 3
"""Curves that can all be named at their ends though they lie close together."""


@dataclass(frozen=True)
class ForestRow:
    """One arm in a forest plot; numbers in percent of perplexity, negative is better."""

    label: str
    colour: str
    estimate: float | None
    interval: Interval | None
    expected: float | None
    each_seed: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean of an arm over steps with its pointwise band; one that is `strong` lies above the others."""

    label: str
    colour: str
    steps: FloatArray
    band: PointwiseBand
    strong: bool = False


@dataclass(frozen=True)
class CurvePanel:
    """What is drawn for one loss: the arms' curves, and their paired differences to the baseline."""

    curves: list[Curve]
    differences: list[Curve]


def forest(panels: dict[str, list[ForestRow]], baseline: str) -> Figure:
    """Difference of every arm to the baseline, one panel per loss, with what was expected and every seed."""
    heights = [len(rows) + 1.2 for rows in panels.values()]
    figure, axes = new_figure(
        0.3 * sum(heights) + 0.6, rows=len(panels), sharex=True, gridspec_kw={"height_ratios": heights}
    )
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color=INK, linewidth=0.8)
        for place, row in enumerate(rows):
            axis.plot(
                row.each_seed, [place + 0.24] * len(row.each_seed), "|", color=row.colour, alpha=0.55, markersize=5
            )
            if row.expected is not None:
                axis.plot(row.expected, place, "D", color=INK, fillstyle="none", markersize=7, markeredgewidth=0.9)
            if row.interval is not None:
                axis.plot(row.interval, [place, place], color=row.colour, linewidth=2.2, solid_capstyle="butt")
            if row.estimate is not None:
                axis.plot(row.estimate, place, "o", color=row.colour, markersize=6)
        axis.set_yticks(range(len(rows)), [row.label for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_title(title)
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes[-1].set_xlabel(f"perplexity against {baseline} (%), left is better")
    return figure


def seed_lines(
    arms: Sequence[str], percent_SA: FloatArray, seeds: Sequence[int], colours: dict[str, str], baseline: str
) -> Figure:
    """Paired differences to the baseline: one line per seed through all arms; NaN where there is no pair."""
    figure, (axis,) = new_figure(3.1)
    places = np.arange(len(arms))
    axis.axhline(0, color=INK, linewidth=0.8)
    for values_A in percent_SA:
        axis.plot(places, values_A, color=INK, alpha=0.3, linewidth=0.9)
    for place, arm in enumerate(arms):
        values = percent_SA[:, place][np.isfinite(percent_SA[:, place])]
        axis.plot([place] * len(values), values, "o", color=colours[arm], markersize=4.5)
    axis.set_xticks(
        places,
        list(arms),
        rotation=30 if len(arms) > 4 else 0,
        ha="right" if len(arms) > 4 else "center",
    )
    axis.margins(x=0.06)
    ends = [
        (f"seed {seed}", INK, float(places[-1]), float(values_A[-1]))
        for seed, values_A in zip(seeds, percent_SA, strict=True)
    ]
    axis.set_ylabel(f"perplexity against\n{baseline} (%)")
    label_ends(axis, [end for end in ends if np.isfinite(end[3])])
    return figure


def curves(panels: dict[str, CurvePanel], *, ylabel: str, difference_label: str, log: bool = False) -> Figure:
    """Mean curves of every arm, and below them the paired differences to the baseline, by loss; pointwise bands."""
    figure, axes = new_figure(
        4.3 * len(panels), rows=2 * len(panels), sharex=True, gridspec_kw={"height_ratios": [1, 1.25] * len(panels)}
    )
    for place, (title, panel) in enumerate(panels.items()):
        above, below = axes[2 * place : 2 * place + 2]
        for axis, drawn in ((above, panel.curves), (below, panel.differences)):
            for curve in drawn:
                width, order = (2.4, 3.0) if curve.strong else (1.6, 2.0)
                axis.plot(curve.steps, curve.band.mean, color=curve.colour, linewidth=width, zorder=order)
                if curve.band.low is not None and curve.band.high is not None:
                    ends = (curve.band.low, curve.band.high)
                    axis.fill_between(curve.steps, *ends, color=curve.colour, alpha=0.16, linewidth=0)
            if not (log and axis is above):
                _frame(axis, drawn)
        if log:
            above.set_yscale("log")
            above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            above.yaxis.set_minor_formatter(NullFormatter())
        above.set_title(title)
        above.set_ylabel(ylabel)
        below.axhline(0, color=INK, linewidth=0.8)
        below.set_ylabel(difference_label)
        below.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ends_of = panel.differences or panel.curves
        below.set_xlim(min(curve.steps[0] for curve in panel.curves), max(curve.steps[-1] for curve in panel.curves))
        label_ends(below if panel.differences else above, [_end(curve) for curve in ends_of])
        # Above, the arms lie close: all are named where they are few, else the one that has no line below.
        below_too = {curve.label for curve in panel.differences}
        named = [curve for curve in panel.curves if len(panel.curves) <= FEW or curve.label not in below_too]
        if panel.differences:
            label_ends(above, [_end(curve) for curve in named])
    axes[-1].set_xlabel("optimizer step")
    return figure


def probe_against_cosine(rows: list[tuple[str, str, list[float], list[float]]]) -> Figure:
    """Own cosine and common probe side by side; rows are (arm, colour, cosine per seed, probe R² per seed)."""
    figure, (left, right) = new_figure(0.32 * len(rows) + 1.2, columns=2, sharey=True)
    for place, (_, colour, cosine, probe) in enumerate(rows):
        for axis, values in ((left, cosine), (right, probe)):
            if values:
                axis.plot(values, [place] * len(values), "|", color=colour, alpha=0.6, markersize=8)
                axis.plot(float(np.mean(values)), place, "o", color=colour, markersize=6)
            else:
                axis.text(
                    0.5,
                    place,
                    "aligns nothing",
                    transform=axis.get_yaxis_transform(),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                )
    left.set_yticks(range(len(rows)), [arm for arm, *_ in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("cosine, each through\nits own aligner")
    right.set_xlabel("probe R²,\nthe same in all arms")
    for axis in (left, right):
        axis.tick_params(axis="y", length=0)
        axis.xaxis.set_major_locator(MaxNLocator(3))
    return figure


def _end(curve: Curve) -> tuple[str, str, float, float]:
    """Where a curve ends, for its name."""
    return curve.label, curve.colour, float(curve.steps[-1]), float(curve.band.mean[-1])


def _frame(axis: Axes, drawn: list[Curve]) -> None:
    """Let the mean curves say how high the axis is: the band of two or three seeds may run far beyond it."""
    if drawn:
        means = np.concatenate([curve.band.mean for curve in drawn])
        margin = 0.6 * float(np.ptp(means)) or 1.0
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, float(means.min()) - margin), min(high, float(means.max()) + margin))


def label_ends(axis: Axes, ends: list[tuple[str, str, float, float]]) -> None:
    """Write names at the ends of lines, moved apart where they would overlap: (name, colour, x, y) each."""
    if not ends:
        return
    axis.figure.canvas.draw()  # limits and layout are known only then
    box = axis.get_window_extent()
    heights = np.array([(axis.transData.transform((x, y))[1] - box.y0) / box.height for _, _, x, y in ends])
    order = np.argsort(heights)
    gap = 10.5 * axis.figure.dpi / 72 / box.height
    placed = heights[order].copy()
    for place in range(1, len(placed)):
        placed[place] = max(placed[place], placed[place - 1] + gap)
    placed -= max(0.0, float(placed.mean() - heights.mean()))
    placed += max(0.0, -float(placed[0]))
    for place, height in zip(order, placed, strict=True):
        name, colour, x, _ = ends[place]
        axis.annotate(
            name,
            (x, height),
            (7, 0),
            xycoords=blended_transform_factory(axis.transData, axis.transAxes),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
