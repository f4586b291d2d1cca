"""What a model or a tokenizer cannot do with the texts is said before anything is trained."""

import logging
from functools import cache

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from kv_align.config.compose import compose_config
from kv_align.config.config import Config
from kv_align.data.example import DataSource, Example
from kv_align.data.prepared import prepare_split
from kv_align.experiment.limits import check_limits, fixed_positions
from kv_align.models.capture.prepare import prepare
from kv_align.models.load import LanguageModel
from kv_align.runs.errors import ConfigError
from tests.families import FAMILIES
from tests.tiny import make_llama
from tests.tiny_tokenizers import byte_level, pieces, without_decoder


class Given(DataSource):
    """The same examples in every split."""

    def __init__(self, *given: Example) -> None:
        self._given = list(given)

    def examples(self, split: str) -> list[Example]:
        return self._given


@cache
def composed(*overrides: str) -> Config:
    return compose_config(overrides)[0]


PROBLEM = Example("problem", "How many pens does Ana have now?", ("12 + 34 = 46.",), "46")
TOKENIZER = byte_level(pad_token="<pad>")


def gpt2(positions: int, vocabulary: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_positions=positions, n_embd=32, n_layer=1, n_head=2, eos_token_id=1)
    ).eval()


def check(
    model: PreTrainedModel,
    *overrides: str,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    examples: tuple[Example, ...] = (PROBLEM,),
    teacher: PreTrainedModel | None = None,
) -> None:
    config = composed("evaluation.exact_match_examples=64", *overrides)
    student = LanguageModel(model, tokenizer, prepare(model, "student"))
    reads = student if teacher is None else LanguageModel(teacher, tokenizer, prepare(teacher, "teacher"))
    splits = {
        split: prepare_split(Given(*examples), split, config.data, student, reads, shuffle=False)
        for split in ("train", "validation", "test")
    }
    check_limits(config, student, reads, splits)


TEXT_LENGTH, PROMPT_LENGTH = 26, 9


def test_the_lengths_of_the_problem():
    (encoded,) = prepare_split_ids(PROBLEM)
    assert (len(encoded.ids), len(encoded.prompt)) == (TEXT_LENGTH, PROMPT_LENGTH)


def prepare_split_ids(example: Example):
    model = make_llama(vocab_size=len(TOKENIZER))
    reader = LanguageModel(model, TOKENIZER, prepare(model, "student"))
    data = composed().data
    return prepare_split(Given(example), "train", data, reader, reader, shuffle=False).student


def test_texts_beyond_the_fixed_positions_are_refused():
    size = len(TOKENIZER)
    check(gpt2(TEXT_LENGTH, size), "evaluation.max_new_tokens=4")
    sentence = (
        rf"data\.max_length=256 is not allowed: set data\.max_length to at most {TEXT_LENGTH - 1}, the positions of "
    )
    with pytest.raises(ConfigError, match=sentence + r"model\.student=embedded"):
        check(gpt2(TEXT_LENGTH - 1, size), "evaluation.max_new_tokens=4")
    with pytest.raises(ConfigError, match=r"the positions of model\.teacher=embedded"):
        check(make_llama(vocab_size=size), teacher=gpt2(TEXT_LENGTH - 1, size))
    check(gpt2(TEXT_LENGTH - 1, size), "evaluation.max_new_tokens=4", f"data.max_length={TEXT_LENGTH - 1}")


def test_positions_that_run_out_in_generation_are_refused():
    size = len(TOKENIZER)
    room = 64 - PROMPT_LENGTH + 1  # the last token is not read
    check(gpt2(64, size), f"evaluation.max_new_tokens={room}")
    with pytest.raises(
        ConfigError, match=rf"evaluation\.max_new_tokens={room + 1} is not allowed: .* at most {room}, the 64"
    ):
        check(gpt2(64, size), f"evaluation.max_new_tokens={room + 1}")
    check(gpt2(64, size), "evaluation.max_new_tokens=1000", "evaluation.exact_match_examples=0")
    with pytest.raises(ConfigError, match=r"evaluation\.max_new_tokens=96 is not allowed"):
        check(gpt2(64, size), "evaluation.exact_match_examples=0", "evaluation.exact_match_at_intervals=2")
    # What is computed as it goes does not run out.
    check(make_llama(vocab_size=size), "evaluation.max_new_tokens=1000")


