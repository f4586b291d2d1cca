"""How figures look, and how one figure becomes an SVG for pages and files and a PNG.

Colours are Okabe and Ito's (2008), told apart by colour-blind readers. Ink (text, axes, the baseline) takes the colour
of the text around it, so that a figure is right on a light and on a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the text's colour on a page; in a PNG it is what it says, nearly black."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#7f7f7f")
WIDTH_IN = 4.6

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "kv-align",
    "path.simplify": True,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Everything drawn inside the block looks like a figure of the report."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def new_figure(height_in: float, rows: int = 1, columns: int = 1, **layout: Any) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of the report's width and its axes, row by row."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **layout)
    return figure, [axis for row in axes for axis in row]


def colours(names: list[str], baseline: str) -> dict[str, str]:
    """Give every arm its colour; the baseline is drawn in ink."""
    others = [name for name in names if name != baseline]
    return {baseline: INK} | {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(others)}


def write_figure(figure: Figure, name: str, folder: Path) -> str:
    """Write NAME.svg and NAME.png, and return the SVG for a page.

    Returns
    -------
    str
        One `<svg>` element whose ink is `currentColor`, whose ids start with the name, and that holds no reference to
        anything outside of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    svg = _svg(figure, name)
    (folder / f"{name}.svg").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{svg}\n', encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white", metadata={"Software": None})
    return svg


def _svg(figure: Figure, name: str) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{name}-\1"', text)
    text = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[\d.]+pt"([^>]*?)width="[\d.]+pt"', r"<svg \1\2", text, count=1)
    text = text.replace("DejaVu Sans", "system-ui, sans-serif").replace(
        "'system-ui, sans-serif'", "system-ui, sans-serif"
    )
    return re.sub(r"\s*\n\s*", "\n", text).strip()
