"""Exact match: greedy generation with a cache, then what stands after the last `####`, against the right answer.

Every setting of the generation is this module's. What a checkpoint's `generation_config.json` asks for (penalties, beams,
forced or forbidden tokens) belongs to its makers' demonstrations, and changes no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from kv_align.data.batch import pad
from kv_align.data.encode import Encoded
from kv_align.data.prepared import PreparedSplit
from kv_align.evaluation.answers import gold_answer
from kv_align.models.evaluating import evaluating
from kv_align.models.padding import pads_left


def greedy_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_new_tokens: int
) -> GenerationConfig:
    """Return all that decides what a model generates: the likeliest token each time, up to a limit or an end.

    An answer ends at the tokenizer's end of text, which it was trained to write, and at those that the model's configuration
    names, if they are special tokens: in one that is another tokenizer's, or a default, they may be any.
    """
    of_model = model.config.get_text_config(decoder=True).eos_token_id
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ends = {tokenizer.eos_token_id, *(special & set(of_model if isinstance(of_model, list) else [of_model]))}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def asked(split: PreparedSplit, limit: int) -> list[int]:
    """Return the places of the first `limit` examples with an answer, but for answers that should be numbers and are none."""
    answered = [place for place, example in enumerate(split.examples) if example.answer is not None][:limit]
    return [place for place in answered if gold_answer(str(split.examples[place].answer), split.answers) is not None]


def prompt_of(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return what a model is given to answer a question; where that is empty, the token that begins or parts texts."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return encoded.prompt or [start]


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    encoded: list[Encoded],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda advanced: None,
) -> list[str]:
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
    prompts = [prompt_of(each, tokenizer) for each in encoded]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    answers: dict[int, str] = {}
    with _set_to(model, settings):
        for places in _batches(order, [len(each) for each in prompts], batch_size, mixed=pads_left(model)):
            questions = [Encoded(prompts[i], [1] * len(prompts[i]), cut=False) for i in places]
            tokens = pad(questions, settings.pad_token_id, side="left").to(model.device)
            written = model.generate(
                input_ids=tokens.ids, attention_mask=tokens.mask.long(), generation_config=settings
            )
            texts = tokenizer.batch_decode(written[:, tokens.ids.shape[1] :], skip_special_tokens=True)
            answers.update(zip(places, texts, strict=True))
            progress(len(places))
    return [answers[index] for index in range(len(encoded))]


@contextmanager
def _set_to(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Evaluate with these settings as the model's own: `generate` fills in from those what it is given no value for."""
    own, model.generation_config = model.generation_config, settings
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own


def _batches(order: list[int], lengths: list[int], size: int, *, mixed: bool) -> Iterator[list[int]]:
    """Cut places that are sorted by length into batches, of one length each unless they may be mixed."""
    for _, group in groupby(order, key=lambda place: None if mixed else lengths[place]):
        places = list(group)
        for start in range(0, len(places), size):
            yield places[start : start + size]
