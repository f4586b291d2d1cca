"""A sign of life from a run whatever it is busy with: building, a step, an evaluation of minutes, a checkpoint."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

INTERVAL_S = 15.0


@contextlib.contextmanager
def heartbeat(status_file: Path, interval_s: float = INTERVAL_S) -> Iterator[None]:
    """Renew the time stamp of a status file until the body ends; `RunDirectory.observed` reads it."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(interval_s):
            with contextlib.suppress(OSError):  # not written yet, or the disk has a bad moment
                os.utime(status_file)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
