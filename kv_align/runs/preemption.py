"""Being asked to leave: by a scheduler, by a shutdown, or by hand. Imports no torch.

SIGTERM comes from a scheduler or a shutdown, SIGUSR2 from submitit before a time limit, SIGINT from Ctrl-C. None of them ends
a run in the middle of something: it is noted, and whatever takes long looks whether it was, as a progress bar does whenever
it advances.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_NOTED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_current: Preemption | None = None


class Preempted(Exception):  # noqa: N818 - no error: the run goes on another time
    """Raised between two pieces of work of a run that was asked to leave."""


class Preemption:
    """Notes the signals instead of dying of them, so that a run can leave between two steps, batches or stages.

    A second Ctrl-C is not waited with: it raises KeyboardInterrupt at once.

    Attributes
    ----------
    to_leave, name
        Whether a signal has come, and which.
    agree
        With several processes: whether one of them was asked to, the same answer in all; they call it together.
    """

    def __init__(self) -> None:
        self.to_leave, self.name = False, ""
        self.agree: Callable[[bool], bool] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        global _current
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _NOTED}
            _current = self
        return self

    def __exit__(self, *error: object) -> None:
        global _current
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _current = None

    def anyone(self) -> bool:
        """Whether this process was asked to leave, or another of the run; all of them call it together."""
        return self.to_leave if self.agree is None else self.agree(self.to_leave)

    def reason(self) -> str:
        """Say who asked."""
        return f"asked to leave by {self.name or 'another process'}"

    def leave_if_asked(self) -> None:
        """Raise `Preempted` if a signal has come; several processes call it together."""
        if self.anyone():
            raise Preempted(f"{self.reason()}; run it again to go on")

    def pass_on(self) -> None:
        """Hand a SIGUSR2 to its former handler: submitit puts the job of a plain Hydra sweep back in line."""
        before = self._before.get(signal.SIGUSR2)
        if self.name == "SIGUSR2" and callable(before):
            before(signal.SIGUSR2, None)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if self.name == "SIGINT":
                raise KeyboardInterrupt
            print(
                "kv-align: leaving as soon as what is under way is saved; Ctrl-C again to leave at once",
                file=sys.stderr,
            )
        self.to_leave, self.name = True, signal.Signals(number).name


def leave_if_asked(*, together: bool = False) -> None:
    """Raise `Preempted` if the run under way, if there is one, was asked to leave.

    Parameters
    ----------
    together
        Whether all processes of the run come here equally often. Where they do not, as where one fills a cache for all, a
        run of several processes goes on: one that left alone would leave the others waiting.
    """
    if _current is not None and (together or _current.agree is None):
        _current.leave_if_asked()
