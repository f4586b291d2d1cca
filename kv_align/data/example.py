"""One text of the experiment and how it is written down. Imports no torch.

A text has up to three segments: question, reasoning, answer. The student may be shown a shortened reasoning
(`rationale`), the teacher always reads all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

Split = Literal["train", "validation", "test"]
Rationale = Literal["full", "short", "none"]


class Segment(IntEnum):
    """What a token belongs to. Padding belongs to nothing."""

    PADDING = 0
    QUESTION = 1
    REASONING = 2
    ANSWER = 3


class Turn(NamedTuple):
    """One message of a conversation, and whether the student is scored on it."""

    role: str
    content: str
    scored: bool


@dataclass(frozen=True)
class Example:
    """One text, or one conversation, which each model reads through its tokenizer's chat template.

    Attributes
    ----------
    id
        Unique within the data source, stable between versions of it.
    question
        May be empty (plain text).
    steps
        The reasoning, a line each; plain text is one step.
    answer
        What stands after `####`; None for texts that have no answer.
    turns
        The messages of a conversation, which has no question, steps and answer; else empty.
    """

    id: str
    question: str
    steps: tuple[str, ...]
    answer: str | None
    turns: tuple[Turn, ...] = ()

    def with_rationale(self, rationale: Rationale, every: int) -> Example:
        """Return the example with all its steps (`full`), every `every`-th one (`short`), or without (`none`)."""
        kept = {"full": self.steps, "short": self.steps[every - 1 :: every], "none": ()}[rationale]
        return replace(self, steps=kept)

    def segments(self) -> list[tuple[Segment, str]]:
        """Return the text as (segment, string) pairs, in order, without empty strings; not of a conversation.

        The segments end in a line break, so that a tokenizer is unlikely to join two of them in one token.
        """
        parts = [
            (Segment.QUESTION, f"{self.question}\n" if self.question else ""),
            (Segment.REASONING, "\n".join(self.steps) + ("\n" if self.steps and self.answer is not None else "")),
            (Segment.ANSWER, "" if self.answer is None else f"#### {self.answer}"),
        ]
        return [(segment, text) for segment, text in parts if text]


class DataSource(ABC):
    """What `conf/data/*.yaml` names: a source of examples whose splits are disjoint and the same in every run.

    Attributes
    ----------
    has_reasoning
        Whether an example has steps that `data.rationale` can leave out.
    files
        The local files that it reads.
    """

    has_reasoning: ClassVar[bool] = True
    files: tuple[Path, ...] = ()

    @abstractmethod
    def examples(self, split: Split) -> list[Example]:
        """Return all examples of a split, in a fixed order."""


def first_examples(train: list[Example], count: int | None) -> list[Example]:
    """Return the first `data.train_examples` of a split; all where it is None.

    Raises
    ------
    ValueError
        If there are not that many.
    """
    if count is not None and count > len(train):
        raise ValueError(
            f"data.train_examples={count} is above the {len(train)} training texts; lower it, or set it to null"
        )
    return train[:count]
