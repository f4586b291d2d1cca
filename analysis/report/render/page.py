"""A report as one HTML page: everything in it, nothing asked of the network, light and dark, phone and print."""

from __future__ import annotations

from html import escape
from itertools import groupby

from analysis.report.render.document import MARKS, Banner, Block, Bullets, Document, Figure, Heading, Paragraph, Table

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --stripe: #f6f8fa;
  --good: #0b6b43; --good-page: #e9f7f0; --bad: #9a3412; --bad-page: #fdf1e9; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --ink: #e4e8ec; --soft: #9aa5b1; --line: #313a44;
  --stripe: #1a2027; --good: #6fd3a5; --good-page: #10281f; --bad: #f0a878; --bad-page: #2c1d13; }
  figure svg { filter: brightness(1.25); } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 0.8rem; padding-top: 0.8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 0.5rem; }
p, ul { max-width: 46rem; margin: 0.6rem 0; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: 0.9rem; }
.reached, .lead, .missed, .warning { border-left: 4px solid; padding: 0.7rem 1rem; border-radius: 3px; }
.lead { border-color: var(--soft); background: var(--stripe); }
.reached { border-color: var(--good); background: var(--good-page); }
.missed, .warning { border-color: var(--bad); background: var(--bad-page); }
.reached strong { color: var(--good); } .missed strong, .warning strong { color: var(--bad); }
.banner { margin: 0.8rem 0 1rem; max-width: 46rem; }
.banner .word { font-size: 2rem; line-height: 1.15; font-weight: 750; margin: 0 0 0.4rem; }
.banner p { margin: 0; }
.reached .word { color: var(--good); } .missed .word { color: var(--bad); }
.mark { white-space: nowrap; font-weight: 650; } .mark b { display: inline-block; width: 1.2em; height: 1.2em;
  line-height: 1.2em; text-align: center; border-radius: 50%; margin-right: 0.3em; color: var(--page); }
.mark.held { color: var(--good); } .mark.held b { background: var(--good); }
.mark.failed { color: var(--bad); } .mark.failed b { background: var(--bad); border-radius: 2px; }
.mark.open { color: var(--soft); } .mark.open b { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.9rem; margin: 0 0 1rem; } nav a { color: var(--soft); }
.scroll { overflow-x: auto; margin: 0.8rem 0 0; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.34rem 0.6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child td, tr:last-child th { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; background: var(--stripe); }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
.wide td:nth-child(2) { min-width: 7.5rem; }
tr.strong td, tr.strong th { font-weight: 700; background: var(--stripe); }
th:first-child { position: sticky; left: 0; background: var(--page); }
thead th:first-child, tr.strong th:first-child { background: var(--stripe); }
.caption, figcaption { color: var(--soft); font-size: 0.84rem; max-width: 46rem; margin: 0.35rem 0 1.2rem; }
figure { margin: 1.2rem 0 0.4rem; max-width: 36rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 2.2rem; }
figure svg { display: block; width: 100%; height: auto; }
@media (max-width: 40rem) {
  main { padding: 0.8rem 0.9rem 3rem; } h1 { font-size: 1.35rem; } h2 { font-size: 1.15rem; }
  table { font-size: 0.8rem; } th, td { padding: 0.3rem 0.4rem; } .wide td:nth-child(2) { min-width: 5.2rem; }
  tbody th { max-width: 7.2rem; overflow-wrap: break-word; } figure { margin: 1rem -0.4rem; }
}
@media print {
  :root { --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --stripe: #f2f2f2; --good: #064; --good-page: #fff;
    --bad: #730; --bad-page: #fff; }
  @page { size: A4; margin: 15mm 13mm; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } nav { display: none; }
  .scroll { overflow: visible; border: 0; }
  .wide td:nth-child(2) { min-width: 0; } table { font-size: 7.6pt; } .number { white-space: normal; }
  h2, h3 { break-after: avoid; } figure, tr, .reached, .lead, .missed, .warning { break-inside: avoid; }
  thead { display: table-header-group; } .figures { grid-template-columns: 1fr 1fr; gap: 0 6mm; }
  figure { max-width: 105mm; } figure svg { filter: none; }
  th:first-child { position: static; }
}
"""


def to_html(document: Document) -> str:
    """Render to one self-contained page; every text of the document is escaped."""
    sections = [block.text for block in document.blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{escape(text)}</a>' for text in sections)
    # Figures that follow each other stand side by side where there is room.
    groups = groupby(document.blocks, key=lambda block: isinstance(block, Figure))
    drawn = [('<div class="figures">{}</div>' if are else "{}", "\n".join(map(_block, group))) for are, group in groups]
    body = "\n".join(frame.format(inner) for frame, inner in drawn)
    title = escape(document.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing may be fetched, whatever a name in the report tries.
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n'
        f"<h1>{title}</h1>\n<nav>{links}</nav>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            anchor = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{anchor}>{escape(text)}</h{level}>"
        case Paragraph(text, strong, tone):
            opening = f"<strong>{escape(strong)}</strong> " if strong else ""
            kind = "" if tone == "plain" else f' class="{tone}"'
            return f"<p{kind}>{opening}{escape(text)}</p>"
        case Banner(word, text, tone):
            return f'<div class="banner {tone}"><p class="word">{escape(word)}</p><p>{escape(text)}</p></div>'
        case Bullets(items, tone):
            kind = "" if tone == "plain" else f' class="{tone}"'
            inner = "".join(f"<li>{escape(item)}</li>" for item in items)
            listed = f"<ul>{inner}</ul>"
            return f"<div{kind}>{listed}</div>" if kind else listed
        case Table():
            return _table(block)
        case Figure(name, caption, svg):
            label = escape(caption)
            drawn = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
            return f'<figure id="figure-{escape(name)}">{drawn}<figcaption>{label}</figcaption></figure>'


def _table(table: Table) -> str:
    kinds = [' class="number"' if title in table.numeric else "" for title in table.columns]
    head = "".join(
        f'<th scope="col"{kind}>{escape(title)}</th>' for title, kind in zip(table.columns, kinds, strict=True)
    )
    rows = []
    for place, (first, *others) in enumerate(table.rows):
        cells = "".join(
            f"<td{kind}>{_mark(cell) if title in table.marked else escape(cell)}</td>"
            for cell, title, kind in zip(others, table.columns[1:], kinds[1:], strict=True)
        )
        strong = ' class="strong"' if place in table.strong else ""
        rows.append(f'<tr{strong}><th scope="row">{escape(first)}</th>{cells}</tr>')
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    wide = " wide" if len(table.columns) > 8 else ""
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll{wide}" tabindex="0">{inner}</div>{caption}'


def _mark(cell: str) -> str:
    """A cell that is told apart by shape, colour and word."""
    if cell not in MARKS:
        return escape(cell)
    kind = {"✓": "held", "✗": "failed", "○": "open"}[MARKS[cell]]
    return f'<span class="mark {kind}"><b aria-hidden="true">{MARKS[cell]}</b>{escape(cell)}</span>'


def _anchor(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())
