"""Texts are read as they are meant: GSM8K, and any file of texts, conversations or prompts with completions."""

import datetime
import json
import os
import re
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import get_object

from kv_align.config.compose import compose_config
from kv_align.config.schema import Choice
from kv_align.data import table
from kv_align.data.example import Example, Turn
from kv_align.data.files import split_of
from kv_align.data.gsm8k import GSM8K, parse_row
from kv_align.data.text import PlainText
from kv_align.evaluation.answers import read_number

SPLITS = ("train", "validation", "test")


# GSM8K


def test_gsm8k_rows_by_hand():
    row = {
        "question": "Weng  earns $12 an hour.\nHow much did she earn?",
        "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n\nShe earned $<<0.2*50=10>>10.\n#### 1,234",
    }
    assert parse_row("train-1", row, "here") == Example(
        "train-1",
        "Weng earns $12 an hour. How much did she earn?",
        ("Weng earns 12/60 = $0.2 per minute.", "She earned $10."),
        "1234",
    )
    with pytest.raises(ValueError, match=r"test\.jsonl, line 8 has no answer after ####"):
        parse_row("test-7", {"question": "?", "answer": "It is 4."}, "test.jsonl, line 8")


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("1,234", "1234"),
        ("-$12,34,567.50", "-$1234567.50"),
        ("1,234 apples", "1234 apples"),
        # These commas part no thousands.
        ("1,5", "1,5"),
        ("0,125", "0,125"),
        ("3, 4", "3, 4"),
        ("Paris, France", "Paris, France"),
        ("1/3", "1/3"),
    ],
)
def test_only_commas_between_thousands_go(written, answer):
    assert parse_row("train-0", {"question": "?", "answer": f"#### {written}"}, "here").answer == answer


def test_headings_are_steps_and_the_answer_stands_after_the_last_marker():
    row = {"question": "?", "answer": "#### 1. Read\nAna has pens.\n#### 2. Add\nShe has 72.\n#### 72"}
    example = parse_row("train-0", row, "here")
    assert example.steps == ("#### 1. Read", "Ana has pens.", "#### 2. Add", "She has 72.")
    assert example.answer == "72"


def test_gsm8k_refusals(tmp_path):
    for file in ("train.jsonl", "test.jsonl"):
        with pytest.raises(ValueError, match=rf"holds no {file}"):
            GSM8K(path=str(tmp_path))
        (tmp_path / file).write_text(json.dumps({"question": "?", "answer": "#### 1"}) + "\n")
    with pytest.raises(ValueError, match=r"data\.validation_examples=1 leaves nothing of the 1 training problems"):
        GSM8K(path=str(tmp_path), validation_examples=1)


def gsm8k(folder: Path, count: int = 6, **columns: object) -> Path:
    """A folder of problems that are alike but for their numbers; `columns` replace those of the third."""
    folder.mkdir(exist_ok=True)
    for file in ("train.jsonl", "test.jsonl"):
        rows = [{"question": f"How many is {each}?", "answer": f"It is.\n#### {each}"} for each in range(count)]
        rows[2] |= columns
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_fewer_training_problems_are_the_first_of_all_of_them(tmp_path):
    folder = str(gsm8k(tmp_path))
    whole, few = (GSM8K(path=folder, validation_examples=2, train_examples=count) for count in (None, 3))
    assert few.examples("train") == whole.examples("train")[:3]
    assert len(whole.examples("train")) == 4
    assert few.examples("validation") == whole.examples("validation")
    assert few.examples("test") == whole.examples("test")
    with pytest.raises(ValueError, match=r"data\.train_examples=5 is above the 4 training texts"):
        GSM8K(path=folder, validation_examples=2, train_examples=5)


def test_an_empty_question_is_one_and_a_missing_one_is_none(tmp_path):
    source = GSM8K(path=str(gsm8k(tmp_path / "empty", question="")), validation_examples=2)
    assert source.examples("test")[2].question == ""
    for columns, missing in (({"question": None}, "question"), ({"answer": None}, "answer")):
        with pytest.raises(ValueError, match=rf"train\.jsonl, line 3 has no {missing}; write one"):
            GSM8K(path=str(gsm8k(tmp_path / missing, **columns)), validation_examples=2)


