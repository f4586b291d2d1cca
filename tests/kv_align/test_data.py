"""Texts, tokens and batches: golden problems, splits that do not meet, segments that are where the text has them."""

import hashlib
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kv_align.config.config import DataConfig
from kv_align.config.model_card import EMBEDDED
from kv_align.data.arithmetic import Arithmetic, stream_of
from kv_align.data.batch import Collator, DataOrder, pad
from kv_align.data.encode import Encoded, encode
from kv_align.data.example import DataSource, Example, Segment
from kv_align.data.prepared import prepare_split, same_tokenizer
from kv_align.evaluation.answers import read_number
from kv_align.models.capture.prepare import prepare
from kv_align.models.load import LanguageModel
from kv_align.runs.errors import ConfigError
from tests.tiny import make_llama

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SPLITS = ("train", "validation", "test")
Q, R, A = (int(segment) for segment in (Segment.QUESTION, Segment.REASONING, Segment.ANSWER))


# Generated word problems

THOUSAND = Arithmetic(train_examples=1000, validation_examples=1000, test_examples=1000)
# Of the generator as it was first released: the embedded teacher was pretrained on these streams, and every result
# reported so far is on them. A change of the generator is a new data set and needs new models.
FIRST = {
    "train": Example(
        "train-0",
        "Hugo has 23 cups. Hugo wins 18 more cups. Hugo wins 15 more cups. Hugo gives away 2 of them. "
        "Hugo breaks 38 of them. Hugo keeps one of 2 equal parts. How many cups does Hugo have now?",
        ("23 + 18 = 41.", "41 + 15 = 56.", "56 - 2 = 54.", "54 - 38 = 16.", "16 / 2 = 8."),
        "8",
    ),
    "validation": Example(
        "validation-0",
        "Olga has 17 cards. A friend makes it 2 times as many. Olga wins 31 more cards. A friend makes it 3 times as "
        "many. Olga keeps one of 3 equal parts. Olga buys 25 more cards. How many cards does Olga have now?",
        ("17 * 2 = 34.", "34 + 31 = 65.", "65 * 3 = 195.", "195 / 3 = 65.", "65 + 25 = 90."),
        "90",
    ),
    "test": Example(
        "test-0",
        "Ben has 34 cards. Ben wins 25 more cards. Ben wins 25 more cards. Ben buys 36 more cards. "
        "How many cards does Ben have now?",
        ("34 + 25 = 59.", "59 + 25 = 84.", "84 + 36 = 120."),
        "120",
    ),
}
SHA256_OF_1000 = {
    "train": "5075b4cb8f7a4ac2bc0c9c685a2b37b19bfb3aaf4292eb401bbb912319560928",
    "validation": "ad1a5bebb6ce160712cfc1f0aeab36caa9ccf27aff52e6f52de4fbc099dbd9da",
    "test": "b3db23865e04f05a104112e45036f364fa1b98062d9c500cfcde27895fac0db9",
}


@pytest.mark.parametrize("split", SPLITS)
def test_generated_problems_are_golden(split):
    examples = THOUSAND.examples(split)
    assert examples[0] == FIRST[split]
    whole = "\n\n".join("\n".join((each.id, each.question, *each.steps, each.answer)) for each in examples)
    assert hashlib.sha256(whole.encode()).hexdigest() == SHA256_OF_1000[split]


def test_streams_are_disjoint_and_say_where_they_belong():
    questions = {split: {example.question for example in THOUSAND.examples(split)} for split in SPLITS}
    assert not questions["train"] & questions["validation"]
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & questions["test"]
    for split in SPLITS:
        assert {stream_of(question) for question in questions[split]} == {split}
        assert len(questions[split]) > 950
        assert len({example.id for example in THOUSAND.examples(split)}) == 1000


def test_a_larger_split_starts_with_a_smaller_one():
    few = Arithmetic(train_examples=7, validation_examples=1, test_examples=1).examples("train")
    assert few == THOUSAND.examples("train")[:7]


