"""Being asked to leave: SIGTERM (a scheduler, a shutdown) and SIGUSR2 (submitit's warning before the time limit)."""

from __future__ import annotations

import signal
import threading
from typing import Any


class LeaveRequest:
    """Notes SIGTERM and SIGUSR2 instead of dying of them, so that the loop can leave after its step."""

    def __init__(self) -> None:
        self.to_leave, self.name = False, ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> LeaveRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR2)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.to_leave, self.name = True, signal.Signals(number).name
