"""A progress bar on standard error, silent where that is no terminal; whoever advances it can be asked to leave. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kv_align.runs.preemption import leave_if_asked


@contextmanager
def progress_bar(
    label: str, total: int, completed: int = 0, *, may_leave: bool = True
) -> Iterator[Callable[..., None]]:
    """Yield `advance(count, note="")`; the note stands at the end of the bar.

    Parameters
    ----------
    label, total, completed
        What is done, of how many pieces, of which so many were done before.
    may_leave
        Whether `advance` raises `Preempted` where the run was asked to leave; no for work that saves itself first.
    """
    console = Console(stderr=True)
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"  # one bar for all processes of a run
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        task = progress.add_task(label, total=total, completed=completed, note="")

        def advance(count: int, note: str | None = None) -> None:
            progress.update(task, advance=count)
            if note is not None:
                progress.update(task, note=note)
            if may_leave:
                leave_if_asked()

        yield advance
