"""Cosine by layer and head as small maps, one for each arm, all on one colour scale."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.report.render.style import new_figure
from analysis.stats.checks import FloatArray

COLUMNS = 3
SMALL = 7.5
"""Size of the text on a map, in points."""
MOST_NUMBERS = (8, 4)
"""Layers and heads up to which the numbers themselves fit into the cells."""
LONGEST = 19
"""Letters of an arm's name that fit over a map."""


def heat_maps(panels: dict[str, dict[str, FloatArray]]) -> Figure:
    """Draw rows of maps for keys and for values; layers are rows, heads are columns of a map.

    Parameters
    ----------
    panels
        By kind (keys, values) and arm, the cosine by layer and head (L, H).
    """
    kinds = list(panels)
    arms = list(dict.fromkeys(arm for maps in panels.values() for arm in maps))
    columns = min(COLUMNS, max(1, len(arms)))
    lines = -(-len(arms) // columns)
    figure, axes = new_figure(1.45 * lines * len(kinds) + 0.4, rows=lines * len(kinds), columns=columns)
    values = np.concatenate([values_LH.ravel() for maps in panels.values() for values_LH in maps.values()])
    # Between the tenths around what was found: maps that all look the same show nothing.
    low, high = np.floor(10 * values.min()) / 10, np.ceil(10 * values.max()) / 10
    mesh = None
    for number, axis in enumerate(axes):
        line, column = divmod(number, columns)
        kind, place = kinds[line // lines], (line % lines) * columns + column
        values_LH = panels[kind].get(arms[place]) if place < len(arms) else None
        if values_LH is None:
            axis.set_visible(False)
            continue
        mesh = _map(axis, values_LH, float(low), float(max(high, low + 0.1)))
        name = arms[place] if len(arms[place]) <= LONGEST else f"{arms[place][: LONGEST - 1]}…"
        axis.set_title(f"{kind}, {name}", fontsize=SMALL, fontweight="normal")
        if column == 0:
            axis.set_ylabel("layer", fontsize=SMALL)
        if place + columns >= len(arms):
            axis.set_xlabel("head", fontsize=SMALL)
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.01)
        bar.locator = MaxNLocator(4)
        bar.update_ticks()
        bar.set_label("cosine", fontsize=SMALL)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL, length=2)
    return figure


def _map(axis: Axes, values_LH: FloatArray, low: float, high: float) -> QuadMesh:
    num_layers, num_heads = values_LH.shape
    mesh = axis.pcolormesh(values_LH, vmin=low, vmax=high, cmap="cividis", edgecolors="face", linewidth=0.1)
    axis.invert_yaxis()
    axis.set_xticks(np.arange(num_heads) + 0.5, _numbers(num_heads, 8))
    axis.set_yticks(np.arange(num_layers) + 0.5, _numbers(num_layers, 12))
    axis.tick_params(length=0, labelsize=SMALL)
    if num_layers <= MOST_NUMBERS[0] and num_heads <= MOST_NUMBERS[1]:
        for (layer, head), value in np.ndenumerate(values_LH):
            shade = "#000000" if value > (low + high) / 2 else "#ffffff"
            axis.text(
                head + 0.5, layer + 0.5, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=SMALL - 0.5
            )
    return mesh


def _numbers(many: int, most: int) -> list[str]:
    return [str(place) for place in range(many)] if many <= most else [""] * many
