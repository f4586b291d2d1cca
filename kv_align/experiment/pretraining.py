"""A tokenizer, a teacher and a student start, trained as plain language models; knows nothing of keys and values."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from kv_align.config.config import LlamaShape, PretrainConfig, warmup_of
from kv_align.data.batch import DataOrder, pad
from kv_align.data.encode import Encoded, encode
from kv_align.data.example import DataSource, Example, Segment
from kv_align.evaluation.answers import AnswerKind, gold_answer, written_answer
from kv_align.evaluation.exact_match import generate_answers
from kv_align.experiment.choices import make
from kv_align.experiment.quiet import quiet_libraries
from kv_align.losses.predictions.linear_head import predictions_of, row_losses
from kv_align.losses.predictions.next_token import CrossEntropy
from kv_align.models.head import find_head
from kv_align.runs.errors import ConfigError, invalid_value
from kv_align.runs.progress import progress_bar
from kv_align.runs.run_dir import file_digest, give_usual_mode, write_json

LOGGER = logging.getLogger(__name__)
END, PAD = "<|end|>", "<|pad|>"
_SMALLEST_VOCABULARY = 256 + 2


def train_tokenizer(examples: list[Example], vocabulary_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is its own token, so that numbers are written the same everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("".join(text for _, text in e.segments()) for e in examples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=max_length
    )


def build_llama(shape: LlamaShape, vocabulary_size: int, max_length: int, end_id: int, seed: int) -> LlamaForCausalLM:
    """Return a randomly initialised Llama with grouped queries and tied embeddings; a function of its arguments."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id + 1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def fit(
    model: LlamaForCausalLM, encoded: list[Encoded], pad_id: int, config: PretrainConfig, shape: LlamaShape, label: str
) -> Iterator[tuple[int, float]]:
    """Train as a language model on whole texts; yields (step, mean cross-entropy in nats per token)."""
    order = DataOrder(len(encoded), config.batch_size, config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_of(config.warmup_steps, shape.steps), shape.steps)
    model.train()
    head = find_head(model)
    assert head is not None  # a plain Llama has one
    with progress_bar(label, shape.steps) as advance:
        for step in range(shape.steps):
            tokens = pad([encoded[i] for i in order[step]], pad_id)
            # Whole texts: the question is learned too.
            tokens = replace(tokens, segments=torch.full_like(tokens.segments, Segment.REASONING)).to(model.device)
            output = model.base_model(**tokens.inputs, use_cache=False)
            predictions = predictions_of(output, head).at(tokens.predicting)
            loss = row_losses(predictions, [CrossEntropy(tokens.predicted)]).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1, f"loss {loss.item():.3f}")
            if step % 100 == 0:
                LOGGER.info("%s: step %d of %d, cross-entropy %.3f", label, step, shape.steps, loss.item())
            yield step, loss.item()


def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    max_length: int,
    kind: AnswerKind,
) -> float | None:
    """Share of examples whose generated answer is the right one; None where there are none."""
    encoded = encode(examples, tokenizer, max_length)
    with progress_bar("exact match", len(examples)) as advance:
        answers = generate_answers(
            model, tokenizer, encoded, batch_size=64, max_new_tokens=max_length // 2, progress=advance
        )
    right = [
        written_answer(text, kind) == gold_answer(str(example.answer), kind)
        for text, example in zip(answers, examples, strict=True)
    ]
    return sum(right) / len(right) if right else None


