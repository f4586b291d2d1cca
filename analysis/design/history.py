"""HISTORY.md: the conclusion of every report of a sweep, appended; and how often new results were looked at.

A look is a new set of ended runs. Rendering the same set again is no look, with whatever criteria. Only looks at which
the primary test was made spend the declared number of looks: a report on an incomplete sweep tests nothing, so nobody
can stop on its p value.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.design.cells import DIVERGED, FINISHED
from kv_align.runs.digests import digest_of_json

_MARK = re.compile(r"<!-- look (\{.*\}) -->")
_CELL = ("arm", "group", "seed")
_TITLE = "# What the reports on this sweep concluded\n\nOne line for each report; the newest is the last.\n"


@dataclass(frozen=True)
class Looks:
    """How often the results were looked at, this report included.

    Attributes
    ----------
    number
        Which look this report is: rendering again has the number of the first time.
    is_new
        Whether these ended runs are looked at for the first time.
    tests
        Looks at which the primary test was made, this report included.
    """

    number: int
    is_new: bool
    tests: int


def results_digest(cells: pd.DataFrame, runs: pd.DataFrame) -> str:
    """SHA-256 (hex) over which runs ended, how, and with which validation loss at the end, whatever the criteria ask for.

    Parameters
    ----------
    cells
        Of `analysis.design.cells.Grid`.
    runs
        Of `analysis.read.collect`.
    """
    ended = cells[cells["state"].isin([FINISHED, DIVERGED])]
    losses = runs["validation_loss"].to_dict() if "validation_loss" in runs.columns else {}
    rows = []
    for arm, group, seed, state, run in zip(*(ended[name] for name in (*_CELL, "state", "run")), strict=True):
        loss = losses.get(run)
        rows.append((arm, group, int(seed), state, None if loss is None or loss != loss else float(loss)))
    return digest_of_json(sorted(rows, key=lambda row: row[:3]))


def looks(file: Path, results: str, *, tested: bool) -> Looks:
    """Count the looks recorded in a history, and this one.

    Parameters
    ----------
    file
        HISTORY.md; it need not exist.
    results
        `results_digest` of this report.
    tested
        Whether this report makes the primary test.
    """
    seen: dict[str, bool] = {}
    for mark in _marks(file):
        seen[mark["results"]] = seen.get(mark["results"], False) or bool(mark.get("tested"))
    is_new = results not in seen
    seen[results] = seen.get(results, False) or tested
    return Looks(list(seen).index(results) + 1, is_new, sum(seen.values()))


def append(
    file: Path, *, now: datetime, look: Looks, results: str, tested: bool, plan: str, criteria: str, conclusion: str
) -> None:
    """Append one report's conclusion; `plan` and `criteria` are hashes, empty where there is no plan."""
    when = now.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    what = f"look {look.number}" if look.is_new else f"look {look.number} again, the same runs"
    mark = json.dumps({"results": results, "tested": tested})
    line = (
        f"- {when}, {what}; runs `{results[:12]}`, plan `{plan[:12] or 'none'}`, criteria `{criteria[:12]}`: "
        f"{_one_line(conclusion)} <!-- look {mark} -->\n"
    )
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line if stream.tell() else f"{_TITLE}\n{line}")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("<!--", "< !--").strip()


def _marks(file: Path) -> list[dict[str, Any]]:
    marks = []
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            found = _MARK.findall(line)
            try:
                mark = json.loads(found[-1]) if found else None
            except ValueError:
                continue
            if isinstance(mark, dict) and isinstance(mark.get("results"), str):
                marks.append(mark)
    return marks
