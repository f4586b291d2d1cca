"""A run that has a slot of this machine, as its supervisor sees it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from launch.journal.processes import Identity, is_alive


@dataclass
class Worker:
    """A run in a slot, for the submission `uid`; `process` is None for one that an earlier supervisor started."""

    identity: Identity
    slot: int
    uid: str
    process: subprocess.Popen[bytes] | None
    asked_to_leave: float | None = None
    shared: bool = True
    """Whether another run was on its GPU at any time, as far as anybody knows."""

    def exit_code(self) -> int | None:
        """Return how it ended; None while it lives, and -1 where nobody saw."""
        if self.process is not None:
            return self.process.poll()
        return None if is_alive(self.identity) else -1
