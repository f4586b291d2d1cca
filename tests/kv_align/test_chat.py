"""A conversation is read as its chat template writes it, and what the assistant says of it is scored."""

import dataclasses

import pytest
from transformers import PreTrainedTokenizerFast

from kv_align.data.chat import chat_segments
from kv_align.data.encode import encode
from kv_align.data.example import DataSource, Example, Segment, Turn
from kv_align.data.prepared import PreparedSplit, prepare_split
from kv_align.models.capture.prepare import prepare
from kv_align.models.load import LanguageModel
from kv_align.runs.errors import ConfigError
from tests.kv_align.test_data import read_as
from tests.tiny import make_llama
from tests.tiny_tokenizers import byte_level

Q, R = Segment.QUESTION, Segment.REASONING
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant speak here') }}{% endif %}{% endfor %}"
)
DATED = "{{ date_string if date_string is defined else 'no day' }} {{ strftime_now('%Y') }}\n" + CHATML


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(bos_token="<s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents: str, first: str = "user", last_only: bool = False) -> Example:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    turns = [(roles[number % 2], content) for number, content in enumerate(contents)]
    last = max((number for number, (role, _) in enumerate(turns) if role == "assistant"), default=-1)
    scored = [role == "assistant" and (not last_only or number == last) for number, (role, _) in enumerate(turns)]
    return Example("talk", "", (), None, tuple(Turn(*turn, each) for turn, each in zip(turns, scored, strict=True)))


def test_what_is_scored_by_hand():
    assert chat_segments(talk("Hi", "Hello", "Who?", "Me"), chat_tokenizer()) == [
        (Q, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (R, "Hello<|im_end|>"),
        (Q, "\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"),
        (R, "Me<|im_end|>"),
        (Q, "\n"),
    ]
    assert chat_segments(talk("Hi", "Hello", "Who?", "Me", last_only=True), chat_tokenizer())[1:] == [
        (R, "Me<|im_end|>"),
        (Q, "\n"),
    ]


@pytest.mark.parametrize(
    "word", ["a", "assistant", "user", "<|im_end|>", "", "\n", "<|im_start|>assistant\n", "Äé 🍎", "{{ x }}"]
)
def test_a_message_is_not_mistaken_for_the_template(word):
    segments = chat_segments(talk(word, word), chat_tokenizer())
    assert "".join(text for _, text in segments) == (
        f"<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant\n{word}<|im_end|>\n"
    )
    assert [text for segment, text in segments if segment == R] == [f"{word}<|im_end|>"]


def test_a_template_may_trim_its_messages():
    assert chat_segments(talk(" Hi \n", " Hello "), chat_tokenizer(TRIMMED)) == [
        (Q, "<s>[INST] Hi [/INST] "),
        (R, "Hello</s>"),
    ]


def test_no_template_makes_numbers_depend_on_the_day():
    first = chat_segments(talk("Hi", "Hello"), chat_tokenizer(DATED))[0][1]
    assert first.startswith("26 Jul 2024 2024\n")


@pytest.mark.parametrize(
    ("template", "example", "sentence"),
    [
        (None, talk("Hi", "Hello"), r"the chat template of .* is missing; save its tokenizer with a chat_template"),
        (
            TRIMMED,
            dataclasses.replace(talk("Hi"), turns=(Turn("system", "Be", False),)),
            "refuses the conversation talk .only user",
        ),
        (
            "{{ messages[-1]['content'] }}",
            talk("Hi", "Hello"),
            "rewrites or leaves out a message of the conversation talk",
        ),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            talk("Hi"),
            "rewrites or leaves out a message",
        ),
        ("{% for m in messages %}{{ m.content.split('x')[-1] }}{% endfor %}", talk("axb"), "rewrites or leaves out"),
        ("{{ messages[0].content }} {{ messages[0].content }}", talk("Hi"), "rewrites or leaves out a message"),
        ("{% if %}", talk("Hi"), "refuses the conversation talk"),
    ],
)
def test_templates_that_do_not_show_a_conversation_are_refused(template, example, sentence):
    with pytest.raises(ValueError, match=sentence):
        chat_segments(example, chat_tokenizer(template))


def test_a_conversation_is_tokenised_as_its_template_wrote_it():
    tokenizer, example = chat_tokenizer(), talk("Hi", "Hello", "Who?", "Me")
    (encoded,) = encode([example], tokenizer, 200)
    whole = "".join(text for _, text in chat_segments(example, tokenizer))
    # No beginning and end but those of the template.
    assert encoded.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    scored = [i for i, segment in zip(encoded.ids, encoded.segments, strict=True) if segment == R]
    assert tokenizer.decode(scored) == "Hello<|im_end|>Me<|im_end|>"
    # Characters of the assistant's words are counted through all of its turns.
    spans = [tuple(span) for span, segment in zip(encoded.spans, encoded.segments, strict=True) if segment == R]
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, len("Hello<|im_end|>Me<|im_end|>"))
    assert tokenizer.decode(encoded.prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


class Talks(DataSource):
    """Conversations of a test."""

    has_reasoning = False

    def examples(self, split: str) -> list[Example]:
        return [talk("Hi", "Hello", "Who?", "Me"), talk("Why?", "So"), talk("unanswered")]


def split_of(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> PreparedSplit:
    readers = []
    for tokenizer in (student, teacher):
        model = make_llama(vocab_size=len(tokenizer))
        readers.append(LanguageModel(model, tokenizer, prepare(model, "student")))
    return prepare_split(Talks(), "train", read_as("full"), *readers, shuffle=False)


def test_conversations_become_batches():
    split = split_of(chat_tokenizer(), chat_tokenizer())
    assert split.teacher is split.student
    assert (len(split.examples), split.dropped) == (2, 1)
    batch = split.collate([0, 1])
    assert batch.correspondence.same_time
    text = chat_tokenizer().decode(batch.student.ids[1][batch.scored[1]])
    assert text == "So<|im_end|>"


def test_each_model_reads_a_conversation_by_its_own_template():
    student, teacher = chat_tokenizer(), chat_tokenizer(TRIMMED)
    split = split_of(student, teacher)
    assert "[INST]" in teacher.decode(split.teacher[0].ids)
    assert "[INST]" not in student.decode(split.student[0].ids)
    batch = split.collate([0, 1])
    assert not batch.correspondence.same_time
    with pytest.raises(ConfigError, match=r"data=given cannot be read: the chat template of .* is missing"):
        split_of(student, chat_tokenizer(None))