def check(config: PretrainConfig) -> None:
    """Refuse what cannot be made, before anything is read or trained.

    Raises
    ------
    ConfigError
        If `output_dir` already holds models or cannot be written to, or a shape is none that a Llama can have.
    """
    if not config.output_dir.strip():
        raise invalid_value("output_dir", repr(config.output_dir), "the name of a folder, such as outputs/pretrained")
    output_dir = Path(config.output_dir)
    if (output_dir / "recipe.json").exists():
        raise ConfigError(f"output_dir={output_dir} already holds a finished recipe: name another folder.")
    for role in ("teacher", "student"):
        if (output_dir / role).exists():
            raise ConfigError(f"output_dir={output_dir} already holds a {role}: remove it, or name another folder.")
    if config.vocabulary_size < _SMALLEST_VOCABULARY:
        allowed = f"at least {_SMALLEST_VOCABULARY}: all bytes, {END} and {PAD}"
        raise invalid_value("vocabulary_size", config.vocabulary_size, allowed)
    if config.data.max_length < 2:
        raise invalid_value(
            "data.max_length", config.data.max_length, "at least 2: each token is predicted from another"
        )
    for role, shape in (("teacher", config.teacher), ("student", config.student)):
        if shape.num_heads % shape.num_key_value_heads:
            allowed = f"a divisor of {role}.num_heads={shape.num_heads}"
            raise invalid_value(f"{role}.num_key_value_heads", shape.num_key_value_heads, allowed)
        if shape.head_dim % 2:
            raise invalid_value(f"{role}.head_dim", shape.head_dim, "an even number: rotary embeddings turn pairs")
        if config.warmup_steps >= shape.steps:
            shorter = warmup_of(config.warmup_steps, shape.steps)
            LOGGER.warning(
                "warmup_steps=%d is shortened to %d: %s.steps=%d", config.warmup_steps, shorter, role, shape.steps
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "teacher").mkdir()
        (output_dir / "teacher").rmdir()
    except OSError as error:
        raise ConfigError(
            f"output_dir={output_dir} cannot be written to ({error.strerror}): name a folder that can."
        ) from error


def read_texts(config: PretrainConfig) -> tuple[list[Example], list[Example]]:
    """Return what is trained on, and the questions with answers that what was learned is tried on.

    Raises
    ------
    ConfigError
        If the texts cannot be read, are fewer than a batch, or are conversations.
    """
    source: DataSource = make(config.data)
    try:
        train, held_out = source.examples("train"), source.examples("validation")
    except (ValueError, OSError) as error:
        raise ConfigError(f"data={config.data.name} cannot be read: {error}.") from error
    if any(example.turns for example in train):
        raise ConfigError(
            f"data={config.data.name} is not allowed here: its conversations need a chat template, which the tokenizer that "
            "is trained has not; name a column of plain texts."
        )
    if len(train) < config.batch_size:
        raise invalid_value("batch_size", config.batch_size, f"at most {len(train)}, the texts to train on")
    kind = config.data.answers
    answered = [each for each in held_out if each.answer is not None and gold_answer(each.answer, kind) is not None]
    return train, answered[: config.evaluation_examples]


def pretrain(config: PretrainConfig) -> None:
    """Make the tokenizer and both models, and write them and `recipe.json`, what came out, to `output_dir`.

    Raises
    ------
    ConfigError
        As `check` and `read_texts`.
    """
    check(config)
    quiet_libraries()
    train, held_out = read_texts(config)
    output_dir = Path(config.output_dir)
    tokenizer = train_tokenizer(train, config.vocabulary_size, config.data.max_length)
    encoded = encode(train, tokenizer, config.data.max_length)
    report: dict[str, object] = {"config": config.model_dump(), "torch": str(torch.__version__)}
    for role, shape in (("teacher", config.teacher), ("student", config.student)):
        model = build_llama(shape, len(tokenizer), config.data.max_length, tokenizer.eos_token_id, config.seed)
        losses = [loss for _, loss in fit(model, encoded, tokenizer.pad_token_id, config, shape, role)]
        model = model.to(torch.bfloat16)
        model.save_pretrained(output_dir / role)
        tokenizer.save_pretrained(output_dir / role)
        give_usual_mode(*(output_dir / role).glob("*.safetensors"))
        loss = sum(losses[-50:]) / len(losses[-50:])
        report[role] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "train_perplexity": math.exp(loss),
            "exact_match": exact_match(model.float(), tokenizer, held_out, config.data.max_length, config.data.answers),
            "exact_match_examples": len(held_out),
            "sha256": file_digest(output_dir / role / "model.safetensors"),
        }
        print(role, json.dumps(report[role]))
    write_json(output_dir / "recipe.json", report)
