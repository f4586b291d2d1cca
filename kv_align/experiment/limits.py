"""What the texts ask of the two models and their tokenizers, refused before training where they cannot do it.

A learned position that is not there, a token beyond the embedding or a tokenizer that does not give back what it read would
else show itself after all of the training, as a crash or as answers that are never right.
"""

from __future__ import annotations

import logging

from torch import nn
from transformers import PreTrainedModel

from kv_align.config.config import Config, warmup_of
from kv_align.data.encode import Encoded
from kv_align.data.prepared import PreparedSplit
from kv_align.evaluation.answers import gold_answer, written_answer
from kv_align.evaluation.exact_match import asked, greedy_settings, prompt_of
from kv_align.models.load import LanguageModel
from kv_align.runs.errors import ConfigError, invalid_value

LOGGER = logging.getLogger(__name__)

_SHOWN = 3  # answers named in a message


def check_limits(
    config: Config, student: LanguageModel, teacher: LanguageModel, splits: dict[str, PreparedSplit]
) -> None:
    """Check the texts of all splits, by name, against the models that read them, and the answers that will be asked for.

    Raises
    ------
    ConfigError
        If a token or a position is not there, no answer can be compared with, or the student's tokenizer cannot write one.
    """
    for role, reader in (("student", student), ("teacher", teacher)):
        texts = [text for split in splits.values() for text in (split.student if role == "student" else split.teacher)]
        name = f"model.{role}={getattr(config.model, role)}"
        _check_vocabulary(name, reader, texts)
        _check_length(config, name, reader, max(len(text.ids) for text in texts))
    evaluation = config.evaluation
    for split, limit, key in (
        (evaluation.exact_match_split, evaluation.exact_match_examples, "exact_match_examples"),
        ("validation", evaluation.exact_match_at_intervals, "exact_match_at_intervals"),
    ):
        if limit:
            _check_answers(split, splits[split], limit, key)
            _check_generation(config, student, splits[split], limit)
    _check_round_trip(config, student, splits)


def _check_vocabulary(name: str, reader: LanguageModel, texts: list[Encoded]) -> None:
    known = reader.model.get_input_embeddings().weight.shape[0]
    uses = (("writes", max(max(text.ids) for text in texts)), ("pads with", reader.pad_id))
    for verb, token in uses:
        if not 0 <= token < known:
            written = reader.tokenizer.convert_ids_to_tokens(token)
            raise ConfigError(
                f"{name} is not allowed: its tokenizer {verb} token {token} ({written}), but the model has embeddings of "
                f"0 to {known - 1}; resize its embeddings, or save it with its own tokenizer."
            )


