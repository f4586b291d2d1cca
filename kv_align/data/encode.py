"""Text to tokens: ids, the segment of each and its characters, from one tokenisation of the whole text.

The prompt of a generation is the question's tokens of the same tokenisation, so that what is evaluated is what was
trained. Knows nothing of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from kv_align.data.chat import chat_segments
from kv_align.data.example import Example, Segment
from kv_align.runs.preemption import leave_if_asked

_AT_ONCE = 512


@dataclass(frozen=True)
class Encoded:
    """The tokens of one text.

    Attributes
    ----------
    ids
        Token ids, a beginning-of-text token first where the tokenizer uses one, the end-of-text token last unless the
        text was cut; of a conversation, those alone that its chat template writes.
    segments
        One `Segment` for each id; special tokens belong to the segment beside them.
    cut
        Whether the text was longer than the limit.
    spans
        [T, 2], the characters of each token: its first and the one after its last, counted from the start of its
        segment. A special token is a character before or after the text.
    """

    ids: list[int]
    segments: list[int]
    cut: bool
    spans: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int32), compare=False)

    @property
    def prompt(self) -> list[int]:
        """The ids before the first token of reasoning or answer."""
        return self.ids[: len(list(takewhile(lambda segment: segment == Segment.QUESTION, self.segments)))]


@dataclass(frozen=True)
class Written:
    """A text as one tokenizer is to read it.

    Attributes
    ----------
    segments
        (segment, string) pairs, in order, without empty strings.
    whole
        Whether it has its beginning and end in it already, as a conversation that a chat template wrote.
    """

    segments: list[tuple[Segment, str]]
    whole: bool


def write(examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast) -> list[Written]:
    """Write examples down for a tokenizer.

    Raises
    ------
    ValueError
        If a conversation cannot be written by its chat template.
    """
    written = []
    for example in examples:
        leave_if_asked()
        if example.turns:
            written.append(Written(chat_segments(example, tokenizer), whole=True))
        else:
            written.append(Written(example.segments(), whole=False))
    return written


def encode(examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[Encoded]:
    """Tokenise examples, at most `max_length` tokens each (cut at the end).

    Parameters
    ----------
    examples
        Texts as the reader is to see them: apply `Example.with_rationale` before.
    tokenizer
        A fast tokenizer (character offsets are needed).
    max_length
        In tokens, special ones included.

    Raises
    ------
    ValueError
        As `write`.
    """
    return tokenise(write(examples, tokenizer), tokenizer, max_length)


def tokenise(
    written: Sequence[Written],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Encoded]:
    """Tokenise what was written, at most `max_length` tokens each; `progress` is called with the number just done."""
    begin, encoded = _beginning(tokenizer), list[Encoded]()
    for start in range(0, len(written), _AT_ONCE):
        chunk = written[start : start + _AT_ONCE]
        batch = tokenizer(
            ["".join(text for _, text in each.segments) for each in chunk],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # it would warn of texts beyond the model's length, which are cut below
        )
        for ids, offsets, each in zip(batch["input_ids"], batch["offset_mapping"], chunk, strict=True):
            first, last = ([], None) if each.whole else (begin, tokenizer.eos_token_id)
            encoded.append(_assemble(ids, offsets, each.segments, first, last, max_length))
        progress(len(chunk))
    return encoded


def _beginning(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the begin-of-text token if this tokenizer puts one before a text by itself."""
    with_special = tokenizer("", add_special_tokens=True)["input_ids"]
    return with_special[:1] if with_special[:1] == [tokenizer.bos_token_id] else []


def _assemble(
    ids: list[int],
    offsets: list[tuple[int, int]],
    segments: list[tuple[Segment, str]],
    begin: list[int],
    end: int | None,
    max_length: int,
) -> Encoded:
    starts, zeros, position = [], [], 0
    lengths = dict.fromkeys(Segment, 0)
    for segment, text in segments:
        starts.append(position)
        zeros.append(position - lengths[segment])  # characters of a segment in several parts are counted on
        lengths[segment] += len(text)
        position += len(text)
    # A text without anything in it has only its special tokens, and nothing to score.
    kinds = [int(segment) for segment, _ in segments] or [int(Segment.QUESTION)]
    special = [(-1, 0)] * len(begin), [] if end is None else [(position, position + 1)]
    spans = np.array([*special[0], *offsets, *special[1]], dtype=np.int32).reshape(-1, 2)
    places = _places(spans[len(begin) : len(begin) + len(ids)], segments, starts)
    all_places = [*[int(places[0]) if len(places) else 0] * len(begin), *places, *([] if end is None else [-1])]
    spans = spans - np.array([zeros or [0]], dtype=np.int32).T[all_places]
    all_ids = [*begin, *ids, *([] if end is None else [end])]
    return Encoded(
        all_ids[:max_length],
        [kinds[place] for place in all_places[:max_length]],
        cut=len(all_ids) > max_length,
        spans=spans[:max_length],
    )


def _places(spans: NDArray[np.int32], segments: list[tuple[Segment, str]], starts: list[int]) -> NDArray[np.intp]:
    """Return which part of a text each token belongs to: that of its first character, spaces and line breaks aside.

    A tokenizer may put the line break that ends a part into the first token of the next. Such a token's span is changed to
    begin with the next part.
    """
    places = np.searchsorted(starts[1:], spans[:, 0], side="right")
    for place, start in enumerate(starts[1:]):
        last_word = starts[place] + len(segments[place][1].rstrip())
        across = (spans[:, 0] >= last_word) & (spans[:, 0] < start) & (spans[:, 1] > start)
        places[across], spans[across, 0] = place + 1, start
    return places
