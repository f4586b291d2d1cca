"""Operators that one step dispatches above plain transformers: what a GPU has to launch, counted without one.

At a real model's depth, vocabulary and length, with tiny widths; the first step, views left out. A CPU does what a GPU would:
it has the GPU's budgets, and its attention kernels, which are counted and not computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from kv_align.data.batch import Batch
from kv_align.losses import attention_kernels
from kv_align.losses.predictions import linear_head
from tests.benchmarks.pairs import make_batch, make_texts
from tests.benchmarks.steps import Arm, Models, PlainFloor

VOCABULARY, LENGTH, BATCH_SIZE, LAYERS = 151_936, 1024, 2, 28
_NO_KERNEL = """
view reshape expand transpose permute slice select unsqueeze squeeze t detach alias _unsafe_view as_strided split unbind empty
empty_like new_empty split_with_sizes lift_fresh _reshape_alias new_empty_strided empty_strided diagonal unfold is_same_size
promote_types
"""
"""Views, and what only asks."""
_WAITS = frozenset(["_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"])
"""What makes the host wait for a GPU."""


@dataclass(frozen=True)
class Row:
    """A step, beside plain transformers: with a teacher's body before it, or without; and at most how many more."""

    name: str
    choices: tuple[str, ...]
    taught: bool
    goal: int


ROWS = (
    Row("plain fine-tuning", ("aligner=none", "loss=ce"), False, 150),
    Row("structured, kv", ("aligner=structured", "loss=kv"), True, 900),
    Row("structured, kv+struct", ("aligner=structured", "loss=kv+struct"), True, 1200),
    Row("logit distillation", ("aligner=none", "loss=logit_kd"), True, 250),
)


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """How many there were."""
        return self.names.total()

    @property
    def waits(self) -> int:
        """How many of them would make the host wait."""
        return sum(self.names[name] for name in _WAITS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.names[name] += name not in _NO_KERNEL.split()
        if name == "_efficient_attention_forward":
            query, _, value = args[:3]
            output, logsumexp = torch.zeros_like(value), query.new_zeros(query.shape[0], query.shape[2], query.shape[1])
            return output, logsumexp, *(torch.zeros((), dtype=torch.int64) for _ in range(2)), 0, 0
        if name == "_efficient_attention_backward":
            return *(torch.zeros(each.shape) for each in args[1:4]), torch.empty(0)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Context in which a CPU has a GPU's budgets and kernels."""
    budgets, kernels = linear_head.BUDGETS, attention_kernels.KERNELS
    own = budgets["cpu"]
    budgets["cpu"], kernels["cpu"] = budgets["cuda"], kernels["cuda"]
    try:
        yield
    finally:
        budgets["cpu"] = own
        del kernels["cpu"]


def make_wide_models(layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Models:
    """A pair of a real one's depth and vocabulary."""

    def make(hidden: int, heads: int, key_heads: int) -> PreTrainedModel:
        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
        return Qwen2ForCausalLM(config)

    return Models(make(32, 4, 2), make(16, 2, 1), torch.device("cpu"))


def counted(step: Callable[[Batch], None], batch: Batch) -> Operators:
    """Do a step and count."""
    with as_on_a_gpu(), Operators() as operators:
        step(batch)
    return operators


@dataclass(frozen=True)
class Found:
    """Operators of a step above plain transformers', those of plain transformers, and how often a host would wait."""

    above: int
    floor: int
    waits: int


def measure_operators(models: Models, length: int = LENGTH, batch_size: int = BATCH_SIZE) -> list[Found]:
    """Count each row's step."""
    vocabulary = models.student.config.vocab_size
    batch = make_batch(make_texts(vocabulary, batch_size, length), list(range(batch_size)), models.device)
    floors = {taught: counted(PlainFloor(models, taught=taught).step, batch) for taught in (False, True)}
    found = []
    for row in ROWS:
        operators, floor = counted(Arm(models, *row.choices).step, batch), floors[row.taught]
        found.append(Found(operators.count - floor.count, floor.count, operators.waits - floor.waits))
    return found
