"""Tokens to tensors: what one micro-batch holds, and in which order a run sees the examples.

Axes: B batch, S student tokens, R teacher (reader of the full reasoning) tokens. Padding goes right in training and
left where text is generated; position ids count real tokens either way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kv_align.data.correspondence import Correspondence
from kv_align.data.encode import Encoded
from kv_align.data.example import Segment
from kv_align.data.match import match_tokens
from kv_align.runs.errors import ConfigError


@dataclass(frozen=True)
class Tokens:
    """Padded sequences as one model reads them.

    Attributes
    ----------
    ids
        [B, T]; padding holds the pad id, which may equal the end-of-text id: only `mask` says what is padding.
    mask
        [B, T], True at real tokens.
    positions
        [B, T], 0 at each sequence's first real token, and 0 at padding.
    segments
        [B, T], values of `Segment`.
    known_predicting
        [N], what `predicting` gives, where that is known already.
    """

    ids: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    segments: Int[Tensor, "b t"]
    known_predicting: Int[Tensor, " n"] | None = None

    @property
    def scored(self) -> Bool[Tensor, "b t"]:
        """True where cross-entropy and perplexity score a token: at reasoning and answer.

        But for a text's first token, which is predicted from nothing: no model can be scored on it.
        """
        return (self.segments > Segment.QUESTION) & (self.positions > 0)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a causal model is called with."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}

    @property
    def predicting(self) -> Int[Tensor, " n"]:
        """Places, among all tokens of the batch in a row, of those that predict a scored one: of the tokens before them."""
        if self.known_predicting is not None:
            return self.known_predicting
        return F.pad(self.scored[:, 1:], (0, 1)).flatten().nonzero().squeeze(1)

    @property
    def predicted(self) -> Int[Tensor, " n"]:
        """The scored tokens, in the order of `predicting`."""
        return self.ids.flatten()[self.predicting + 1]

    def to(self, device: torch.device) -> Tokens:
        """Copy to a device (asynchronously where the memory is pinned)."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Tokens:
        """Return the same sequences in another memory."""
        # To look for them there would be to wait for it.
        return Tokens(*(move(tensor) for tensor in (*self._tensors, self.predicting)))

    def rows(self, rows: slice) -> Tokens:
        """Return some of the sequences, padded as they are here."""
        return Tokens(*(tensor[rows] for tensor in self._tensors))

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.mask, self.positions, self.segments


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes
    ----------
    student, teacher
        The same texts as each of the two reads them.
    aligned
        [B, S], True where a student token has a target: it is no padding, the teacher has its segment too, and the limit
        cut nothing of what stands for it, see `match_tokens`.
    correspondence
        Which of the teacher's tokens stand for which of the student's.
    indices
        The examples' places in their split.
    read_by_teacher
        The examples that the teacher reads, where they are others than `indices` (control); else empty.
    """

    student: Tokens
    teacher: Tokens
    aligned: Bool[Tensor, "b s"]
    correspondence: Correspondence
    indices: tuple[int, ...]
    read_by_teacher: tuple[int, ...] = ()

    @property
    def scored(self) -> Bool[Tensor, "b s"]:
        """True where a student token is one that the cross-entropy and perplexity score."""
        return self.student.scored

    def to(self, device: torch.device) -> Batch:
        """Copy to a device (asynchronously where the memory is pinned)."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Put into page-locked memory; the data loader calls it by this name."""
        return self._moved(Tensor.pin_memory)

    def rows(self, rows: slice) -> Batch:
        """Return some of the examples, padded as they are here."""
        changed = self._changed(lambda tokens: tokens.rows(rows), lambda tensor: tensor[rows])
        return replace(changed, indices=self.indices[rows], read_by_teacher=self.read_by_teacher[rows])

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return self._changed(lambda tokens: tokens.moved(move), move)

    def _changed(self, change_tokens: Callable[[Tokens], Tokens], change: Callable[[Tensor], Tensor]) -> Batch:
        student = change_tokens(self.student)
        teacher = student if self.teacher is self.student else change_tokens(self.teacher)
        places = self.correspondence.places
        return replace(
            self,
            student=student,
            teacher=teacher,
            aligned=change(self.aligned),
            correspondence=Correspondence(
                student.segments,
                teacher.segments,
                self.correspondence.same_time,
                None if places is None else change(places),
            ),
        )


