"""What is kept of the teacher for each example of a split: its own states, its logits, or targets through a frozen aligner.

Each says what it depends on, which tokens it keeps, how it is computed, and what it is to a step when it is read again.
Knows nothing of files.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kv_align.config.signals import Signal, Signals
from kv_align.data.batch import Batch, pad
from kv_align.data.encode import Encoded
from kv_align.data.example import Segment
from kv_align.data.prepared import PreparedSplit
from kv_align.models.capture.states import States
from kv_align.models.devices import device_of
from kv_align.models.load import weights_digest
from kv_align.teacher.teacher import Autocast, Teacher, TeacherStates


class CacheEntry(ABC):
    """What is kept of each example.

    Attributes
    ----------
    names
        Of its tensors [..., T, D].
    about
        What they depend on, beside the teacher and how it runs.
    spans
        The tokens of each example that are kept.
    """

    names: tuple[str, ...]
    about: Mapping[str, object]
    spans: list[range]

    @abstractmethod
    def compute(self, examples: list[int]) -> Mapping[str, Tensor]:
        """Tensors of some examples, padded, [B, ..., T, D]."""

    @abstractmethod
    def rows(self, batch: Batch) -> tuple[Sequence[int], int]:
        """Which examples a batch needs, and the padded length of their tokens in it."""

    @abstractmethod
    def given(self, tensors: Mapping[str, Tensor]) -> TeacherStates:
        """What the tensors of a batch are to the step."""


class StateEntry(CacheEntry):
    """What the teacher gives, as it gives it; of logits those that predict a scored token.

    Parameters
    ----------
    teacher
        Gives it.
    texts, pad_id
        The split as the teacher reads it, and what it is padded with.
    signals
        What is asked of it; signals that are kept alike, see `kept_alike`.
    autocast
        Makes the context in which models run in training.
    """

    def __init__(
        self, teacher: Teacher, texts: Sequence[Encoded], pad_id: int, signals: Signals, autocast: Autocast
    ) -> None:
        self._teacher, self._texts, self._pad_id = teacher, texts, pad_id
        self._signals, self._autocast = signals, autocast
        self.names = tuple(dict.fromkeys(name for signal in signals for name in signal.fields))
        kind = signals[0]
        self.spans = [_predicting(text) if kind.predicting else range(len(text.ids)) for text in texts]
        self.about = {
            "texts": _digest(str((text.ids, span)) for text, span in zip(texts, self.spans, strict=True)),
            **({"segments": _digest(str(text.segments) for text in texts)} if kind.by_segments else {}),
            **kind.settings,
        }

    def compute(self, examples: list[int]) -> dict[str, Tensor]:
        """Run the teacher."""
        tokens = pad([self._texts[example] for example in examples], self._pad_id).to(device_of(self._teacher.model))
        with self._autocast():
            states = self._teacher.read_tokens(tokens, self._signals)
        return {name: states[name] for name in self.names}

    def rows(self, batch: Batch) -> tuple[Sequence[int], int]:
        """Those that the teacher reads."""
        return batch.read_by_teacher or batch.indices, batch.teacher.ids.shape[1]

    def given(self, tensors: Mapping[str, Tensor]) -> TeacherStates:
        """What the teacher itself would have given."""
        return TeacherStates(tensors)


def kept_alike(signals: Signals) -> list[Signals]:
    """Group signals whose tensors are of the same tokens and depend on the same, so that one folder holds them."""
    groups: dict[object, list[Signal]] = {}
    for signal in signals:
        groups.setdefault((signal.predicting, signal.by_segments, str(signal.settings)), []).append(signal)
    return [tuple(group) for group in groups.values()]


class TargetEntry(CacheEntry):
    """What a frozen aligner makes of the teacher's states, in the student's shape.

    Parameters
    ----------
    teacher, aligner
        Give it; the aligner (`kv_align.align`, which knows the teacher no more than this knows it) is as it is in training.
    split
        Unshuffled: what the teacher reads belongs to the example alone.
    signals
        Those that are compared through the aligner.
    autocast
        Makes the context in which models run in training.
    about
        What the aligner does beside its weights.
    """

    def __init__(
        self,
        teacher: Teacher,
        aligner: nn.Module,
        split: PreparedSplit,
        signals: Signals,
        autocast: Autocast,
        about: Mapping[str, object],
    ) -> None:
        self._teacher, self._aligner, self._split = teacher, aligner, split
        self._signals, self._autocast = signals, autocast
        self.names = tuple(dict.fromkeys(name for signal in signals for name in signal.fields))
        pairs = zip(split.student, split.teacher, strict=True)
        self.about = {
            "aligner": {**about, "weights": weights_digest(aligner)},
            "matched": sorted(split.collate.matched),
            "texts": _digest(_tokens(text) for pair in pairs for text in pair),
        }
        self.spans = [range(len(text.ids)) for text in split.student]

    @torch.no_grad()
    def compute(self, examples: list[int]) -> dict[str, Tensor]:
        """Run the teacher, then the aligner."""
        batch = self._split.collate(examples).to(device_of(self._teacher.model))
        with self._autocast():
            target: States = self._aligner(self._teacher.read(batch, self._signals).raw, batch.correspondence)
        return target.tensors()

    def rows(self, batch: Batch) -> tuple[Sequence[int], int]:
        """The student's."""
        return batch.indices, batch.student.ids.shape[1]

    def given(self, tensors: Mapping[str, Tensor]) -> TeacherStates:
        """A target."""
        return TeacherStates(target=States(**tensors))


def _predicting(text: Encoded) -> range:
    """The tokens before scored ones: reasoning and answer stand together at the end, and a first token is not scored."""
    scored = [place for place, segment in enumerate(text.segments) if place and segment != Segment.QUESTION]
    return range(scored[0] - 1, scored[-1]) if scored else range(0)


def _tokens(text: Encoded) -> str:
    return str((text.ids, text.segments, text.spans.tolist()))


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