def test_the_real_gsm8k(gsm8k_folder):
    source = GSM8K(path=str(gsm8k_folder))
    splits = {split: source.examples(split) for split in SPLITS}
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 7473 - 512,
        "validation": 512,
        "test": 1319,
    }
    everything = [example for examples in splits.values() for example in examples]
    assert len({example.id for example in everything}) == 7473 + 1319
    questions = {split: {example.question for example in examples} for split, examples in splits.items()}
    assert not questions["train"] & questions["validation"]
    assert not questions["test"] & (questions["train"] | questions["validation"])
    for example in everything:
        assert "," not in example.answer
        assert example.question
        assert example.steps
        assert not re.search(r"<<|>>|####", " ".join(example.steps))
        assert str(read_number(example.answer)) == example.answer
    by_id = {example.id: example for example in everything}
    assert by_id["train-0"].steps[0] == "Natalia sold 48/2 = 24 clips in May."
    assert by_id["train-0"].answer == "72"
    # The same carving in every run; a smaller validation split is the end of a larger one.
    again = GSM8K(path=str(gsm8k_folder), validation_examples=100).examples("validation")
    assert again == splits["validation"][-100:]
    assert splits["validation"] == source.examples("validation")
    # Not the end of the file: the carving is shuffled.
    assert len({int(example.id.split("-")[1]) // 1000 for example in splits["validation"]}) == 8


# Any text

TEXTS = [f"This is text number {number}." for number in range(10)]


def plain_text(path: Path, column: str = "text", validation: int = 2, test: int = 3, **options: object) -> PlainText:
    return PlainText(
        path=str(path),
        hub_name="",
        hub_config="",
        column=column,
        validation_examples=validation,
        test_examples=test,
        **options,
    )


def write(file: Path, texts: list[str | None], column: str = "text") -> Path:
    table = pd.DataFrame({"number": range(len(texts)), column: texts})
    match file.suffix:
        case ".txt":
            file.write_text("\n".join(texts) + "\n")
        case ".jsonl":
            table.to_json(file, orient="records", lines=True)
        case ".parquet":
            table.to_parquet(file)
        case ".csv":
            table.to_csv(file, index=False)
    return file


def strings(examples: list[Example]) -> list[str]:
    assert all(example.question == "" and example.answer is None for example in examples)
    return [step for example in examples for step in example.steps]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".csv"])
def test_one_file_is_carved_into_splits(tmp_path, suffix):
    source = plain_text(write(tmp_path / f"corpus{suffix}", TEXTS))
    splits = {split: source.examples(split) for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [5, 2, 3]
    assert sorted(strings([*splits["train"], *splits["validation"], *splits["test"]])) == TEXTS
    # Each id names the row that the text has in the file.
    for example in [*splits["train"], *splits["validation"], *splits["test"]]:
        assert example.steps[0] == TEXTS[int(example.id.removeprefix("train-"))]
    again = plain_text(tmp_path / f"corpus{suffix}")
    assert again.examples("test") == splits["test"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".csv"])
def test_files_named_after_splits_are_these_splits(tmp_path, suffix):
    write(tmp_path / f"train_a{suffix}", TEXTS[:4])
    write(tmp_path / f"train_b{suffix}", TEXTS[4:7])
    write(tmp_path / f"test{suffix}", TEXTS[7:])
    (tmp_path / "README.md").write_text("left alone")
    source = plain_text(tmp_path)
    assert strings(source.examples("test")) == TEXTS[7:]
    assert len(source.examples("validation")) == 2
    assert sorted(strings([*source.examples("train"), *source.examples("validation")])) == TEXTS[:7]
    write(tmp_path / f"validation{suffix}", TEXTS[:1])
    assert strings(plain_text(tmp_path).examples("validation")) == TEXTS[:1]


def test_rows_without_text_are_left_out(tmp_path):
    file = write(tmp_path / "corpus.parquet", ["first", None, "  ", "second", "", "third"], column="body")
    source = plain_text(file, column="body", validation=1, test=1)
    assert sorted(strings([example for split in SPLITS for example in source.examples(split)])) == [
        "first",
        "second",
        "third",
    ]


def test_text_refusals(tmp_path):
    write(tmp_path / "corpus.csv", TEXTS)
    with pytest.raises(
        ValueError, match=r"data\.column=body is not in .*corpus\.csv, which has number, text; name one"
    ):
        plain_text(tmp_path, column="body")
    with pytest.raises(ValueError, match=r"data\.test_examples=8 leaves nothing of the 8 texts"):
        plain_text(tmp_path, test=8)
    write(tmp_path / "more.jsonl", TEXTS)
    with pytest.raises(ValueError, match="holds 2 kinds of text files"):
        plain_text(tmp_path)
    only = tmp_path / "only"
    only.mkdir()
    write(only / "test.csv", TEXTS)
    with pytest.raises(ValueError, match="holds no training text"):
        plain_text(only)
    for both in (True, False):
        with pytest.raises(ValueError, match=r"give either data\.path or data\.hub_name"):
            PlainText(
                path="a" * both,
                hub_name="b" * both,
                hub_config="",
                column="text",
                validation_examples=1,
                test_examples=1,
            )


