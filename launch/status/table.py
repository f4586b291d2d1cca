"""The status of a sweep as a table, once or live."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.executors.base import SchedulerUnavailable
from launch.status.judgement import WAITING, Overview, RunState, counts_in_words

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "preempted": "yellow",
    "held": "yellow",
    "failed": "red",
    "diverged": "red",
    "lost": "red",
    "cancelled": "magenta",
}
_QUIET = ("done", "pending")
_FIRST = ("failed", "diverged", "lost", "held", "cancelled", "missing", "preempted", "running", *_QUIET)
"""Where not all can be listed, the first of these are."""
_FULL_UP_TO = 60
_MOST_ROWS = 200
_LIVE_ROWS = 25


def show(now: Overview, full_up_to: int = _FULL_UP_TO, most: int = _MOST_ROWS) -> Group:
    """Return the table.

    Parameters
    ----------
    now
        The sweep.
    full_up_to
        Of more runs than this, those with nothing to say are counted instead of listed.
    most
        Rows; of more, the runs that somebody must look at stay.
    """
    listed = list(now.runs)
    if len(listed) > full_up_to:
        listed = [run for run in listed if run.state not in _QUIET]
    left_out = max(0, len(listed) - most)
    if left_out:
        listed = sorted(listed, key=lambda run: _FIRST.index(run.state))[:most]
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "left"):
        table.add_column(name, justify="right" if name in ("step", "left") else "left", no_wrap=name != "run")
    table.add_column("reason", overflow="fold")
    for run in listed:
        steps = f"{run.step}/{run.total_steps}" if run.total_steps else ""
        state = Text(run.state, style=_COLOURS.get(run.state, ""))
        table.add_row(Text(run.id, overflow="fold"), state, steps, _left(run), Text(run.reason))
    lines = [Text(f"{now.name}: {counts_in_words(now.counts())}", style="bold")]
    if not now.planned:
        lines.append(Text("a plain Hydra multirun: no frozen plan, so nothing says what is missing"))
    if left_out:
        lines.append(Text(f"and {left_out} more that are neither done nor pending"))
    return Group(*([table] if listed else []), *lines)


def watch(look: Callable[[], Overview], console: Console, interval_s: float) -> Overview:
    """Show the table until no run is waiting or running any more; returns the last look.

    While the scheduler gives no answer the last table stays, with a line that says so.
    """
    now, silence = None, ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            try:
                now, silence = look(), ""
            except SchedulerUnavailable as error:
                silence = str(error)
            rows = min(_LIVE_ROWS, max(5, console.height - 4))
            shown = [] if now is None else [show(now, rows, rows)]
            live.update(Group(*shown, *([Text(silence, style="yellow")] if silence else [])), refresh=True)
            if now is not None and not silence and not any(_goes_on(run) for run in now.runs):
                break
            time.sleep(interval_s)
    console.print(show(now))
    return now


def _goes_on(run: RunState) -> bool:
    return run.state in WAITING and run.state != "held"


def _left(run: RunState) -> str:
    if run.eta_s is None:
        return ""
    minutes, seconds = divmod(round(run.eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
