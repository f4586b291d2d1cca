"""Text to tokens: ids, the segment of each and its characters, from one tokenisation of the whole text.

The prompt of a generation is the question's tokens of the same tokenisation, so that what is evaluated is what was
trained. Knows nothing of batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from kv_align.data.example import Example, Segment


@dataclass(frozen=True)
class Encoded:
    """The tokens of one text.

    Attributes
    ----------
    ids
        Token ids, a beginning-of-text token first where the tokenizer uses one, the end-of-text token last unless the
        text was cut.
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
        return [i for i, segment in zip(self.ids, self.segments, strict=True) if segment == Segment.QUESTION]


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
    """
    pieces = [example.segments() for example in examples]
    if not pieces:
        return []
    texts = ["".join(text for _, text in segments) for segments in pieces]
    begin = _beginning(tokenizer)
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # it would warn of texts beyond the model's length, which are cut below
    )
    return [
        _assemble(ids, offsets, segments, begin, tokenizer.eos_token_id, max_length)
        for ids, offsets, segments in zip(batch["input_ids"], batch["offset_mapping"], pieces, strict=True)
    ]


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
    starts, position = [], 0
    for _, text in segments:
        starts.append(position)
        position += len(text)
    # A text without anything in it has only its special tokens, and nothing to score.
    kinds = [int(segment) for segment, _ in segments] or [int(Segment.QUESTION)]
    places = np.searchsorted(starts[1:], [start for start, _ in offsets], side="right")
    all_spans = [*[(-1, 0)] * len(begin), *offsets, *([] if end is None else [(position, position + 1)])]
    all_ids = [*begin, *ids, *([] if end is None else [end])]
    all_places = [*[int(places[0]) if len(places) else 0] * len(begin), *places, *([] if end is None else [-1])]
    spans = np.array(all_spans, dtype=np.int32).reshape(-1, 2) - np.array([starts or [0]], dtype=np.int32).T[all_places]
    return Encoded(
        all_ids[:max_length],
        [kinds[place] for place in all_places[:max_length]],
        cut=len(all_ids) > max_length,
        spans=spans[:max_length],
    )
