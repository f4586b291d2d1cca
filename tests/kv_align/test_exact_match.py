"""Greedy means greedy, and a batch of prompts is answered as each of them alone."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kv_align.config.model_card import EMBEDDED
from kv_align.data.arithmetic import Arithmetic
from kv_align.data.encode import Encoded, encode
from kv_align.data.example import Example
from kv_align.evaluation.exact_match import generate_answers, greedy_settings
from kv_align.models.padding import pads_left
from tests.every_decoder import shrunk
from tests.tiny import make_llama


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(EMBEDDED / "teacher")


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[Encoded]:
    encoded = encode(Arithmetic(test_examples=9).examples("test"), tokenizer, 256)
    assert len({len(each.prompt) for each in encoded}) > 4
    return encoded


def greedy(model, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """Token by token, without a cache or a mask."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def alone(model, tokenizer, encoded: list[Encoded], count: int) -> list[str]:
    """The answers to prompts one by one."""
    ends = {tokenizer.eos_token_id}
    written = [greedy(model, each.prompt, count, ends) for each in encoded]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_a_batch_is_answered_as_each_prompt_alone(tokenizer, prompts, batch_size):
    model, done = make_llama(vocab_size=len(tokenizer)), []
    answers = generate_answers(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=12, progress=done.append
    )
    assert answers == alone(model, tokenizer, prompts, 12)
    assert len(set(answers)) == 9
    assert sum(done) == 9
    assert max(done) == min(batch_size, 9)


# What makers of checkpoints ask for in generation_config.json, each of which changes what `generate` writes by itself.
OWN_SETTINGS = {
    "repetition": {"repetition_penalty": 5.0},
    "n-grams": {"no_repeat_ngram_size": 1},
    "beams": {"num_beams": 4, "length_penalty": 3.0, "early_stopping": True},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 0},
    "forced": {"forced_bos_token_id": 30, "forced_eos_token_id": 31},
    "suppressed": {"suppress_tokens": list(range(2, 300)), "begin_suppress_tokens": [40, 41]},
    "bad words": {"bad_words_ids": [[each] for each in range(2, 300)]},
    "biased": {"sequence_bias": [[[35], 100.0]]},
    "long": {"min_new_tokens": 12, "max_length": 3},
    "guided": {"guidance_scale": 4.0},
    "looked up": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "whole": {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 1},
    "ended": {"eos_token_id": [0, *range(20, 300)], "pad_token_id": 7, "stop_strings": ["a"]},
}


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("student")
    make_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("own", OWN_SETTINGS)
def test_what_a_checkpoint_asks_for_in_generation_changes_no_answer(tmp_path, student, tokenizer, prompts, own):
    copy = shutil.copytree(student, tmp_path / "copy")
    settings = {"_from_model_config": False, "transformers_version": "5.0.0", **OWN_SETTINGS[own]}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(copy)
    before = model.generation_config
    answers = generate_answers(model, tokenizer, prompts, batch_size=9, max_new_tokens=8)
    assert answers == alone(model, tokenizer, prompts, 8)
    assert model.generation_config is before
    for name, value in OWN_SETTINGS[own].items():
        assert getattr(before, name) == value


def test_an_answer_ends_where_the_tokenizer_or_the_models_configuration_says(tokenizer, prompts):
    model, end = make_llama(vocab_size=len(tokenizer)), tokenizer.eos_token_id
    whole = greedy(model, prompts[0].prompt, 8, set())
    cut = tokenizer.decode(whole[: whole.index(whole[3])])
    talking = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")
    talking.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(whole[3])]})
    for of_model in (whole[3], [whole[3], 299]):
        model.config.eos_token_id = of_model
        assert greedy_settings(model, talking, 8).eos_token_id == sorted([end, whole[3]])
        assert generate_answers(model, talking, prompts[:1], batch_size=1, max_new_tokens=8) == [cut]
        # A token like any other, as the default of an architecture may be, ends nothing.
        assert greedy_settings(model, tokenizer, 8).eos_token_id == [end]
        assert generate_answers(model, tokenizer, prompts[:1], batch_size=1, max_new_tokens=8) == [
            tokenizer.decode(whole)
        ]
    model.config.eos_token_id = None
    assert greedy_settings(model, talking, 8).eos_token_id == [end]


def test_prompts_may_be_empty_some_or_all_of_them(tokenizer, prompts):
    model = make_llama(vocab_size=len(tokenizer))
    empty = encode([Example("empty", "", ("one",), "1")], tokenizer, 256)
    assert empty[0].prompt == []
    # A text begins after the one before it.
    expected = tokenizer.decode(
        greedy(model, [tokenizer.eos_token_id], 6, {tokenizer.eos_token_id}), skip_special_tokens=True
    )
    only = generate_answers(model, tokenizer, empty * 3, batch_size=2, max_new_tokens=6)
    assert only == [expected] * 3
    mixed = generate_answers(model, tokenizer, [prompts[0], *empty], batch_size=2, max_new_tokens=6)
    assert mixed == [*alone(model, tokenizer, prompts[:1], 6), expected]


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
    after_three = torch.tensor([[*prompts[0].prompt, *greedy(model, prompts[0].prompt, 3, {end})]])
    with torch.no_grad():
        model.lm_head.weight[end] = 10 * model.base_model(input_ids=after_three).last_hidden_state[0, -1]
    lengths = {len(greedy(model, each.prompt, 10, {end})) for each in prompts}
    assert min(lengths) < max(lengths)
    answers = generate_answers(model, tokenizer, prompts, batch_size=9, max_new_tokens=10)
    assert answers == alone(model, tokenizer, prompts, 10)


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
    assert len(generate_answers(model, tokenizer, prompts[:2], batch_size=2, max_new_tokens=2)) == 2
    assert model.training == training
    assert generate_answers(model, tokenizer, [], batch_size=2, max_new_tokens=2) == []

    def leave(answered: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_answers(model, tokenizer, prompts[:2], batch_size=2, max_new_tokens=2, progress=leave)
    assert model.training == training


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "pads"), [("llama", True), ("bloom", True), ("gpt2", True), ("bart", False), ("roberta", False)]
)
def test_a_model_that_counts_positions_from_the_padding_on_answers_as_alone(family, pads, tokenizer, prompts):
    kind = CONFIG_MAPPING[family]
    shape = shrunk(kind(), {}) | {"vocab_size": len(tokenizer), "is_decoder": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    assert pads_left(model) is pads
    several = sorted(prompts[:6], key=lambda each: len(each.prompt))
    assert len({len(each.prompt) for each in several}) > 1
    answers = generate_answers(model, tokenizer, several, batch_size=4, max_new_tokens=5)
    singly = [generate_answers(model, tokenizer, [each], batch_size=1, max_new_tokens=5) for each in several]
    assert answers == [answer for (answer,) in singly]