def all_of(source: PlainText) -> list[Example]:
    return [example for split in SPLITS for example in source.examples(split)]


def in_order(source: PlainText) -> list[Example]:
    """All texts of a source without splits, as its file has them."""
    return sorted(all_of(source), key=lambda example: int(example.id.removeprefix("train-")))


def test_fewer_training_texts_are_the_first_of_all_of_them(tmp_path):
    file = write(tmp_path / "corpus.txt", TEXTS)
    whole, few = (plain_text(file, train_examples=count) for count in (None, 2))
    assert few.examples("train") == whole.examples("train")[:2]
    assert few.examples("test") == whole.examples("test")
    with pytest.raises(ValueError, match=r"data\.train_examples=6 is above the 5 training texts"):
        plain_text(file, train_examples=6)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (name, "validation")
            for name in ("val", "valid", "validation", "dev", "eval", "evaluation", "Val", "DEV", "devset")
        ),
        *(
            (name, "validation")
            for name in ("val_1", "my-corpus.val", "dev-v2.0", "valset", "eval2", "corpus_validation")
        ),
        *((name, "train") for name in ("train", "train-00000-of-00002", "training_b", "trainset", "TRAIN")),
        *((name, "test") for name in ("test", "testing", "test_a", "corpus-test", "testset", "Test")),
        *(
            (name, None)
            for name in ("corpus", "valley", "devotion", "testimony", "evaluator", "contest", "trainer", "a")
        ),
    ],
)
def test_the_split_that_a_name_says(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "eval", "my_VAL_2"])
def test_validation_files_are_never_trained_on(tmp_path, name):
    write(tmp_path / "corpus.jsonl", TEXTS[:6])
    write(tmp_path / f"{name}.jsonl", TEXTS[6:])
    source = plain_text(tmp_path, test=2)
    assert strings(source.examples("validation")) == TEXTS[6:]
    assert sorted(strings([*source.examples("train"), *source.examples("test")])) == TEXTS[:6]


def test_a_name_that_could_be_two_splits_is_refused(tmp_path):
    write(tmp_path / "train.csv", TEXTS)
    write(tmp_path / "train_val.csv", TEXTS)
    with pytest.raises(ValueError, match="train_val could be train or validation; rename it"):
        plain_text(tmp_path)


AS_WRITTEN = [
    "NA",
    "null",
    "None",
    "nan",
    "n/a",
    "",
    "2024-01-05",
    "1.0",
    "007",
    "1e3",
    "true",
    "-inf",
    " spaces ",
    'a,b\n"c"',
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_what_looks_like_something_else_stays_as_written(tmp_path, suffix):
    file = tmp_path / f"corpus{suffix}"
    table = pd.DataFrame({"text": AS_WRITTEN})
    match suffix:
        case ".csv":
            table.to_csv(file, index=False)
        case ".jsonl":
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in AS_WRITTEN))
        case _:
            table.to_parquet(file)
    found = strings(in_order(plain_text(file, validation=1, test=1)))
    assert found == [text for text in AS_WRITTEN if text]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".json"])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path, suffix):
    rows = {
        ".txt": "one\ntwo\nthree\n",
        ".jsonl": '{"text": "one"}\r\n\r\n{"text": "two"}\r\n{"text": "three"}',
        ".csv": "text\r\none\r\ntwo\r\nthree\r\n",
        ".json": '[{"text": "one"},\n {"text": "two"}, {"text": "three"}]',
    }
    file = tmp_path / f"corpus{suffix}"
    file.write_bytes(b"\xef\xbb\xbf" + rows[suffix].encode())
    assert strings(in_order(plain_text(file, validation=1, test=1))) == ["one", "two", "three"]


