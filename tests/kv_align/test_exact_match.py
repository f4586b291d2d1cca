"""The number after `####`, and that a batch of prompts is answered as each of them alone."""

from decimal import Decimal

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kv_align.config.model_card import EMBEDDED
from kv_align.data.arithmetic import Arithmetic
from kv_align.data.encode import Encoded, encode
from kv_align.evaluation.exact_match import Answered, generate_answers, parse_answer
from tests.tiny import make_llama


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 72", "72"),
        ("She sold 48 + 24 = 72 clips.\n#### 72", "72"),
        ("####72", "72"),
        ("####   72  ", "72"),
        ("####\n72", "72"),
        ("#### 72.", "72"),
        ("#### 72 clips", "72"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### $18", "18"),
        ("#### $ 1,000", "1000"),
        ("#### -5", "-5"),
        ("#### - 5", "-5"),
        ("#### +5", "5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 0.5", "0.5"),
        ("#### .5", "0.5"),
        ("#### -0.25", "-0.25"),
        ("#### 50%", "50"),
        ("#### 007", "7"),
        ("#### 3 #### 4", "3"),
        ("#### 10\nHow many\n#### 11", "10"),
        ("#### 12345678901234567890123", "12345678901234567890123"),
    ],
)
def test_numbers(text, expected):
    assert parse_answer(text) == Decimal(expected)


@pytest.mark.parametrize("text", ["", "72", "#### ", "####", "### 72", "#### none", "#### about 5", "#### ,", "#### $"])
def test_no_number(text):
    assert parse_answer(text) is None


def test_numbers_are_compared_by_value():
    assert parse_answer("#### 5.0") == parse_answer("#### 5") == parse_answer("#### $5.00")
    # As decimals, in which 0.1 is a tenth.
    assert parse_answer("#### 0.1") == Decimal(1) / Decimal(10)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(EMBEDDED / "teacher")


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[Encoded]:
    encoded = encode(Arithmetic(test_examples=9).examples("test"), tokenizer, 256)
    assert len({len(each.prompt) for each in encoded}) > 4
    return encoded


def greedy(model, prompt: list[int], count: int, end: int) -> list[int]:
    """Token by token, without a cache or a mask."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 4, 9, 20])
def test_a_batch_is_answered_as_each_prompt_alone(tokenizer, prompts, batch_size):
    model, done = make_llama(vocab_size=len(tokenizer)), []
    answers = generate_answers(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=12, progress=done.append
    )
    for answer, prompt in zip(answers, prompts, strict=True):
        alone = greedy(model, prompt.prompt, 12, tokenizer.eos_token_id)
        assert answer.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert answer.number == parse_answer(answer.text)
    assert len({answer.text for answer in answers}) == 9
    assert sum(done) == 9
    assert max(done) == min(batch_size, 9)


def test_the_prompt_is_the_question_and_the_solution_is_not_shown(tokenizer, prompts):
    # The same questions with other solutions get the same answers.
    model = make_llama(vocab_size=len(tokenizer))
    others = [Encoded([*each.prompt, 40, 41], [*[1] * len(each.prompt), 2, 3], cut=True) for each in prompts]
    first, second = (
        generate_answers(model, tokenizer, each, batch_size=4, max_new_tokens=6) for each in (prompts, others)
    )
    assert first == second


def test_an_answer_ends_at_the_end_of_the_text(tokenizer, prompts):
    model, end = make_llama(vocab_size=len(tokenizer)), tokenizer.eos_token_id
    # What the model is like after three tokens of one answer; there the end of text becomes the likeliest.
    after_three = torch.tensor([[*prompts[0].prompt, *greedy(model, prompts[0].prompt, 3, end)]])
    with torch.no_grad():
        model.lm_head.weight[end] = 10 * model.base_model(input_ids=after_three).last_hidden_state[0, -1]
    expected = [greedy(model, each.prompt, 10, end) for each in prompts]
    lengths = {len(written) for written in expected}
    assert min(lengths) < max(lengths)
    answers = generate_answers(model, tokenizer, prompts, batch_size=9, max_new_tokens=10)
    assert [answer.text for answer in answers] == [
        tokenizer.decode(written, skip_special_tokens=True) for written in expected
    ]


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(tokenizer, prompts):
    model = make_llama(vocab_size=len(tokenizer))
    without = AutoTokenizer.from_pretrained(EMBEDDED / "teacher", pad_token=None)
    assert without.pad_token_id is None
    first, second = (
        generate_answers(model, each, prompts, batch_size=9, max_new_tokens=6) for each in (tokenizer, without)
    )
    assert first == second


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(tokenizer, prompts, training):
    model = make_llama(vocab_size=len(tokenizer)).train(training)
    answers = generate_answers(model, tokenizer, prompts[:2], batch_size=2, max_new_tokens=2)
    assert model.training == training
    assert all(isinstance(answer, Answered) for answer in answers)
    assert generate_answers(model, tokenizer, [], batch_size=2, max_new_tokens=2) == []
