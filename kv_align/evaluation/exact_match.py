"""GSM8K-style exact match: greedy generation with a cache, then the number after `####`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import groupby

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from kv_align.data.batch import pad
from kv_align.data.encode import Encoded
from kv_align.models.padding import pads_left

_MARKED_NUMBER = re.compile(r"####\s*(\$?[-+]?\$?\s*[\d,]*\.?\d+)")


@dataclass(frozen=True)
class Answered:
    """What a model wrote for one prompt: the text, and the number in it (None if it holds none)."""

    text: str
    number: Decimal | None


def parse_answer(text: str) -> Decimal | None:
    """Return the number after the first `####` of a text, without commas and currency signs; None if there is none."""
    found = _MARKED_NUMBER.search(text)
    if found is None:
        return None
    try:
        return Decimal(re.sub(r"[\s,$]", "", found.group(1)))
    except InvalidOperation:
        return None


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    encoded: list[Encoded],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda advanced: None,
) -> list[Answered]:
    """Greedy answers of a model to the questions of `encoded`, in their order.

    Parameters
    ----------
    model, tokenizer
        Any causal model and its own tokenizer. Whether the model is training is left as it was.
    encoded
        Texts whose question tokens are the prompt.
    batch_size, max_new_tokens
        Prompts at a time (sorted by length, so that padding is rare; all of one length for a model that counts positions
        from the padding on), and the limit of each answer in tokens.
    progress
        Called with the number of prompts just answered.
    """
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].prompt))
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    answers: dict[int, Answered] = {}
    was_training = model.training
    model.eval()
    for places in _batches(order, [len(each.prompt) for each in encoded], batch_size, mixed=pads_left(model)):
        prompts = [Encoded(e.prompt, [1] * len(e.prompt), cut=False) for e in (encoded[i] for i in places)]
        tokens = pad(prompts, pad_id, side="left").to(model.device)
        written = model.generate(input_ids=tokens.ids, attention_mask=tokens.mask.long(), generation_config=greedy)
        texts = tokenizer.batch_decode(written[:, tokens.ids.shape[1] :], skip_special_tokens=True)
        answers.update({place: Answered(text, parse_answer(text)) for place, text in zip(places, texts, strict=True)})
        progress(len(places))
    model.train(was_training)
    return [answers[index] for index in range(len(encoded))]


def _batches(order: list[int], lengths: list[int], size: int, *, mixed: bool) -> Iterator[list[int]]:
    """Cut places that are sorted by length into batches, of one length each unless they may be mixed."""
    for _, group in groupby(order, key=lambda place: None if mixed else lengths[place]):
        places = list(group)
        for start in range(0, len(places), size):
            yield places[start : start + size]