def test_null_is_no_text(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(
        '{"text": null}\n{"text": "one"}\n{"other": 1}\n{"text": "two"}\n{"text": "3"}\n'
    )
    assert strings(in_order(plain_text(tmp_path, validation=1, test=1))) == ["one", "two", "3"]


def parquet(file: Path, column: pa.Array) -> Path:
    pq.write_table(pa.table({"text": column}), file)
    return file


def test_bytes_and_categories_are_decoded(tmp_path):
    texts = ["Äpfel", "two", "three"]
    encoded = parquet(tmp_path / "a.parquet", pa.array([text.encode() for text in texts]))
    assert strings(in_order(plain_text(encoded, validation=1, test=1))) == texts
    categories = parquet(tmp_path / "b.parquet", pa.array(texts).dictionary_encode())
    assert strings(in_order(plain_text(categories, validation=1, test=1))) == texts


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 3], "int"),
        ([0.5, 1.5, 2.5], "float"),
        ([True, False, True], "bool"),
        ([["a"], ["b"], ["c"]], "list"),
        ([[1, 2], [3], [4]], "list"),
        ([{"a": 1}, {"a": 2}, {"a": 3}], "dict"),
        ([datetime.date(2024, 1, 5)] * 3, "date"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path, values, kind):
    with pytest.raises(
        ValueError, match=rf"corpus\.parquet, row 1: text is no text but of the type {kind}; write texts"
    ):
        plain_text(parquet(tmp_path / "corpus.parquet", pa.array(values)))


def test_a_file_replaced_in_place_gives_its_new_texts(tmp_path):
    file = write(tmp_path / "corpus.jsonl", ["old one", "old two", "old three"])
    stamp = file.stat()
    assert strings(in_order(plain_text(file, validation=1, test=1)))[0] == "old one"
    replacement = write(tmp_path / "new.jsonl", ["new one", "new two", "new three"])
    os.utime(replacement, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    replacement.replace(file)
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (stamp.st_mtime_ns, stamp.st_size)
    assert strings(in_order(plain_text(file, validation=1, test=1))) == ["new one", "new two", "new three"]
    # Also where the same file is written anew.
    file.write_text(file.read_text().replace("new", "odd"))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert strings(in_order(plain_text(file, validation=1, test=1)))[0] == "odd one"


# Prompts with completions

PAIRS = [
    {"prompt": "How many?", "completion": "One and one.\nThat is two.\n#### 2"},
    {"prompt": "Where?", "completion": "In Paris, France"},
    {"prompt": "", "completion": "#### 1/2"},
    {"prompt": None, "completion": "left out"},
    {"prompt": "left out", "completion": " "},
]


@pytest.mark.parametrize("names", [("prompt", "completion"), ("q", "a")])
def test_prompt_and_completion_are_question_and_answer(tmp_path, names):
    renamed = [{names[0]: row["prompt"], names[1]: row["completion"], "number": 1} for row in PAIRS]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    options = {} if names[0] == "prompt" else {"prompt_column": "q", "completion_column": "a"}
    assert in_order(plain_text(file, validation=1, test=1, **options)) == [
        Example("train-0", "How many?", ("One and one.\nThat is two.",), "2"),
        Example("train-1", "Where?", (), "In Paris, France"),
        Example("train-2", "", (), "1/2"),
    ]


def test_columns_of_prompt_and_completion_that_are_not_there_are_refused(tmp_path):
    file = write(tmp_path / "corpus.csv", TEXTS)
    with pytest.raises(
        ValueError, match=r"data\.prompt_column=q and a is not in .*corpus\.csv, which has number, text"
    ):
        plain_text(file, prompt_column="q", completion_column="a")
    with pytest.raises(ValueError, match=r"give both data\.prompt_column and data\.completion_column"):
        plain_text(file, prompt_column="text")


# Conversations


def conversation(*contents: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


CONVERSATIONS = [conversation("Hi", "Hello", "Who?", "Me"), conversation("Why?", "So"), conversation("1", "2")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("turns", [None, "all", "last"])
def test_messages_are_turns_of_a_conversation(tmp_path, suffix, turns):
    file = tmp_path / f"corpus{suffix}"
    table = pd.DataFrame(CONVERSATIONS)
    table.to_parquet(file) if suffix == ".parquet" else table.to_json(file, orient="records", lines=True)
    first = in_order(plain_text(file, "messages", 1, 1, scored_turns=turns))[0]
    assert (first.question, first.steps, first.answer) == ("", (), None)
    assert first.turns == (
        Turn("user", "Hi", False),
        Turn("assistant", "Hello", turns != "last"),
        Turn("user", "Who?", False),
        Turn("assistant", "Me", True),
    )


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user"}, "a message of messages has role; it must have role and content, and nothing else"),
        ({"from": "human", "value": "Hi"}, "a message of messages has from, value; it must have role and content"),
        ({"role": "user", "content": None, "tool_calls": ["x"]}, "a message of messages has role, tool_calls; it must"),
        ({"role": "user", "content": ["x"]}, r"messages\.content is no text but of the type list"),
        ({}, "a message of messages has nothing; it must have role and content"),
    ],
)
def test_messages_that_are_none_are_refused(tmp_path, message, sentence):
    file = tmp_path / "corpus.jsonl"
    file.write_text(json.dumps(CONVERSATIONS[0]) + "\n" + json.dumps({"messages": [message]}) + "\n")
    with pytest.raises(ValueError, match=rf"corpus\.jsonl, line 2: {sentence}"):
        plain_text(file, "messages")


# The files of a configured source


def data_files(data: Choice) -> list[Path]:
    return sorted(get_object(data.target)(**data.options).files)


def test_the_files_that_a_source_reads(tmp_path):
    assert data_files(compose_config([])[0].data) == []
    problems = gsm8k(tmp_path / "problems")
    (problems / "other.jsonl").write_text("not read")
    data = compose_config(["data=gsm8k", f"data.path={problems}", "data.validation_examples=2"])[0].data
    assert data_files(data) == [problems / "test.jsonl", problems / "train.jsonl"]
    folder = tmp_path / "texts"
    folder.mkdir()
    files = [write(folder / name, TEXTS) for name in ("dev.csv", "train.csv", "z.CSV".lower())]
    (folder / ".train.csv").write_text("hidden")
    (folder / "notes.md").write_text("not read")
    data = compose_config(["data=text", f"data.path={folder}", "data.test_examples=2"])[0].data
    assert data_files(data) == files
    assert data_files(compose_config(["data=text", "data.hub_name=some/set"])[0].data) == []


# The hub


def on_the_hub(monkeypatch, **splits: list[dict[str, object]]) -> None:
    loaded = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: loaded)