def pad(encoded: list[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> Tokens:
    """Pad sequences to the longest of them.

    Parameters
    ----------
    encoded
        At least one sequence, each of at least one token.
    pad_id
        Any valid id; what is padding is read from the mask.
    side
        Where the padding goes.
    """
    length = max(len(sequence.ids) for sequence in encoded)
    shape = (len(encoded), length)
    ids, segments = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask, positions = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
    for row, sequence in enumerate(encoded):
        count = len(sequence.ids)
        where = slice(0, count) if side == "right" else slice(length - count, length)
        ids[row, where], segments[row, where] = sequence.ids, sequence.segments
        mask[row, where], positions[row, where] = True, np.arange(count)
    return Tokens(*(torch.from_numpy(array) for array in (ids, mask, positions, segments)))


class Collator:
    """Puts examples of a split, given by their indices, into a `Batch`.

    Parameters
    ----------
    student, teacher
        The split as each reads it; the same list object where both read the same tokens.
    student_pad_id, teacher_pad_id
        Ids to pad with.
    shuffle_teacher
        Control: the teacher reads the text of the next example of the batch instead of the student's.
    matched
        The segments whose tokens are matched by their characters: those that two tokenizers have read alike.
    """

    def __init__(
        self,
        student: list[Encoded],
        teacher: list[Encoded],
        *,
        student_pad_id: int,
        teacher_pad_id: int,
        shuffle_teacher: bool = False,
        matched: Collection[Segment] = (),
    ) -> None:
        self._student, self._teacher = student, teacher
        self.matched = () if shuffle_teacher else tuple(matched)
        self._student_pad_id, self._teacher_pad_id = student_pad_id, teacher_pad_id
        self._shuffle_teacher = shuffle_teacher

    def __call__(self, indices: list[int]) -> Batch:
        """Return the batch of the examples at these places."""
        student = pad([self._student[i] for i in indices], self._student_pad_id)
        read_by_teacher = [*indices[1:], indices[0]] if self._shuffle_teacher else indices
        if self._teacher is self._student and not self._shuffle_teacher:
            teacher = student
        else:
            teacher = pad([self._teacher[i] for i in read_by_teacher], self._teacher_pad_id)
        same_time = torch.equal(student.segments, teacher.segments)
        aligned = student.mask & _teacher_has_segment(student, teacher)
        places = None
        if self._teacher is not self._student and not self._shuffle_teacher:
            by_characters, was_read = self._match(indices, student)
            aligned = aligned & was_read
            places = by_characters if self.matched else None
        if places is not None:
            ranks = _ranks(student.segments).to(places.dtype)
            same_time = same_time and bool((places.isnan() | (places == ranks)).all())
        correspondence = Correspondence(student.segments, teacher.segments, same_time, places)
        others = tuple(read_by_teacher) if self._shuffle_teacher else ()
        return Batch(student, teacher, aligned, correspondence, tuple(indices), others)

    def _match(self, indices: list[int], student: Tokens) -> tuple[Float[Tensor, "b s"], Bool[Tensor, "b s"]]:
        places = torch.full(student.ids.shape, torch.nan)
        was_read = torch.ones_like(student.mask)
        for row, index in enumerate(indices):
            matched, covered = match_tokens(self._student[index], self._teacher[index], self.matched)
            places[row, : len(matched)] = torch.from_numpy(matched)
            was_read[row, : len(matched)] = torch.from_numpy(covered)
        return places, was_read


def _ranks(segments: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """Number the tokens of each segment from 0."""
    numbered = [(segments == segment).cumsum(dim=1) - 1 for segment in Segment]
    return torch.stack(numbered, dim=1).gather(1, segments[:, None]).squeeze(1)


def _teacher_has_segment(student: Tokens, teacher: Tokens) -> Bool[Tensor, "b s"]:
    present = torch.stack([(teacher.segments == segment).any(dim=1) for segment in Segment], dim=1)
    return present.gather(1, student.segments)


class DataOrder:
    """Which examples an optimizer step sees: a function of the seed and the step alone, so that resuming needs no state.

    Each epoch is a fresh permutation; what is left of it after whole batches is dropped.

    Parameters
    ----------
    num_examples
        Size of the training split.
    batch_size
        Examples of one optimizer step, over all processes and micro-batches.
    seed
        Of the data order alone.

    Raises
    ------
    ConfigError
        If a batch holds more examples than there are.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        if batch_size > num_examples:
            raise ConfigError(
                f"trainer.batch_size={batch_size} is above the {num_examples} training examples: lower it to at most that."
            )
        self.batch_size = batch_size
        self.steps_per_epoch = num_examples // batch_size
        self._num_examples, self._seed = num_examples, seed
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._epoch = (epoch, generator.permutation(self._num_examples).tolist())
        return self._epoch[1][place * self.batch_size : (place + 1) * self.batch_size]

    def digest(self, num_steps: int, ids: list[str]) -> str:
        """SHA-256 over the ids of all examples that the first `num_steps` steps see, in order."""
        digest = hashlib.sha256()
        for step in range(num_steps):
            for index in self[step]:
                digest.update(ids[index].encode() + b"\n")
        return digest.hexdigest()