def _check_length(config: Config, name: str, reader: LanguageModel, longest: int) -> None:
    positions = fixed_positions(reader.model)
    if positions is not None and longest > positions:
        raise invalid_value("data.max_length", config.data.max_length, f"at most {positions}, the positions of {name}")
    made_for = getattr(reader.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is None and isinstance(made_for, int) and longest > made_for > 0:
        LOGGER.warning("%s was made for %d tokens and reads texts of up to %d", name, made_for, longest)


def fixed_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model has positions for, in a table; None where it computes them as it goes."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return getattr(config, "max_seq_len", None)  # of ALiBi that is laid out once
    tables = [(name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables += [(name, buffer) for name, buffer in model.named_buffers() if buffer.dim() > 1]
    names = [(name.rpartition(".")[2], table.shape[0]) for name, table in tables]
    # Some tables have a few rows more than there are positions.
    is_table = any(limit <= rows <= limit + 8 for name, rows in names if "pos" in name or "wpe" in name)
    return int(limit) if is_table else None


def _check_answers(name: str, split: PreparedSplit, limit: int, key: str) -> None:
    """Say which answers are no numbers, and refuse to compare with none."""
    gold = [example.answer for example in split.examples if example.answer is not None][:limit]
    unread = [answer for answer in gold if gold_answer(answer, split.answers) is None]
    if not unread:
        return
    shown = ", ".join(f"{answer[:40]!r}" for answer in unread[:_SHOWN]) + (", ..." if len(unread) > _SHOWN else "")
    message = f"{len(unread)} of {len(gold)} answers of the {name} split are no numbers: {shown}"
    if len(unread) == len(gold):
        raise ConfigError(
            f"data.answers=number is not allowed: {message}; set data.answers to text, or evaluation.{key} to 0."
        )
    LOGGER.warning("%s; exact match leaves them out, with data.answers=text they are compared as texts", message)


def _check_generation(config: Config, student: LanguageModel, split: PreparedSplit, limit: int) -> None:
    places = asked(split, limit)
    if not places:
        return
    prompt, new = max(len(prompt_of(split.student[place], student.tokenizer)) for place in places), config.evaluation
    _check_written(new.max_new_tokens, split, places)
    settings = greedy_settings(student.model, student.tokenizer, new.max_new_tokens)
    LOGGER.info("exact match: greedy, up to %d tokens, ended by %s", new.max_new_tokens, settings.eos_token_id)
    positions = fixed_positions(student.model)
    if positions is not None and prompt + new.max_new_tokens - 1 > positions:
        room = positions - prompt + 1
        what = f"the {positions} positions of model.student={config.model.student} less a question of {prompt} tokens"
        raise invalid_value(
            "evaluation.max_new_tokens",
            new.max_new_tokens,
            f"at most {room}, {what}" if room > 0 else f"at most {what}, or data.max_length below that",
        )


def _check_written(limit: int, split: PreparedSplit, places: list[int]) -> None:
    """Say how many of the right answers are longer than what may be written: not even a perfect student would be right."""
    texts = [split.student[place] for place in places]
    # Without the end of the text, which nobody waits for; of one that was cut, what is left of it.
    lengths = [len(text.ids) - len(text.prompt) - (not text.cut) for text in texts]
    too_long = sum(length > limit for length in lengths)
    if too_long:
        LOGGER.warning(
            "evaluation.max_new_tokens=%d is too few for %d of %d right answers as texts have them (the longest takes %d): "
            "a student that writes like them cannot be right there; raise it, or read exact match as a share of the others",
            *(limit, too_long, len(texts), max(lengths)),
        )


def _check_round_trip(config: Config, student: LanguageModel, splits: dict[str, PreparedSplit]) -> None:
    """Refuse a tokenizer with which even a perfect student would not be right: each gold answer is written and read back."""
    kind, texts = config.data.answers, dict[str, list[int]]()
    for split in splits.values():
        for example, encoded in zip(split.examples, split.student, strict=True):
            if example.answer is not None and not encoded.cut:
                texts.setdefault(example.answer, encoded.ids[len(encoded.prompt) :])
    for answer, ids in texts.items():
        text, right = student.tokenizer.decode(ids, skip_special_tokens=True), gold_answer(answer, kind)
        if right is not None and written_answer(text, kind) != right:
            raise ConfigError(
                f"model.student={config.model.student} is not allowed: its tokenizer reads the answer {answer!r} and writes "
                f"{text[-60:]!r}, which is another; use one whose decoder gives back what it read."
            )


def check_lengths(config: Config, num_steps: int, num_validation: int) -> None:
    """Refuse what can be known to be wrong only when the data has been read."""
    asked = config.trainer.warmup_steps
    if asked >= num_steps:
        shorter = warmup_of(asked, num_steps)
        LOGGER.warning("trainer.warmup_steps=%d is shortened to %d: the run has %d steps", asked, shorter, num_steps)
    fit_steps = None if config.align is None else config.align.fit_steps
    if fit_steps is not None and fit_steps >= num_steps:
        raise invalid_value("align.fit_steps", fit_steps, f"a number below {num_steps}, the steps of this run")
    if num_validation < 2:
        raise invalid_value(
            "data", config.data.name, "a source with at least 2 validation texts: the probe needs two halves"
        )