@pytest.mark.parametrize("split", SPLITS)
def test_every_solution_is_arithmetically_right(split):
    lengths = set()
    for example in THOUSAND.examples(split):
        total = int(re.match(r"\w+ has (\d+) \w+\.", example.question).group(1))
        for step in example.steps:
            left, operation, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", step).groups()
            assert int(left) == total
            exact = {
                "+": Fraction(left) + Fraction(right),
                "-": Fraction(left) - Fraction(right),
                "*": Fraction(left) * Fraction(right),
                "/": Fraction(left) / Fraction(right),
            }[operation]
            assert exact == int(result)
            total = int(result)
            assert 1 <= total <= 200
        assert example.answer == str(total)
        # The story tells each step once, in order: its numbers are those of the solution.
        told = [int(number) for number in re.findall(r"\d+", example.question)][1:]
        assert told == [int(re.findall(r"\d+", step)[1]) for step in example.steps]
        lengths.add(len(example.steps))
    assert lengths == {2, 3, 4, 5}


def test_steps_are_as_many_as_asked_for():
    examples = Arithmetic(train_examples=50, min_steps=3, max_steps=3).examples("train")
    assert {len(example.steps) for example in examples} == {3}
    with pytest.raises(ValueError, match=r"data\.min_steps=4 is above data\.max_steps=3"):
        Arithmetic(min_steps=4, max_steps=3)
    with pytest.raises(ValueError, match=r"data\.max_steps=1001 is above 1000, more than anybody reads: lower it"):
        Arithmetic(max_steps=1001)


# How a text is written down


def test_the_parts_of_a_text_by_hand():
    example = Example("x", "How many?", ("1 + 1 = 2.", "2 + 1 = 3."), "3")
    assert example.segments() == [
        (Segment.QUESTION, "How many?\n"),
        (Segment.REASONING, "1 + 1 = 2.\n2 + 1 = 3.\n"),
        (Segment.ANSWER, "#### 3"),
    ]
    assert Example("x", "", ("plain text",), None).segments() == [(Segment.REASONING, "plain text")]
    assert Example("x", "How many?", (), "3").segments()[1:] == [(Segment.ANSWER, "#### 3")]
    assert Example("x", "How many?", (), "").segments()[-1] == (Segment.ANSWER, "#### ")


def test_rationales_by_hand():
    example = Example("x", "q", ("1", "2", "3", "4", "5"), "5")
    assert example.with_rationale("full", 2) == example
    assert example.with_rationale("short", 2).steps == ("2", "4")
    assert example.with_rationale("short", 3).steps == ("3",)
    assert example.with_rationale("short", 1).steps == example.steps
    assert example.with_rationale("short", 9).steps == ()
    assert example.with_rationale("none", 2).steps == ()
    for rationale in ("full", "short", "none"):
        seen = example.with_rationale(rationale, 2)
        assert (seen.id, seen.question, seen.answer) == ("x", "q", "5")


# Tokens


