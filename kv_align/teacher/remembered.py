"""A teacher that remembers what it gave of a few texts: evaluations ask the same of it again and again.

Kept is no more than a budget of the machine's memory, in the order of asking; what is beyond it is computed anew each time.
Whatever is asked first of a text, the teacher's own losses on it come with it: the run's summary asks for them in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kv_align.config.signals import TOKEN_LOSSES, Signals
from kv_align.data.batch import Batch
from kv_align.teacher.teacher import Teacher, TeacherStates

BUDGET_BYTES = 2**28
"""For all that one run remembers: what the embedded pair's evaluations ask takes a third of it."""

_Texts = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The examples of a batch, those that the teacher reads for them, and how they are padded."""


@dataclass
class Remembered:
    """Asks a source once for each batch.

    Parameters
    ----------
    source
        The teacher.
    memory
        Of the run.
    """

    source: Teacher
    memory: Memory
    _kept: dict[tuple[_Texts, Signals], TeacherStates] = field(default_factory=dict)

    def fill(self, examples: Iterable[int]) -> None:
        """Have the source make ready what will be read."""
        self.source.fill(examples)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Do as the source does."""
        self.source.expect(batches)

    def read(self, batch: Batch, signals: Signals) -> TeacherStates:
        """Return what the source gives of a batch, where the batch is; asked for again, the same numbers."""
        device = batch.student.ids.device
        texts = (batch.indices, batch.read_by_teacher, tuple(batch.teacher.ids.shape))
        losses = self.memory.token_losses
        if signals == (TOKEN_LOSSES,) and texts in losses:
            return TeacherStates({"token_losses": losses[texts].to(device)})
        if (texts, signals) in self._kept:
            return _on(self._kept[texts, signals], device)
        with_losses = bool(signals) and TOKEN_LOSSES not in signals and texts not in losses
        given = self.source.read(batch, (*signals, TOKEN_LOSSES) if with_losses else signals)
        if "token_losses" in given:
            losses[texts] = given["token_losses"].cpu()
        if with_losses:
            given = replace(
                given, tensors={name: each for name, each in given.tensors.items() if name != "token_losses"}
            )
        if given.unfinished is None:  # else it is a whole vocabulary
            size = sum(tensor.numel() * tensor.element_size() for tensor in given.tensors.values())
            if size <= self.memory.left:
                self.memory.left -= size
                self._kept[texts, signals] = _on(given, torch.device("cpu"))
        return given


@dataclass
class Memory:
    """What a run remembers of its teacher on one split, within one budget.

    Attributes
    ----------
    left
        Bytes that are left of it.
    token_losses
        The teacher's own, [B, R, 1], of each batch that it has read: too few to be counted.
    """

    left: int = BUDGET_BYTES
    token_losses: dict[_Texts, Tensor] = field(default_factory=dict)
    _remembered: dict[tuple[object, ...], Remembered] = field(default_factory=dict)

    def of(self, teacher: Teacher) -> Remembered:
        """Return who remembers a teacher; teachers that read the same layers alike share what is remembered of them."""
        key = (id(teacher.model), tuple(teacher.layers), teacher.rotated)
        return self._remembered.setdefault(key, Remembered(teacher, self))


def _on(states: TeacherStates, device: torch.device) -> TeacherStates:
    return replace(states, tensors={name: tensor.to(device) for name, tensor in states.tensors.items()})