def hub_text(**options: object) -> PlainText:
    return PlainText(
        path="", hub_name="some/set", hub_config="", column="text", validation_examples=1, test_examples=1, **options
    )


def named(name: str, count: int = 3) -> list[dict[str, object]]:
    return [{"text": f"{name} {number}", "number": number} for number in range(count)]


def test_splits_of_the_hub_are_found_by_their_names(monkeypatch):
    on_the_hub(monkeypatch, train=named("train"), train_more=named("more"), dev=named("dev"), extra=named("extra"))
    source = hub_text()
    assert sorted(strings([*source.examples("train"), *source.examples("test")])) == ["train 0", "train 1", "train 2"]
    assert strings(source.examples("validation")) == ["dev 0", "dev 1", "dev 2"]
    on_the_hub(monkeypatch, train_sft=named("train"), test_sft=named("test"))
    assert strings(hub_text().examples("test")) == ["test 0", "test 1", "test 2"]
    on_the_hub(monkeypatch, everything=named("all"))
    with pytest.raises(ValueError, match=r"data\.hub_name=some/set has no split named train, but everything; choose"):
        hub_text().examples("train")
    on_the_hub(monkeypatch, train=[{"text": 5}])
    with pytest.raises(ValueError, match="some/set, train row 1: text is no text but of the type int"):
        hub_text().examples("train")


def test_gsm8k_from_the_hub(monkeypatch):
    rows = [{"question": f"How many is {each}?", "answer": f"#### {each}", "id": each} for each in range(4)]
    on_the_hub(monkeypatch, train=rows, test=rows[:1])
    source = GSM8K(validation_examples=2)
    assert source.files == ()
    assert [len(source.examples(split)) for split in SPLITS] == [2, 2, 1]
    on_the_hub(monkeypatch, train=rows)
    with pytest.raises(ValueError, match=r"data\.hub_name=openai/gsm8k has no split test, but train; name another"):
        source.examples("test")


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("it is not there\nand more"),
        datasets.exceptions.DatasetGenerationError("it is not there"),
        ConnectionError("it is not there."),
        RuntimeError("it is not there"),
    ],
)
def test_what_cannot_be_loaded_from_the_hub_is_one_sentence(monkeypatch, error):
    def fail(name: str, config: str | None) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match=r"^data\.hub_name=some/set cannot be loaded \(it is not there\); correct the name"
    ):
        hub_text().examples("train")


def test_a_sweep_reads_its_files_once(tmp_path, monkeypatch):
    write(tmp_path / "corpus.jsonl", TEXTS)
    first = plain_text(tmp_path).examples("train")
    monkeypatch.setattr(table.json, "loads", None)
    assert plain_text(tmp_path).examples("train") == first
    first.clear()
    assert len(plain_text(tmp_path).examples("train")) == 5