@pytest.fixture(scope="module")
def embedded() -> PreTrainedTokenizerFast:
    """Digits singly, no beginning-of-text token, padding apart from the end of text."""
    return AutoTokenizer.from_pretrained(EMBEDDED / "teacher")


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    """Bytes, a beginning-of-text token, no padding token, and offsets that leave out spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["".join(part for _, part in example.segments()) for example in THOUSAND.examples("train")[:100]]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


both_tokenizers = pytest.mark.parametrize("name", ["embedded", "trained"])
AWKWARD = [
    Example("spaces", "  How   many? ", ("It is  2.", " Then 3. "), "3"),
    Example("letters", "Wie viele Äpfel — 𝟙 oder 2 🍎?", ("Ein 🍎 und «ein» 🍎.",), "-2.5"),
    Example("no steps", "How many apples", (), "12"),
    Example("no question", "", ("Just a text that ends in a word",), None),
    Example("no answer", "How many?", ("one",), None),
    Example("empty answer", "How many?", ("one",), ""),
    Example("only an answer", "", (), "7"),
]


@both_tokenizers
def test_segments_are_where_the_text_has_them(name, request):
    tokenizer = request.getfixturevalue(name)
    examples = [*THOUSAND.examples("validation")[:50], *AWKWARD]
    for example, encoded in zip(examples, encode(examples, tokenizer, 512), strict=True):
        assert not encoded.cut
        begin = 1 if name == "trained" else 0
        assert encoded.ids[:begin] == [tokenizer.bos_token_id] * begin
        assert encoded.ids[-1] == tokenizer.eos_token_id
        for segment, text in example.segments():
            inside = [
                token
                for token, its in zip(encoded.ids[begin:-1], encoded.segments[begin:-1], strict=True)
                if its == segment
            ]
            assert tokenizer.decode(inside) == text, example.id
        # Special tokens belong to the segment beside them.
        assert encoded.segments[0] == example.segments()[0][0]
        assert encoded.segments[-1] == example.segments()[-1][0]
        assert encoded.segments == sorted(encoded.segments)


@both_tokenizers
def test_the_prompt_is_a_prefix_and_is_the_question(name, request):
    tokenizer = request.getfixturevalue(name)
    examples = THOUSAND.examples("test")[:50]
    for example, encoded in zip(examples, encode(examples, tokenizer, 512), strict=True):
        assert encoded.ids[: len(encoded.prompt)] == encoded.prompt
        text = tokenizer.decode(encoded.prompt, skip_special_tokens=True)
        assert text == f"{example.question}\n"
        shortened = encode([example.with_rationale("none", 1)], tokenizer, 512)[0]
        assert shortened.prompt == encoded.prompt


@both_tokenizers
def test_texts_beyond_the_limit_are_cut_at_their_end(name, request):
    tokenizer = request.getfixturevalue(name)
    example = THOUSAND.examples("train")[0]
    whole = encode([example], tokenizer, 512)[0]
    exact, cut, question = (
        encode([example], tokenizer, length)[0] for length in (len(whole.ids), len(whole.ids) - 1, 3)
    )
    assert exact == whole
    assert cut == Encoded(whole.ids[:-1], whole.segments[:-1], cut=True)
    assert tokenizer.eos_token_id not in cut.ids
    assert question == Encoded(whole.ids[:3], [Q] * 3, cut=True)


@both_tokenizers
def test_a_text_without_anything_in_it_has_nothing_to_score(name, request):
    # Plain text whose only step a shortened rationale leaves out.
    tokenizer = request.getfixturevalue(name)
    empty = Example("x", "", ("text",), None).with_rationale("none", 1)
    (encoded,) = encode([empty], tokenizer, 512)
    assert set(encoded.segments) == {Q}
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert encode([], tokenizer, 512) == []


# Batches

FIRST_TEXT = Encoded([5, 6, 7, 8, 9, 0], [Q, Q, R, R, A, A], cut=False)
SECOND_TEXT = Encoded([4, 3, 0], [Q, A, A], cut=False)


def test_padding_by_hand():
    right, left = (pad([FIRST_TEXT, SECOND_TEXT], 99, side=side) for side in ("right", "left"))
    assert right.ids.tolist() == [[5, 6, 7, 8, 9, 0], [4, 3, 0, 99, 99, 99]]
    assert right.mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert right.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0]]
    assert right.segments.tolist() == [[1, 1, 2, 2, 3, 3], [1, 3, 3, 0, 0, 0]]
    assert left.ids.tolist() == [[5, 6, 7, 8, 9, 0], [99, 99, 99, 4, 3, 0]]
    assert left.mask.tolist() == [[True] * 6, [False] * 3 + [True] * 3]
    assert left.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]]
    assert left.segments.tolist() == [[1, 1, 2, 2, 3, 3], [0, 0, 0, 1, 3, 3]]


@PROPERTY
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=4), st.integers(0, 9))
def test_the_mask_alone_says_what_is_padding(texts, pad_id):
    encoded = [Encoded(ids, [Q] * len(ids), cut=False) for ids in texts]
    for side in ("left", "right"):
        tokens = pad(encoded, pad_id, side=side)
        assert [row[mask].tolist() for row, mask in zip(tokens.ids, tokens.mask, strict=True)] == texts
        assert torch.equal(tokens.mask, tokens.segments != 0)
        assert torch.equal(tokens.positions[tokens.mask], (tokens.mask.cumsum(1) - 1)[tokens.mask])


def test_the_end_of_text_stays_scored_where_it_is_also_the_padding():
    batch = Collator(texts := [FIRST_TEXT, SECOND_TEXT], texts, student_pad_id=0, teacher_pad_id=0)([0, 1])
    assert batch.student.ids[1].tolist() == [4, 3, 0, 0, 0, 0]
    assert batch.scored.tolist() == [[False, False, True, True, True, True], [False, True, True, False, False, False]]
    assert batch.student.mask[1].tolist() == [True] * 3 + [False] * 3


def test_a_collated_batch_by_hand():
    texts = [FIRST_TEXT, SECOND_TEXT, Encoded([8, 8], [R, R], cut=True)]
    batch = Collator(texts, texts, student_pad_id=1, teacher_pad_id=1)([2, 0])
    assert batch.indices == (2, 0)
    assert batch.teacher is batch.student
    assert batch.correspondence.same_time
    # The first token of a text has nothing before it to be predicted from.
    assert batch.scored.tolist() == [[False, True, *[False] * 4], [False, False, True, True, True, True]]
    assert torch.equal(batch.aligned, batch.student.mask)


def test_what_is_aligned_where_the_teacher_reads_something_else():
    student = [FIRST_TEXT, SECOND_TEXT]
    teacher = [
        Encoded([5, 6, 9, 9, 9], [Q, Q, A, A, A], cut=False),
        Encoded([4, 2, 2, 3, 0], [Q, R, R, A, A], cut=False),
    ]
    batch = Collator(student, teacher, student_pad_id=1, teacher_pad_id=2)([0, 1])
    assert not batch.correspondence.same_time
    # The first teacher text has no reasoning; the second student text has none either, and needs none.
    assert batch.aligned.tolist() == [[True, True, False, False, True, True], [True] * 3 + [False] * 3]
    assert batch.teacher.ids.shape == (2, 5)
    # The same layout from another tokenizer needs no resampling.
    other = [Encoded([each + 1 for each in text.ids], text.segments, cut=False) for text in student]
    assert Collator(student, other, student_pad_id=1, teacher_pad_id=2)([0, 1]).correspondence.same_time


def test_shuffling_gives_each_text_the_teachers_next_one():
    texts = [Encoded([number] * (number + 2), [Q, *[A] * (number + 1)], cut=False) for number in range(4)]
    batch = Collator(texts, texts, student_pad_id=9, teacher_pad_id=9, shuffle_teacher=True)([3, 0, 2])
    assert batch.student.ids[:, 0].tolist() == [3, 0, 2]
    assert batch.teacher.ids[:, 0].tolist() == [0, 2, 3]
    assert batch.indices == (3, 0, 2)
    assert not batch.correspondence.same_time


def test_moving_a_batch_keeps_what_is_shared_shared():
    texts = [FIRST_TEXT, SECOND_TEXT]
    batch = Collator(texts, texts, student_pad_id=1, teacher_pad_id=1)([0, 1]).to(torch.device("cpu"))
    assert batch.teacher is batch.student
    apart = Collator(texts, list(texts), student_pad_id=1, teacher_pad_id=2)([0, 1]).to(torch.device("cpu"))
    assert apart.teacher.ids[1].tolist() == [4, 3, 0, 2, 2, 2]
    assert apart.student.ids[1].tolist() == [4, 3, 0, 1, 1, 1]


# A split as both models read it


class Given(DataSource):
    """Examples made by a test."""

    def __init__(self, *given: Example) -> None:
        self._given = list(given)

    def examples(self, split: str) -> list[Example]:
        assert split == "train"
        return self._given


def reader_with(tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    model = make_llama(vocab_size=len(tokenizer))
    return LanguageModel(model, tokenizer, prepare(model, "student"))


def read_as(rationale: str, *, max_length: int = 256) -> DataConfig:
    return DataConfig(
        name="given",
        target="given",
        max_length=max_length,
        rationale=rationale,
        rationale_every=2,
        shuffle_teacher=False,
    )


PROBLEMS = THOUSAND.examples("train")[:6]


def test_a_split_read_alike_is_tokenised_once(embedded):
    reader = reader_with(embedded)
    split = prepare_split(Given(*PROBLEMS), "train", read_as("full"), reader, reader, shuffle=False)
    assert split.teacher is split.student
    assert split.student == encode(PROBLEMS, embedded, 256)
    assert split.ids == [example.id for example in PROBLEMS]
    assert (split.dropped, split.cut, split.teacher_cut) == (0, 0, 0)
    assert split.collate([1, 4]).teacher.ids[0].tolist()[:3] == split.student[1].ids[:3]


@pytest.mark.parametrize("rationale", ["short", "none"])
def test_the_teacher_reads_all_of_a_rationale_that_the_student_does_not(embedded, rationale):
    reader = reader_with(embedded)
    split = prepare_split(Given(*PROBLEMS), "train", read_as(rationale), reader, reader, shuffle=False)
    assert split.examples == PROBLEMS
    assert split.teacher == encode(PROBLEMS, embedded, 256)
    assert split.student == encode([example.with_rationale(rationale, 2) for example in PROBLEMS], embedded, 256)
    assert all(len(ours.ids) < len(theirs.ids) for ours, theirs in zip(split.student, split.teacher, strict=True))


def test_a_short_rationale_is_not_stretched_over_a_part_of_the_teachers(embedded):
    reader, problems = reader_with(embedded), Arithmetic(train_examples=3, min_steps=5, max_steps=5).examples("train")
    long, short = (
        prepare_split(Given(*problems), "train", read_as("short", max_length=length), reader, reader, shuffle=False)
        for length in (256, 96)
    )
    assert (long.cut, long.teacher_cut) == (0, 0)
    assert (short.cut, short.teacher_cut) == (0, 3)
    whole, cut = (split.collate([0, 1, 2]) for split in (long, short))
    assert torch.equal(whole.aligned, whole.student.mask)
    assert R in cut.teacher.segments[0, -1:]
    assert torch.equal(cut.aligned, cut.student.mask & (cut.student.segments == Q))
    # Another text's is no part of one's own: the control stays as it is.
    shuffled = prepare_split(Given(*problems), "train", read_as("short", max_length=96), reader, reader, shuffle=True)
    assert torch.equal(shuffled.collate([0, 1, 2]).aligned, cut.student.mask & (cut.student.segments != A))


def test_each_reads_with_its_own_tokenizer(embedded, trained):
    student, teacher = reader_with(trained), reader_with(embedded)
    assert not same_tokenizer(trained, embedded)
    assert same_tokenizer(trained, trained)
    split = prepare_split(Given(*PROBLEMS), "train", read_as("full"), student, teacher, shuffle=False)
    assert split.student == encode(PROBLEMS, trained, 256)
    assert split.teacher == encode(PROBLEMS, embedded, 256)
    # Each is padded with its own id; the student's, which has none, with its end of text.
    batch = split.collate(list(range(6)))
    assert set(batch.student.ids[~batch.student.mask].tolist()) == {trained.eos_token_id}
    assert set(batch.teacher.ids[~batch.teacher.mask].tolist()) == {embedded.pad_token_id}
    assert batch.scored[batch.student.ids == trained.eos_token_id].sum() == 6


def test_texts_that_leave_nothing_to_score_are_dropped_and_counted(embedded):
    reader = reader_with(embedded)
    long = Example("long", "How many? " * 40, ("one",), "1")
    longer = Example("longer", "How many?", ("one and one " * 40,), "1")
    given = Given(PROBLEMS[0], long, PROBLEMS[1], longer)
    split = prepare_split(given, "train", read_as("full", max_length=120), reader, reader, shuffle=False)
    assert split.ids == [PROBLEMS[0].id, PROBLEMS[1].id, "longer"]
    assert (split.dropped, split.cut, split.teacher_cut) == (1, 1, 1)
    assert [len(text.ids) for text in split.student][2] == 120
    plain = Example("plain", "", ("all of it",), None)
    split = prepare_split(Given(plain, PROBLEMS[0]), "train", read_as("none"), reader, reader, shuffle=False)
    assert (split.ids, split.dropped) == ([PROBLEMS[0].id], 1)
    with pytest.raises(ConfigError, match="leaves no token to score in the 1 texts of the train split"):
        prepare_split(Given(long), "train", read_as("full", max_length=120), reader, reader, shuffle=False)


def test_shuffling_is_of_the_teachers_texts_alone(embedded):
    reader = reader_with(embedded)
    plain, shuffled = (
        prepare_split(Given(*PROBLEMS), "train", read_as("full"), reader, reader, shuffle=on).collate([0, 1, 2])
        for on in (False, True)
    )
    assert torch.equal(shuffled.student.ids, plain.student.ids)
    assert torch.equal(shuffled.teacher.ids, plain.teacher.ids[[1, 2, 0]])


# Order


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**62))
def test_every_example_once_an_epoch(num_examples, batch_size, seed):
    batch_size = min(batch_size, num_examples)
    order = DataOrder(num_examples, batch_size, seed)
    assert order.steps_per_epoch == num_examples // batch_size
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = [index for step in steps for index in order[step]]
        assert len(seen) == len(set(seen)) == order.steps_per_epoch * batch_size
        assert set(seen) <= set(range(num_examples))
        if num_examples % batch_size == 0:
            assert set(seen) == set(range(num_examples))


def test_the_order_is_a_function_of_the_seed_and_the_step():
    order = DataOrder(20, 4, seed=3)
    forwards = [order[step] for step in range(15)]
    fresh = DataOrder(20, 4, seed=3)
    assert [fresh[step] for step in (14, 0, 7, 6, 13)] == [forwards[step] for step in (14, 0, 7, 6, 13)]
    assert [DataOrder(20, 4, seed=4)[step] for step in range(15)] != forwards
    assert forwards[:5] != forwards[5:10]  # another epoch, another order
    # numpy's generator of (seed, epoch), whose stream is fixed by its documentation.
    expected = np.random.default_rng((3, 1)).permutation(20)
    assert np.concatenate(forwards[5:10]).tolist() == expected.tolist()
    # Half the batch size sees the same examples in the same order.
    halves = DataOrder(20, 2, seed=3)
    assert [[*halves[2 * step], *halves[2 * step + 1]] for step in range(15)] == forwards


def test_the_digest_is_of_the_ids_in_order():
    order, ids = DataOrder(6, 2, seed=1), [f"train-{number}" for number in range(6)]
    seen = [ids[index] for step in range(4) for index in order[step]]
    assert order.digest(4, ids) == hashlib.sha256("".join(f"{each}\n" for each in seen).encode()).hexdigest()
    assert order.digest(3, ids) != order.digest(4, ids)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.batch_size=8 is above the 7 training examples"):
        DataOrder(7, 8, seed=0)


def test_answers_of_generated_problems_are_numbers():
    assert read_number(FIRST["test"].answer) == 120
