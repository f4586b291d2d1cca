"""A full disk pauses a sweep: its runs come back until there is space, and nothing is called failed meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from launch.journal.journal import Journal

_PROBE_BYTES = 4_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT)


def finds_space(journal: Journal) -> bool:
    """Whether a sweep's disk takes some megabytes; pauses the sweep, or ends its pause."""
    try:
        with tempfile.TemporaryFile(dir=journal.sweep.path) as probe:
            probe.write(os.urandom(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        if error.errno not in _FULL:
            raise
        pause(journal)
        return False
    with contextlib.suppress(OSError):
        _marker(journal).unlink(missing_ok=True)
    return True


def tell(message: str) -> None:
    """Print a line of a job's or a supervisor's log; where the disk takes none of it, that is no reason to end."""
    with contextlib.suppress(OSError):
        print(message, flush=True)


def pause(journal: Journal) -> None:
    """Leave a sign that the disk was found full; an empty file has room where nothing else has."""
    with contextlib.suppress(OSError):
        _marker(journal).touch()


def pause_in_words(journal: Journal) -> str:
    """Return the line about a pause; empty where there is none."""
    if not _marker(journal).exists():
        return ""
    free = shutil.disk_usage(journal.sweep.path).free
    setting = journal.setting()
    again = "" if setting is None else f" within {setting.cluster.retry.pause_s:.0f} s"
    return (
        f"paused: the disk of {journal.sweep.path} was found full, or its quota used up ({free / 1e6:.0f} MB are free now); "
        f"free some space there, and its runs go on by themselves{again}"
    )


def _marker(journal: Journal) -> Path:
    return journal.folder / "paused"
