"""The status of a sweep as a table, once or live."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kv_align.runs.program import program
from launch.executors.base import SchedulerUnavailable
from launch.status.judgement import STUCK, WAITING, Overview, RunState, counts_in_words, needs

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "preempted": "yellow",
    "held": "yellow",
    "blocked": "red",
    "failed": "red",
    "diverged": "red",
    "lost": "red",
    "cancelled": "magenta",
}
_QUIET = ("done", "pending")
_FIRST = ("failed", "diverged", "lost", "blocked", "held", "cancelled", "missing", "preempted", "running", *_QUIET)
"""Where not all can be listed, the first of these are."""
_FIRST_LIVE = ("running", *(state for state in _FIRST if state != "running"))
_FULL_UP_TO = 60
_MOST_ROWS = 60
_LIVE_ROWS = 25


def show(now: Overview, full_up_to: int = _FULL_UP_TO, most: int = _MOST_ROWS) -> Group:
    """Return the table with all that there is to say.

    Parameters
    ----------
    now
        The sweep.
    full_up_to
        Of more runs than this, those with nothing to say are counted instead of listed.
    most
        Rows; of more, the runs that somebody must look at stay.
    """
    listed = _listed(now, full_up_to)
    left_out = max(0, len(listed) - most)
    if left_out:
        listed = sorted(listed, key=lambda run: _FIRST.index(run.state))[:most]
    lines = _lines(now)
    if left_out:
        lines.append(Text(f"and {left_out} more that are neither done nor pending"))
    return Group(*([_table(listed)] if listed else []), *lines)


def show_live(now: Overview, width: int, height: int) -> Group:
    """Return what fits a terminal: the counts, then the runs that run, then those that somebody must look at.

    Parameters
    ----------
    now
        The sweep.
    width, height
        Characters and lines of the terminal.
    """
    lines = _lines(now)
    rows = min(_LIVE_ROWS, max(1, height - len(lines) - 3))
    listed = sorted(_listed(now, rows), key=lambda run: _FIRST_LIVE.index(run.state))
    shown = [_table(listed[:rows], width)] if listed else []
    more = [Text(f"and {len(listed) - rows} more")] if len(listed) > rows else []
    return Group(*(Text(_cut(line.plain, width), style=line.style) for line in lines), *shown, *more)


def show_several(sweeps: Sequence[Overview]) -> Table:
    """Return one line for each of several sweeps."""
    table = Table(box=None, pad_edge=False)
    for name in ("sweep", "runs", "now"):
        table.add_column(name, justify="right" if name == "runs" else "left", overflow="fold")
    for now in sweeps:
        notes = "".join(f"; {note}" for note in now.notes)
        table.add_row(Text(Path(now.path).name), str(len(now.runs)), Text(counts_in_words(now.counts()) + notes))
    return table


def _listed(now: Overview, full_up_to: int) -> list[RunState]:
    return [run for run in now.runs if len(now.runs) <= full_up_to or run.state not in _QUIET]


def _table(runs: Sequence[RunState], width: int | None = None) -> Table:
    """Return a row for each run; with a width, of one line of so many characters."""
    names = _without_hashes([run.id for run in runs])
    rows = [
        (names[run.id], run.state, f"{run.step}/{run.total_steps}" if run.total_steps else "", _left(run), run.reason)
        for run in runs
    ]
    table = Table(box=None, pad_edge=False)
    for name, justify in (("run", "left"), ("state", "left"), ("step", "right"), ("left", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=name != "run")
    table.add_column("reason", overflow="fold")
    of_run = of_reason = None
    if width is not None:
        between = sum(max(4, *(len(row[column]) for row in rows)) + 2 for column in (1, 2, 3)) + 2
        of_run = min(max(len(row[0]) for row in rows), (width - between) * 3 // 5)
        of_reason = width - between - of_run
    for name, state, steps, left, reason in rows:
        styled = Text(state, style=_COLOURS.get(state, ""))
        table.add_row(Text(_cut(name, of_run), overflow="fold"), styled, steps, left, Text(_cut(reason, of_reason)))
    return table


def _without_hashes(names: Sequence[str]) -> dict[str, str]:
    """Return shorter names, by which the verbs find the runs too, where they are as many."""
    short = {name: re.sub(r"-[0-9a-f]{8}$", "", name) for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def _cut(text: str, length: int | None) -> str:
    return text if length is None or len(text) <= length else text[: max(0, length - 1)] + "…"


def _lines(now: Overview) -> list[Text]:
    """What is true of the sweep as a whole."""
    lines = [Text(f"{now.name}: {counts_in_words(now.counts())}", style="bold")]
    if not now.planned:
        lines.append(Text("a plain Hydra multirun: no frozen plan, so nothing says what is missing"))
    for helper in now.helpers:
        if helper.state != "done":
            reason = f": {helper.reason}" if helper.reason else ""
            lines.append(Text(f"{helper.id} job {helper.state}{reason}", style=_COLOURS.get(helper.state, "")))
    lines += _overhead(now) + [Text(note, style="yellow") for note in now.notes]
    again = [run.state for run in now.runs if needs(run, None)]
    if now.planned and set(again) - {"missing"}:
        path = Path(now.path)
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        lines.append(Text(f"to queue {len(again)} of them again: {program('launch')} resume {shown}"))
    return lines


def _overhead(now: Overview) -> list[Text]:
    """What of a run's time is no training step: its start, calibration, evaluations, probe, answers."""
    known = [run for run in now.runs if run.state == "done" and run.overhead_s]
    if not known:
        return []
    overhead_s = statistics.median(run.overhead_s for run in known)
    share = statistics.median(run.overhead_s / (run.overhead_s + run.training_s) for run in known)
    return [
        Text(f"overhead: {overhead_s:.0f} s of a run are no training steps, {share:.0%} of it (median of {len(known)})")
    ]


def watch(look: Callable[[], Overview], console: Console, interval_s: float) -> Overview:
    """Show the table until no run can move any more by itself; returns the last look.

    While the scheduler gives no answer the last table stays, with a line that says so.
    """
    now, unavailable = None, ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            try:
                now, unavailable = look(), ""
            except SchedulerUnavailable as error:
                unavailable = str(error)
            shown = [] if now is None else [show_live(now, console.width, console.height - bool(unavailable))]
            live.update(Group(*shown, *([Text(unavailable, style="yellow")] if unavailable else [])), refresh=True)
            if now is not None and not unavailable and not any(_goes_on(run) for run in now.runs):
                break
            time.sleep(interval_s)
    console.print(show(now))
    return now


def _goes_on(run: RunState) -> bool:
    return run.state in WAITING and run.state not in STUCK


def _left(run: RunState) -> str:
    if run.eta_s is None:
        return ""
    minutes, seconds = divmod(round(run.eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
