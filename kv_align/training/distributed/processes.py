"""The processes of one run: each does its rows of every micro-batch, and all agree on every number and decision.

A row is padded as it would be in one process, losses are divided by the tokens of all, and the mean over processes that
data parallelism takes is undone: what comes out is what one process makes of the whole batch, up to rounding, and but for
dropout, of which each draws masks of its own. All but the first throw away what they write, except their part of a
checkpoint. What each of them holds is in `ddp` and `fsdp`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import Tensor

from kv_align.config.config import TrainerConfig
from kv_align.data.batch import Batch
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory


def is_first() -> bool:
    """Whether this process is the one that writes; known before the processes have met."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def own_directory(run: RunDirectory) -> Iterator[RunDirectory]:
    """Give the run's directory to the first process, and a throw-away one to the others."""
    if is_first():
        yield run
        return
    with TemporaryDirectory(prefix="kv-align-") as folder:
        yield RunDirectory(Path(folder))


class Processes:
    """This process among those of its run.

    Parameters
    ----------
    accelerator
        Knows them.
    trainer
        The run's batches.

    Raises
    ------
    ConfigError
        If a micro-batch cannot be shared out evenly.
    """

    def __init__(self, accelerator: Accelerator, trainer: TrainerConfig) -> None:
        self._accelerator = accelerator
        self.number, self._rank = accelerator.num_processes, accelerator.process_index
        micro = trainer.micro_batch_size or trainer.batch_size
        if micro % self.number:
            key = "micro_batch_size" if trainer.micro_batch_size else "batch_size"
            raise ConfigError(
                f"trainer.{key}={micro} is not allowed with {self.number} processes: set trainer.{key} to a multiple of "
                "their number."
            )

    def rows(self, batch: Batch) -> Batch:
        """Return this process's share of a micro-batch that all of them hold."""
        if self.number == 1:
            return batch
        size = len(batch.indices) // self.number
        return batch.rows(slice(self._rank * size, (self._rank + 1) * size))

    def own(self, purpose: str) -> str:
        """Return what a seed is for where each process draws for its own rows; the first draws as a run of one process."""
        return f"{purpose} of process {self._rank}" if self._rank else purpose

    def sum(self, values: Tensor) -> Tensor:
        """Add up the values of all processes."""
        if self.number == 1:
            return values
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total

    def wait(self) -> None:
        """Wait until all have come as far as this; one that has gone is not waited for."""
        with suppress(RuntimeError):
            self._accelerator.wait_for_everyone()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Context of what the first process does for all, which the others only come through when it is done.

        They wait in a group of their own: the run's takes whoever keeps it waiting for two hours for dead, and ends all.
        """
        if self.number == 1:
            yield
            return
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
        yield
        with suppress(RuntimeError):
            torch.distributed.barrier(group)
        torch.distributed.destroy_process_group(group)

    def any(self, mine: bool) -> bool:
        """Whether it is so in one of them; the same answer in all."""
        return mine if self.number == 1 else bool(self.sum(torch.tensor(float(mine), device=self._accelerator.device)))
