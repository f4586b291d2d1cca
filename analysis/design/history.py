"""HISTORY.md: the conclusion of every report of a sweep, appended; and how often new results were looked at.

A look is a new set of ended runs. Rendering the same set again is no look, with whatever criteria. Only looks at which
the primary test was made spend the declared number of looks: a report on an incomplete sweep tests nothing, so nobody
can stop on its p value.

The lines are chained: each holds the digest of the one before it, and the report's folder that of the last one. So a line
that was changed or removed is noticed, and a plan that is no longer the one of an earlier line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from analysis.design.cells import DIVERGED, FINISHED
from analysis.words import count
from kv_align.runs.digests import digest_of_json
from kv_align.runs.run_dir import read_json, write_json
from kv_align.runs.sweep_dir import Plan, SweepDirectory

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


@contextmanager
def one_at_a_time(sweep: SweepDirectory) -> Iterator[None]:
    """Hold the lock of a planned sweep's reports: two at once would both follow the same line, and overwrite each other.

    Who comes second waits. Where the file system has no locks, and of a folder that was not planned, nothing is held.
    """
    with ExitStack() as held:
        with suppress(OSError):
            # A file that is there: of a command that is refused nothing is to be left. NFS wants it open for writing.
            fcntl.flock(held.enter_context(sweep.plan_file.open("r+b")), fcntl.LOCK_EX)
        yield


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


class History:
    """The history of a sweep as it is now, and what is wrong with it; read and appended to `one_at_a_time`.

    Parameters
    ----------
    sweep
        HISTORY.md need not exist.
    """

    def __init__(self, sweep: SweepDirectory) -> None:
        self._file = sweep.history_file
        # Beside the report, so that it does not go with the history.
        self._head_file = sweep.report / "history_head.json"
        text = self._file.read_text(encoding="utf-8", errors="replace") if self._file.is_file() else ""
        self._lines = [line for line in text.splitlines() if line.startswith("- ")]
        self._marks = [_mark(line) for line in self._lines]

    def looks(self, results: str, *, tested: bool) -> Looks:
        """Count the looks that are recorded, and this one.

        Parameters
        ----------
        results
            `results_digest` of this report.
        tested
            Whether this report makes the primary test.
        """
        seen: dict[str, bool] = {}
        for mark in self._marks:
            if isinstance(mark.get("results"), str):
                seen[mark["results"]] = seen.get(mark["results"], False) or bool(mark.get("tested"))
        is_new = results not in seen
        seen[results] = seen.get(results, False) or tested
        return Looks(list(seen).index(results) + 1, is_new, sum(seen.values()))

    def problems(self, plan: Plan | None) -> list[str]:
        """Say in sentences where lines were changed or removed, and where the plan is not that of an earlier line."""
        sentences = []
        digests = [_digest(line) for line in self._lines]
        broken = [
            place + 1
            for place, mark in enumerate(self._marks)
            if (mark.get("before", "") != (digests[place - 1] if place else ""))
            # Lines of version 0.1.0 were not chained; behind one that was they are no such lines.
            and ("before" in mark or any("before" in earlier for earlier in self._marks[:place]))
        ]
        if broken:
            sentences.append(
                f"{self._file.name} was changed: line {broken[0]} does not follow from the one before it, so looks may "
                "be missing."
            )
        head = read_json(self._head_file)
        if head is not None and head.get("head") not in digests:
            was = count(int(head.get("lines", 0)), "line")
            sentences.append(f"{self._file.name} held {was} when the last report was made, and its last one is gone.")
        return sentences + self._changed_plan(plan)

    def _changed_plan(self, plan: Plan | None) -> list[str]:
        planned = [mark["plan"] for mark in self._marks if isinstance(mark.get("plan"), dict)]
        if not planned:
            return []
        if plan is None:
            return ["The plan that earlier reports of this sweep were made with is gone."]
        now = _identity(plan)
        # An extension adds runs, and is named as one.
        keys = ("created", "criteria") if plan.extensions else ("created", "criteria", "runs")
        if any(before.get(key) != now[key] for before in planned for key in keys):
            return ["The plan is not the one that earlier reports of this sweep were made with: it was rewritten."]
        return []

    def append(
        self,
        *,
        now: datetime,
        look: Looks,
        results: str,
        tested: bool,
        plan: Plan | None,
        criteria: str,
        conclusion: str,
    ) -> None:
        """Append the conclusion of a report or a comparison; `criteria` is the hash of those it was judged by."""
        when = now.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
        what = f"look {look.number}" if look.is_new else f"look {look.number} again, the same runs"
        mark: dict[str, Any] = {"results": results, "tested": tested}
        if plan is not None:
            mark["plan"] = _identity(plan)
        mark["before"] = _digest(self._lines[-1]) if self._lines else ""
        planned = plan.plan_hash[:12] if plan is not None else "none"
        line = (
            f"- {when}, {what}; runs `{results[:12]}`, plan `{planned}`, criteria `{criteria[:12]}`: "
            f"{_one_line(conclusion)} <!-- look {json.dumps(mark)} -->"
        )
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n" if stream.tell() else f"{_TITLE}\n{line}\n")
        self._lines.append(line)
        self._marks.append(mark)
        self._head_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._head_file, {"lines": len(self._lines), "head": _digest(line)})


def _identity(plan: Plan) -> dict[str, Any]:
    return {"created": plan.created, "criteria": plan.criteria_hash, "runs": plan.plan_hash}


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode("utf-8", errors="replace")).hexdigest()


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("<!--", "< !--").strip()


def _mark(line: str) -> dict[str, Any]:
    """What a line holds for the next report; empty where it holds nothing that can be read."""
    marks = _MARK.findall(line)
    try:
        mark = json.loads(marks[-1]) if marks else None
    except ValueError:
        return {}
    return mark if isinstance(mark, dict) else {}
