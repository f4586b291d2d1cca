"""The page in a real browser: nothing leaves it, nothing is wrong with it, everything is on it, at every width."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from analysis.report.report import write_report
from tests.analysis.report.browser import Browser, browser, missing
from tests.analysis.synthetic import Recipe, write_sweep

if missing() and os.environ.get("KV_ALIGN_REQUIRE_CHROMIUM") != "1":
    pytest.skip(f"{missing()} is not installed", allow_module_level=True)
FIGURES = {"differences", "seeds", "training", "validation", "alignment", "heads"}
RECIPE = Recipe(seeds=3, steps=60, examples=6)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "sweep"
    return write_report(write_sweep(path, replace(RECIPE)).path, now=datetime(2026, 1, 2, tzinfo=UTC)).page


@pytest.fixture(scope="module")
def session() -> Iterator[Browser]:
    assert not missing(), f"{missing()} is not installed, and KV_ALIGN_REQUIRE_CHROMIUM=1 asks for it: install it."
    with browser() as opened:
        yield opened


def test_no_request_leaves_the_page_and_nothing_is_wrong_with_it(page, session):
    session.open(page, width=1200)
    assert session.run("return document.title") == "Results of synthetic"
    messages = [json.loads(entry["message"])["message"] for entry in session.log("performance")]
    address = page.resolve().as_uri()
    sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    asked = {each["request"]["url"] for each in sent if each["documentURL"] == address}
    # What is written into the page itself is no request that leaves it.
    assert {url for url in asked if not url.startswith("data:")} == {address}
    assert session.log("browser") == []


def test_every_figure_is_drawn_and_says_what_it_is(page, session):
    session.open(page, width=1200)
    drawn = session.run(
        "return [...document.querySelectorAll('figure')].map(f => "
        "{ const s = f.querySelector('svg').getBoundingClientRect();"
        " return [f.id, s.width, s.height, f.querySelector('svg').getAttribute('aria-label'),"
        " f.querySelectorAll('text').length] })"
    )
    assert {each[0] for each in drawn} == {f"figure-{name}" for name in FIGURES}
    for name, width, height, label, texts in drawn:
        assert width > 300, name
        assert height > 120, name
        assert len(label) > 30, name
        assert texts > 4, name


@pytest.mark.parametrize("width", [390, 768, 1200])
def test_the_page_is_no_wider_than_the_screen(page, session, width):
    session.open(page, width=width)
    assert session.run("return document.documentElement.scrollWidth") <= width
    # What is wider than the screen scrolls within itself, and nothing else sticks out.
    assert (
        session.run(
            "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') &&"
            " e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"
        )
        == []
    )
    assert (
        session.run(
            "return Math.min(...[...document.querySelectorAll('p')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        >= 12
    )


def test_on_a_phone_the_verdict_and_p_are_there_without_scrolling(page, session):
    session.open(page, width=390, height=844)
    word, bottom, right = session.run(
        "const word = document.querySelector('.banner .word');"
        " const box = document.querySelector('.banner').getBoundingClientRect();"
        " return [word.textContent, box.bottom, box.right]"
    )
    assert word == "Inconclusive"  # three seeds cannot show anything
    assert bottom < 844
    assert right <= 390
    # Of the table of arms, what decides stands where it is seen: the rest scrolls within the table.
    columns = session.run(
        "const table = [...document.querySelectorAll('table')].find(t => t.textContent.includes('Hedges g'));"
        " return [...table.querySelectorAll('thead th')].map(c => [c.textContent, c.getBoundingClientRect().right])"
    )
    seen = [title for title, edge in columns if edge <= 390]
    assert seen[:4] == ["arm", "verdict", "found", "p"]


def test_levels_and_tests_are_told_apart_by_shape_colour_and_word(page, session):
    session.open(page, width=1200)
    marks = session.run(
        "return [...document.querySelectorAll('.mark')].map(m => [m.className, m.textContent, getComputedStyle(m).color,"
        " getComputedStyle(m.querySelector('b')).borderRadius])"
    )
    by_kind = {kind: (text, colour, radius) for kind, text, colour, radius in marks}
    assert {"mark held", "mark failed", "mark open"} <= set(by_kind)
    assert by_kind["mark held"][0] == "✓yes"
    assert by_kind["mark failed"][0].startswith("✗")
    assert len({colour for _, colour, _ in by_kind.values()}) == 3
    assert by_kind["mark held"][2] != by_kind["mark failed"][2]


def test_text_and_figures_turn_with_the_colour_scheme(page, session):
    ask = (
        "const text = document.querySelector('figure text'); return [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.body).color, getComputedStyle(text).fill]"
    )
    session.open(page, width=1200, scheme="light")
    light = session.run(ask)
    session.open(page, width=1200, scheme="dark")
    dark = session.run(ask)
    assert light == ["rgb(255, 255, 255)", "rgb(27, 31, 36)", "rgb(27, 31, 36)"]
    assert dark == ["rgb(18, 22, 27)", "rgb(228, 232, 236)", "rgb(228, 232, 236)"]


def test_the_page_can_be_printed(page, session, tmp_path):
    session.open(page, width=1200)
    session.pdf(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= content.count(b"/Type /Page\n") <= 20
