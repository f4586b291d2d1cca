"""How many optimizer steps a run has, and which examples each of them sees."""

from __future__ import annotations

from kv_align.config import Config
from kv_align.data.batch import DataOrder
from kv_align.seeds import derive_seed


def data_order(config: Config, num_examples: int) -> DataOrder:
    """Return the order in which the run sees its examples."""
    return DataOrder(num_examples, config.trainer.batch_size, derive_seed(config.seed, "data order"))


def total_steps(config: Config, num_examples: int) -> int:
    """Optimizer steps of a run: `max_steps`, or as many as its epochs have."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    assert config.trainer.epochs is not None
    return max(1, round(config.trainer.epochs * (num_examples // config.trainer.batch_size)))
