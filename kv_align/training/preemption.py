"""Being asked to leave: SIGTERM (a scheduler, a shutdown) and SIGUSR2 (submitit's warning before the time limit)."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Preempted(Exception):  # noqa: N818 - no error: the run goes on another time
    """Raised between two stages of a run that was asked to leave."""


class Preemption:
    """Notes SIGTERM and SIGUSR2 instead of dying of them, so that a run can leave between two steps or stages."""

    def __init__(self) -> None:
        self.to_leave, self.name = False, ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR2)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave_if_asked(self) -> None:
        """Raise `Preempted` if a signal has come."""
        if self.to_leave:
            raise Preempted(f"asked to leave by {self.name}; run it again to go on")

    def pass_on(self) -> None:
        """Hand a SIGUSR2 to its former handler: submitit puts the job of a plain Hydra sweep back in line."""
        before = self._before.get(signal.SIGUSR2)
        if self.name == "SIGUSR2" and callable(before):
            before(signal.SIGUSR2, None)

    def _note(self, number: int, frame: object) -> None:
        self.to_leave, self.name = True, signal.Signals(number).name
