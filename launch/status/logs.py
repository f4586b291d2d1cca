"""What a run printed, and what its job printed where the run itself did not get to print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from kv_align.runs.sweep_dir import SweepDirectory
from launch.journal.journal import Journal
from launch.status.judgement import HelperState, RunState

_POLL_S = 0.5


def log_files(sweep: SweepDirectory, run: RunState | HelperState) -> list[Path]:
    """Return the log files of a run that exist: its own, else those of its job, else what Hydra wrote in its folder."""
    journal = Journal(sweep)
    own = journal.log_file(run.id)
    if own.exists():
        return [own]
    by_job = [
        file
        for folder in (sweep.path / "launch" / "jobs", sweep.path / ".submitit")
        for file in sorted(folder.rglob(f"{run.job}_*_log.*"))
        if run.job and file.stat().st_size
    ]
    return by_job or sorted((sweep.path / run.id).glob("*.log"))


def follow(
    files: Callable[[], list[Path]],
    out: TextIO,
    over: Callable[[], bool] | None,
    sleep: Callable[[float], None],
) -> None:
    """Copy log files to a stream; with `over`, go on with what is added to them until that is so."""
    read: dict[Path, int] = {}
    while True:
        last = over is None or over()
        for file in files():
            with file.open("rb") as stream:
                stream.seek(read.get(file, 0))
                out.write(stream.read().decode(errors="replace"))
                read[file] = stream.tell()
        out.flush()
        if last:
            return
        sleep(_POLL_S)
