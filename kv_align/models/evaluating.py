"""Evaluation mode for the duration of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the block; afterwards the module trains if it trained before."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
