"""A run that has a slot of this machine, as its supervisor sees it."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.setting import Setting
from launch.journal.processes import Identity, is_alive
from launch.worker.code import with_code_first

GONE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)
"""What is said where no process can be started since the interpreter or the code is gone; anything else may pass."""


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


def start_process(
    sweep: Path, uid: str, name: str, setting: Setting, variables: Mapping[str, str], descriptors: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    """Start the process that does a run; it outlives this one.

    Parameters
    ----------
    sweep, uid, name
        The run, and the submission that it is done for.
    setting
        How the sweep is executed.
    variables
        Of its environment.
    descriptors
        Files that it inherits.
    """
    offline = {"HF_HUB_OFFLINE": "1"} if setting.cluster.offline else {}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.worker", str(sweep), uid, name],
        cwd=setting.code,
        env=with_code_first(Path(setting.code)) | offline | dict(variables),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=descriptors,
    )
