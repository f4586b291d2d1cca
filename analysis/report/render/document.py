"""A report as data: headings, paragraphs, tables, figures. Rendered to Markdown here, to HTML in `render.page`.

Every text is plain: whatever is in a name (HTML, Markdown, a pipe) is escaped by the renderer, never interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["plain", "lead", "warning", "note", "reached", "missed"]


MARKS: dict[str, Literal["✓", "✗", "○"]] = {
    "yes": "✓",
    "shown": "✓",
    "no": "✗",
    "not shown": "✗",
    "not judged": "○",
    "not tested": "○",
    "not in this sweep": "○",
}
"""Cells of a marked column and the sign that goes before each."""


@dataclass(frozen=True)
class Heading:
    """A heading; `level` is 1 for the title, 2 for a section, 3 below."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; its first sentence may stand out as `strong`."""

    text: str
    strong: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Banner:
    """The verdict: a word that is read first, and what is to be known of it."""

    word: str
    text: str
    tone: Tone = "lead"


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]
    tone: Tone = "plain"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    columns
        Titles.
    rows
        As many cells each.
    caption
        What it shows, and how to read it.
    numeric
        Titles of the columns that are aligned to the right.
    strong
        Places of rows that stand out.
    marked
        Titles of the columns whose cells are told apart by shape and colour: see `MARKS`.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    numeric: frozenset[str] = frozenset()
    strong: frozenset[int] = frozenset()
    marked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes
    ----------
    name
        File name without suffix.
    caption
        What it shows.
    svg
        The figure itself, for a page; it takes the page's text colour.
    """

    name: str
    caption: str
    svg: str


Block = Heading | Banner | Paragraph | Bullets | Table | Figure


@dataclass(frozen=True)
class Document:
    """A title and blocks."""

    title: str
    blocks: tuple[Block, ...]


def to_markdown(document: Document, figures: str) -> str:
    """Render to Markdown.

    Parameters
    ----------
    document
        The report.
    figures
        Folder of the figures' PNG files, relative to the Markdown file.
    """
    parts = [_block(block, figures) for block in (Heading(1, document.title), *document.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Make Markdown show a text as it is; one line."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([\\`*\[\]<>|~&$])", r"\\\1", text)
    # An underscore inside a word is no emphasis, and names are full of them.
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return re.sub(r"^(\d*)([#+.)-])(?=\s|$)", r"\1\\\2", text)


def _block(block: Block, figures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escape(text)}"
        case Paragraph(text, strong, tone):
            text_and_strong = " ".join(
                part for part in (f"**{escape(strong)}**" if strong else "", escape(text)) if part
            )
            return f"> {text_and_strong}" if tone in ("warning", "reached", "lead", "missed") else text_and_strong
        case Banner(word, text, _):
            return f"> **{escape(word)}**\n>\n> {escape(text)}"
        case Bullets(items, _):
            return "\n".join(f"- {escape(item)}" for item in items)
        case Table():
            return _table(block)
        case Figure(name, caption, _):
            return f"![{escape(caption)}]({figures}/{name}.png)\n\n*{escape(caption)}*"


def _signed(table: Table, row: tuple[str, ...]) -> list[str]:
    """The cells of a row, those of marked columns with their sign."""
    return [
        f"{MARKS[cell]} {cell}" if title in table.marked and cell in MARKS else cell
        for title, cell in zip(table.columns, row, strict=True)
    ]


def _table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    marks = ["---:" if title in table.numeric else "---" for title in table.columns]
    rows = [
        line(
            [f"**{escape(cell)}**" if place in table.strong and cell else escape(cell) for cell in _signed(table, row)]
        )
        for place, row in enumerate(table.rows)
    ]
    lines = [line([escape(title) for title in table.columns]), line(marks), *rows]
    return "\n".join(lines) + (f"\n\n*{escape(table.caption)}*" if table.caption else "")
