"""Conversations as a tokenizer's chat template writes them, and which of their characters are scored.

Scored are the assistant's words and the token that ends its turn; all else is the question. The template is rendered once
with marks in place of the messages, so that a message is never mistaken for a word of the template.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from kv_align.data.example import Example, Segment, Turn

# Some templates write the day on which they are rendered, and numbers must not depend on it: theirs is this one.
_DAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
_ON_THAT_DAY = (
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{directive}','{value}')" for directive, value in _DAY.items())
    + " }}{% endmacro %}"
)


def chat_segments(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[tuple[Segment, str]]:
    """Return a conversation as (segment, string) pairs, in order, without empty strings.

    Raises
    ------
    ValueError
        If the tokenizer has no chat template, or it refuses, leaves out or rewrites a message.
    """
    where = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} is missing; save its tokenizer with a chat_template, or name a column of plain texts"
        )
    try:
        text = _rendered(tokenizer, [turn.content for turn in example.turns], example.turns)
        literals = _literals(tokenizer, example.turns)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"{where} refuses the conversation {example.id} ({error}); correct its messages") from error
    for contents in ([t.content for t in example.turns], [t.content.strip() for t in example.turns]):
        if literals is not None and text == _woven(literals, contents):
            return _segments(literals, contents, example.turns, _ends_of_turn(tokenizer))
    raise ValueError(
        f"{where} rewrites or leaves out a message of the conversation {example.id}; write its messages as the template "
        "shows them"
    )


def _rendered(tokenizer: PreTrainedTokenizerFast, contents: Sequence[str], turns: Sequence[Turn]) -> str:
    messages = [{"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)]
    template = tokenizer.get_chat_template()
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=_ON_THAT_DAY + template if "strftime_now" in template else template,
            date_string="26 Jul 2024",
        )
    )


def _literals(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> list[str] | None:
    """Return what the template writes before, between and after the messages; None where it does not show each once."""
    marks = [f"\ue000{number}\ue000" for number in range(len(turns))]
    rest, literals = _rendered(tokenizer, marks, turns), []
    for mark in marks:
        literal, shown, rest = rest.partition(mark)
        if not shown:
            return None
        literals.append(literal)
    return [*literals, rest]


def _woven(literals: list[str], contents: list[str]) -> str:
    return literals[0] + "".join(map("".join, zip(contents, literals[1:], strict=True)))


def _ends_of_turn(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values())


def _segments(
    literals: list[str], contents: list[str], turns: Sequence[Turn], ends: tuple[str, ...]
) -> list[tuple[Segment, str]]:
    pieces: list[tuple[Segment, str]] = [(Segment.QUESTION, literals[0])]
    for turn, content, literal in zip(turns, contents, literals[1:], strict=True):
        end = max((each for each in ends if literal.startswith(each)), key=len, default="") if turn.scored else ""
        pieces.append((Segment.REASONING if turn.scored else Segment.QUESTION, content + end))
        pieces.append((Segment.QUESTION, literal[len(end) :]))
    merged: list[tuple[Segment, str]] = []
    for segment, text in pieces:
        if merged and merged[-1][0] == segment:
            merged[-1] = (segment, merged[-1][1] + text)
        elif text:
            merged.append((segment, text))
    return merged
