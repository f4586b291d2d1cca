"""Texts of a document come out as they are, whatever is in them: in Markdown and on a page."""

import re

import pytest
from markdown_it import MarkdownIt

from analysis.report.render.document import Document, Heading, Paragraph, Table, escape, to_markdown
from analysis.report.render.page import to_html
from tests.analysis.synthetic import HOSTILE


def test_names_with_html_and_markdown_are_shown_as_they_are():
    document = Document(
        HOSTILE,
        (
            Heading(2, HOSTILE),
            Paragraph(HOSTILE, HOSTILE, "warning"),
            Table((HOSTILE, "b"), ((HOSTILE, HOSTILE),), HOSTILE, frozenset({"b"}), frozenset({0})),
        ),
    )
    page = to_html(document)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 7
    markdown = to_markdown(document, ".")
    assert "<script" not in markdown.replace("\\<", "")
    shown = MarkdownIt("commonmark").enable("table").render(markdown)
    assert "<script" not in shown
    assert "<a " not in shown
    assert "<em>x" not in shown
    assert shown.count("<td>") + shown.count("<td ") == 2
    assert "&amp;amp;" in shown


@pytest.mark.parametrize("text", ["v4_0_2", "a_b", "_a_", "# no", "1. no", "- no", "a|b", "a\nb", "1 < 2 ~ 3"])
def test_escaped_text_reads_back_as_itself(text):
    shown = MarkdownIt("commonmark").enable("strikethrough").render(escape(text))
    plain = re.sub(r"\s+", " ", text).replace("<", "&lt;")
    assert shown == f"<p>{plain}</p>\n"
