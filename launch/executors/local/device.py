"""The GPUs of this machine, each of which only one of all sweeps of a user has at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from io import TextIOWrapper
from pathlib import Path


class Device:
    """A lock that is known to all supervisors of a user on this machine, and gone with who holds it.

    Parameters
    ----------
    gpu
        What CUDA_VISIBLE_DEVICES calls it; empty: none, which is always free.
    """

    def __init__(self, gpu: str) -> None:
        self._gpu = gpu
        self._held: TextIOWrapper | None = None

    def take(self) -> bool:
        """Whether it was free and is held now."""
        if not self._gpu:
            return True
        file = _folder() / f"gpu-{self._gpu.replace(os.sep, '_')}.lock"
        opened = file.open("a")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            opened.close()
            return False
        # A run that outlives its supervisor keeps its GPU: it inherits the lock.
        os.set_inheritable(opened.fileno(), True)
        self._held = opened
        return True

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the process of the run must inherit."""
        return () if self._held is None else (self._held.fileno(),)

    def release(self) -> None:
        """Let the next one have it."""
        if self._held is not None:
            self._held.close()
            self._held = None


class Devices:
    """Those that one sweep holds, by name."""

    def __init__(self) -> None:
        self._held: dict[str, Device] = {}

    def take(self, gpu: str) -> bool:
        """Whether the sweep has it now, for one run or for one more."""
        if gpu not in self._held:
            device = Device(gpu)
            if not device.take():
                return False
            self._held[gpu] = device
        return True

    def descriptors(self, gpu: str) -> tuple[int, ...]:
        """What the process of each run on it must inherit."""
        return self._held[gpu].descriptors

    def release(self, gpu: str) -> None:
        """Let another sweep have it, when the last run on it has ended."""
        device = self._held.pop(gpu, None)
        if device is not None:
            device.release()


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"kv-align-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
