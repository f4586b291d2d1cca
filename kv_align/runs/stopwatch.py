"""Where the time of a run goes that is no training step: its start, calibration, evaluations, probe, answers. No torch.

Measured on the clock of the wall, over all attempts, as `elapsed_s` is for the steps: of what an attempt did after its last
checkpoint nothing is known.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_taken = False


class Stopwatch:
    """Adds up the time of one attempt by what it was spent on, beside that of the attempts before it.

    Parameters
    ----------
    began
        When the attempt began, in seconds since the epoch; None: now.
    """

    def __init__(self, began: float | None = None) -> None:
        self._began = time.time() if began is None else began
        self._own: dict[str, float] = {}
        self._earlier: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time in this context for a part of the run."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._own[part] = self._own.get(part, 0.0) + time.perf_counter() - began

    def started(self) -> None:
        """Count all time until now that no other part has for the start."""
        self._own["start"] = max(0.0, time.time() - self._began - sum(self._own.values()))

    def go_on(self, earlier: Mapping[str, float]) -> None:
        """Begin with what the attempts before this one had spent."""
        self._earlier = dict(earlier)

    def parts(self) -> dict[str, float]:
        """Return seconds by part, over all attempts."""
        names = dict.fromkeys([*self._earlier, *self._own])
        return {name: self._earlier.get(name, 0.0) + self._own.get(name, 0.0) for name in names}


def process_began() -> float:
    """Return when this process began, in seconds since the epoch, to the first run that asks; to each after it: now."""
    global _taken
    if _taken:
        return time.time()
    _taken = True
    import psutil  # of a run alone: jobs import this module too

    began: float = psutil.Process().create_time()
    return began
