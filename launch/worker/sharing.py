"""Which runs share a GPU: as many as were asked for, and no more than the memory of those measured so far says will fit.

The first run on the GPUs of a machine is measured alone; while it trains, and after it, others join it. A run that is not
measured yet is expected to take what the largest has taken. One that ran out of memory beside others is put back, and has a
GPU to itself the next time. Pure functions of facts: no processes, no scheduler, no torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kv_align.runs.run_dir import Status

_CONTEXT_GB = 0.6
"""What a process has on a GPU beside its tensors: its context and the kernels of the libraries."""
_USED = 0.95
"""The share of a GPU's memory that runs are given: allocators leave gaps."""
_MEASURED_STEP = 2
"""From this step on a peak is that of training: the first step made the optimizer's state, and an evaluation came before."""


@dataclass
class Sharing:
    """What is known of the memory that runs take; see above.

    Parameters
    ----------
    most
        Runs that share a GPU at most; fewer when so many did not fit twice.
    """

    most: int
    _peaks_gb: dict[str, float] = field(default_factory=dict)
    _gpu_gb: float | None = None
    _looked: bool = False
    _misfits: int = 0

    def observe(self, name: str, status: Status | None, *, ended: bool = False) -> None:
        """Note what the status file of a run says of its memory, while it trains or when its process has ended."""
        if status is None or not (ended or (status.state == "running" and status.step >= _MEASURED_STEP)):
            return
        self._looked = True
        if status.peak_memory_gb is not None and status.gpu_memory_gb is not None:
            self._peaks_gb[name] = max(status.peak_memory_gb, self._peaks_gb.get(name, 0.0))
            self._gpu_gb = status.gpu_memory_gb

    def admits(self, name: str, running: Sequence[str], alone: Collection[str]) -> bool:
        """Whether a run may join those that are on a GPU now.

        Parameters
        ----------
        name
            The run that would start.
        running
            Those that are on the GPU.
        alone
            Runs that share with nobody.
        """
        if not running:
            return True
        if name in alone or set(running) & set(alone) or len(running) >= self.most:
            return False
        if self._gpu_gb is None:  # where no run says what it takes (it has no GPU), the number alone decides
            return self._looked
        largest = max(self._peaks_gb.values())
        expected = [self._peaks_gb.get(each, largest) + _CONTEXT_GB for each in (*running, name)]
        return sum(expected) <= _USED * self._gpu_gb

    def did_not_fit(self, at_once: int) -> None:
        """Note that one of so many runs on a GPU ran out of memory: once is an exception, twice are too many at once."""
        self._misfits += 1
        if self._misfits > 1:
            self.most = max(1, min(self.most, at_once - 1))


def is_put_back(attempts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run's last attempt ended without memory beside others, so that it has a GPU to itself now."""
    ends = [row for row in attempts if row["event"] == "end"]
    return any(row["cause"] == "out_of_memory" and bool(row.get("shared")) for row in ends[-1:])


def shared_out(cores: int, at_once: int, most_threads: int) -> dict[str, str]:
    """Return the variables that give each of several runs its share of the cores: threads, and processes that read data.

    Parameters
    ----------
    cores
        That all of them have.
    at_once
        Runs.
    most_threads
        That one run may have.
    """
    share = max(1, cores // at_once)
    return {"OMP_NUM_THREADS": str(min(most_threads, share)), "KV_ALIGN_DATA_WORKERS": str(share)}


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
