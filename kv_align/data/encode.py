"""Text to tokens: ids and the segment of each, from one tokenisation of the whole text.

The prompt of a generation is the question's tokens of the same tokenisation, so that what is evaluated is what was
trained. Knows nothing of batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    """

    ids: list[int]
    segments: list[int]
    cut: bool

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
    boundaries, position = [], 0
    for segment, text in segments:
        position += len(text)
        boundaries.append((position, int(segment)))
    # A text without anything in it has only its special tokens, and nothing to score.
    last = int(segments[-1][0] if segments else Segment.QUESTION)
    token_segments, current = [], 0
    for start, _ in offsets:
        while current < len(boundaries) - 1 and start >= boundaries[current][0]:
            current += 1
        token_segments.append(boundaries[current][1])
    first = token_segments[0] if token_segments else last
    all_ids = [*begin, *ids, *([] if end is None else [end])]
    all_segments = [*[first] * len(begin), *token_segments, *([] if end is None else [last])]
    return Encoded(all_ids[:max_length], all_segments[:max_length], cut=len(all_ids) > max_length)
