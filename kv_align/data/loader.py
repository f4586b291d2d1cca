"""How many optimizer steps a run has, and which examples each of them sees."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from kv_align.config.config import Config, TrainerConfig
from kv_align.data.batch import Batch, DataOrder
from kv_align.data.prepared import PreparedSplit
from kv_align.runs.seeds import derive_seed


def data_order(config: Config, num_examples: int) -> DataOrder:
    """Return the order in which the run sees its examples."""
    return DataOrder(num_examples, config.trainer.batch_size, derive_seed(config.seed, "data order"))


def total_steps(config: Config, num_examples: int) -> int:
    """Optimizer steps of a run: `max_steps`, or as many as its epochs have."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    assert config.trainer.epochs is not None
    return max(1, round(config.trainer.epochs * (num_examples // config.trainer.batch_size)))


def micro_batches(
    train: PreparedSplit, order: DataOrder, steps: range, trainer: TrainerConfig, pin_memory: bool
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each optimizer step; a step has `batch_size / micro_batch_size` of them."""
    size = trainer.micro_batch_size or trainer.batch_size
    places = [order[step][at : at + size] for step in steps for at in range(0, trainer.batch_size, size)]
    loader: DataLoader[int] = DataLoader(
        range(len(train.examples)),  # type: ignore[arg-type]
        batch_sampler=places,
        collate_fn=train.collate,
        # Runs that share a machine are told how many of its cores each has.
        num_workers=min(trainer.num_workers, int(os.environ.get("KV_ALIGN_DATA_WORKERS", trainer.num_workers))),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own: the loader draws a base seed, which must not shift the global state
    )
    batches = iter(loader)
    for _ in steps:
        yield [next(batches) for _ in range(trainer.batch_size // size)]