def test_right_answers_that_are_longer_than_what_may_be_written_are_counted(caplog):
    takes = TEXT_LENGTH - PROMPT_LENGTH - 1  # the end of the text need not be written
    model = make_llama(vocab_size=len(TOKENIZER))
    check(model, f"evaluation.max_new_tokens={takes}")
    assert "is too few for" not in caplog.text
    check(model, f"evaluation.max_new_tokens={takes - 1}")
    assert f"evaluation.max_new_tokens={takes - 1} is too few for 1 of 1 right answers" in caplog.text
    assert f"(the longest takes {takes})" in caplog.text
    caplog.clear()
    check(model, "evaluation.max_new_tokens=4", f"data.max_length={PROMPT_LENGTH + 5}")
    assert "is too few for 1 of 1 right answers as texts have them (the longest takes 5)" in caplog.text


def test_positions_that_a_model_was_not_made_for_are_said(caplog):
    model = make_llama(vocab_size=len(TOKENIZER))
    model.config.max_position_embeddings = TEXT_LENGTH - 1
    with caplog.at_level(logging.WARNING):
        check(model)
    assert (
        f"model.student=embedded was made for {TEXT_LENGTH - 1} tokens and reads texts of up to {TEXT_LENGTH}"
        in caplog.text
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_which_models_have_positions_that_run_out(family):
    model = FAMILIES[family].make()
    ids = torch.randint(3, 60, (1, 257), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        assert fixed_positions(model) == 256
    else:
        assert fixed_positions(model) is None


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (1, r"model\.student=embedded is not allowed: its tokenizer pads with token \d+ \(<pad>\), but the model has"),
        (2, r"model\.student=embedded is not allowed: its tokenizer writes token \d+ \(.+\), but the model has"),
    ],
)
def test_tokens_beyond_the_embedding_are_refused(missing, sentence):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    example = Example("x", "How many <extra>?", ("1",), "46")
    check(make_llama(vocab_size=len(tokenizer)), tokenizer=tokenizer, examples=(example,))
    with pytest.raises(ConfigError, match=sentence):
        check(make_llama(vocab_size=len(tokenizer) - missing), tokenizer=tokenizer, examples=(example,))


def test_a_tokenizer_that_does_not_give_back_an_answer_is_refused():
    for tokenizer in (byte_level(), pieces(line_breaks=False), pieces(line_breaks=True)):
        for rationale in ("full", "none"):
            check(make_llama(vocab_size=len(tokenizer)), f"data.rationale={rationale}", tokenizer=tokenizer)
    tokenizer = without_decoder()
    with pytest.raises(
        ConfigError, match=r"model\.student=embedded is not allowed: its tokenizer reads the answer '46' and writes"
    ):
        check(make_llama(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    # One whose vocabulary lacks a digit.
    unknown = Example("x", "?", ("12 = 34.",), "Ω")
    tokenizer = pieces(line_breaks=False)
    with pytest.raises(ConfigError, match="its tokenizer reads the answer 'Ω'"):
        check(make_llama(vocab_size=len(tokenizer)), "data.answers=text", tokenizer=tokenizer, examples=(unknown,))


def answered(*answers: str) -> tuple[Example, ...]:
    return tuple(Example(f"e{number}", "How many?", ("1",), answer) for number, answer in enumerate(answers))


def test_answers_that_are_no_numbers_are_counted_and_named(caplog):
    model = make_llama(vocab_size=len(TOKENIZER))
    with caplog.at_level(logging.WARNING):
        check(model, examples=answered("1", "twelve", "2", "5 pens", "1/0", "-"))
    assert (
        "4 of 6 answers of the test split are no numbers: 'twelve', '5 pens', '1/0', ...; exact match leaves"
        in caplog.text
    )
    caplog.clear()
    check(model, "data.answers=text", examples=answered("1", "twelve", "Paris, France"))
    check(model, examples=answered("1", "1/2", "\u22125"))
    assert caplog.text == ""
    with pytest.raises(
        ConfigError, match=r"data\.answers=number is not allowed: 2 of 2 answers of the test split are no numbers"
    ):
        check(model, examples=answered("a", "b"))
    check(model, "evaluation.exact_match_examples=0", examples=answered("a", "b"))


def test_texts_without_answers_and_without_questions_are_fine():
    model = make_llama(vocab_size=len(TOKENIZER))
    check(model, examples=(Example("x", "", ("Just a text.",), None),))
    check(gpt2(64, len(TOKENIZER)), "evaluation.max_new_tokens=8", examples=(Example("x", "", ("1",), "46"),))
