"""A hundred files and settings that are not as they should be: each is one sentence, or is read as it is meant."""

import copy
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kv_align.config.compose import compose_raw
from kv_align.config.resolve import resolve
from kv_align.data.prepared import prepare_split
from kv_align.experiment.choices import make_source
from kv_align.experiment.limits import check_limits
from kv_align.models.capture.prepare import prepare
from kv_align.models.load import LanguageModel
from kv_align.runs.errors import ConfigError
from tests.tiny import make_llama
from tests.tiny_tokenizers import byte_level

ROW = {"question": "How many?", "answer": "One.\n#### 1"}
TEXT = {"text": "Some text."}
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def lines(*rows: Any, count: int = 6, of: dict[str, Any] = ROW) -> bytes:
    """JSON lines: these rows, and as many good ones as it takes; bytes are lines as they are."""
    every = [*[of] * (count - len(rows)), *rows]
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in every)


def texts(*rows: Any, count: int = 6) -> bytes:
    return lines(*rows, count=count, of=TEXT)


def csv(*rows: str, head: str = "number,text") -> bytes:
    return "\n".join([head, *(f"{number},Some text." for number in range(5)), *rows, ""]).encode()


def parquet(values: Any, name: str = "text", kind: Any = None) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(values, type=kind)}), stream)
    return stream.getvalue()


def problem(
    train: bytes | None = None, test: bytes | None = None, **settings: Any
) -> tuple[str, dict[str, bytes], Any]:
    files = {"train.jsonl": lines() if train is None else train, "test.jsonl": lines() if test is None else test}
    return "gsm8k", files, settings


def text(
    content: bytes | None = None, name: str = "corpus.jsonl", more: dict[str, bytes] | None = None, **settings: Any
):
    return "text", {name: texts() if content is None else content, **(more or {})}, settings


def answer(written: Any, **settings: Any):
    return problem(
        lines({"question": "?", "answer": written}), lines(*[{"question": "?", "answer": written}] * 6), **settings
    )


WORKS = None
CASES: dict[str, tuple[tuple[str, dict[str, bytes], dict[str, Any]], str | None]] = {
    # GSM8K: what the files hold
    "good": (problem(), WORKS),
    "cut in a line": (
        problem(lines() + b'{"question": "Wh'),
        "train.jsonl, line 7 cannot be read as JSON (Unterminated string",
    ),
    "cut in the first": (problem(b'{"question": '), "train.jsonl, line 1 cannot be read as JSON"),
    "empty": (problem(b""), "train.jsonl is empty: it holds no row"),
    "empty test": (problem(test=b""), "test.jsonl is empty: it holds no row"),
    "blank lines alone": (problem(b"\n \n\n"), "train.jsonl is empty: it holds no row"),
    "blank lines between": (problem(lines(b"", b"  ")), WORKS),
    "utf-16": (
        problem(lines().decode().encode("utf-16")),
        "train.jsonl is written in UTF-16 or UTF-32; save it as UTF-8",
    ),
    "utf-16 big": (problem("\ufeff{}".encode("utf-16-be")), "train.jsonl is written in UTF-16"),
    "utf-32": (problem(lines().decode().encode("utf-32")), "train.jsonl is written in UTF-16 or UTF-32"),
    "utf-16 without mark": (
        problem(lines().decode().encode("utf-16-le")),
        "train.jsonl, line 1 cannot be read as JSON",
    ),
    "latin-1": (problem(lines('{"question": "Ä"}'.encode("latin-1"))), "train.jsonl, line 6 is not UTF-8"),
    "zipped": (problem(b"\x1f\x8b\x08\x00\x00"), "train.jsonl, line 1 is not UTF-8"),
    "byte order mark": (problem(b"\xef\xbb\xbf" + lines()), WORKS),
    "windows line ends": (problem(lines().replace(b"\n", b"\r\n")), WORKS),
    "no end of the last line": (problem(lines().rstrip()), WORKS),
    "one list": (problem(json.dumps([ROW] * 6).encode()), WORKS),
    "one list over lines": (problem(json.dumps([ROW] * 6, indent=1).encode()), WORKS),
    "a broken list": (
        problem(b'[{"question": "?",\n "answer": }]'),
        "train.jsonl, line 2 cannot be read as JSON (Expecting value",
    ),
    "a list of numbers": (problem(b"[1, 2]"), "train.jsonl, entry 1 is no object"),
    "an object over lines": (problem(json.dumps(ROW, indent=1).encode()), "train.jsonl, line 1 cannot be read as JSON"),
    "numbers": (problem(lines(b"5")), "train.jsonl, line 6 is no object"),
    "null": (problem(lines(b"null")), "train.jsonl, line 6 is no object"),
    "python": (problem(lines(b"{'question': 'x'}")), "train.jsonl, line 6 cannot be read as JSON"),
    "two in a line": (problem(lines(b'{"a": 1} {"a": 1}')), "train.jsonl, line 6 cannot be read as JSON (Extra data"),
    "deep": (problem(lines(b'{"a": ' + b"[" * 100_000)), "train.jsonl, line 6 cannot be read as JSON"),
    "a huge number": (problem(lines(b'{"a": ' + b"9" * 9000 + b"}")), "train.jsonl, line 6 cannot be read as JSON"),
    "html": (problem(b"<html></html>\n"), "train.jsonl, line 1 cannot be read as JSON"),
    "other columns": (
        problem(b'{"problem": "?", "solution": "#### 1"}\n'),
        "train.jsonl has no column question, but problem, sol",
    ),
    "no answers": (problem(b'{"question": "?"}\n'), "train.jsonl has no column answer, but question"),
    "columns of the test": (problem(test=b'{"q": "?"}\n'), "test.jsonl has no column question, but q"),
    "an empty object": (problem(lines({})), "train.jsonl, line 6 has no question"),
    "a null question": (problem(lines(ROW | {"question": None})), "train.jsonl, line 6 has no question"),
    "a null answer": (problem(lines(ROW | {"answer": None})), "train.jsonl, line 6 has no answer"),
    "a number for a question": (
        problem(lines(ROW | {"question": 5})),
        "line 6: question is no text but of the type int",
    ),
    "a list for an answer": (
        problem(lines(ROW | {"answer": ["#### 1"]})),
        "line 6: answer is no text but of the type list",
    ),
    "no marker": (problem(lines(ROW | {"answer": "It is 1."})), "train.jsonl, line 6 has no answer after ####"),
    "half a character": (
        problem(lines(b'{"question": "\\ud800", "answer": "#### 1"}')),
        "line 6: question holds '\\ud800'",
    ),
    "a zero character": (
        problem(lines(b'{"question": "\\u0000", "answer": "#### 1"}')),
        "line 6: question holds '\\x00'",
    ),
    "empty questions": (problem(lines(*[ROW | {"question": ""}] * 6), lines(*[ROW | {"question": " "}] * 6)), WORKS),
    "empty solutions": (problem(lines(*[ROW | {"answer": "#### 1"}] * 6)), WORKS),
    "more columns": (problem(lines(ROW | {"id": 5, "tags": [1]})), WORKS),
    "strange characters": (problem(lines(ROW | {"question": "𝟙🍎\u202e\u2028 how?"})), WORKS),
    # GSM8K: answers
    "no answer is a number": (
        answer("#### twelve"),
        "data.answers=number is not allowed: 6 of 6 answers of the test split",
    ),
    "texts as numbers": (answer("#### Paris"), "set data.answers to text, or evaluation.exact_match_examples to 0"),
    "nothing after the marker": (answer("####"), "6 of 6 answers of the test split are no numbers: '', '', '', ..."),
    "divided by nothing": (answer("#### 1/0"), "are no numbers: '1/0'"),
    "an endless power": (answer("#### 1e999999999"), "are no numbers: '1e999999999'"),
    "a very long number": (answer("#### " + "9" * 5000, max_length=6000), "are no numbers: '9999"),
    "texts as texts": (answer("#### Paris", answers="text"), WORKS),
    "nothing as a text": (answer("####", answers="text"), WORKS),
    "markers only": (answer("#### #### ####", answers="text"), WORKS),
    "another kind of answer": (
        problem(answers="word"),
        "data.answers=word is not allowed: set data.answers to one of number or text",
    ),
    # GSM8K: settings
    "no folder": (
        ("gsm8k", {}, {"path": "/no/such"}),
        "data.path=/no/such is not allowed: there is no such file or folder",
    ),
    "an empty folder": (("gsm8k", {}, {}), "holds no train.jsonl; name the folder"),
    "no test": (("gsm8k", {"train.jsonl": lines()}, {}), "holds no test.jsonl; name the folder"),
    "a folder for a file": (("gsm8k", {"train.jsonl/x": b"", "test.jsonl": lines()}, {}), "holds no train.jsonl"),
    "too much validation": (
        problem(validation_examples=6),
        "data.validation_examples=6 leaves nothing of the 6 training",
    ),
    "no validation": (problem(validation_examples=0), "data.validation_examples=0 is not allowed"),
    "too much training": (problem(train_examples=5), "data.train_examples=5 is above the 4 training texts"),
    "no training": (problem(train_examples=0), "data.train_examples=0 is not allowed"),
    "half a text": (problem(train_examples=1.5), "data.train_examples=1.5 is not allowed"),
    "some training": (problem(train_examples=3), WORKS),
    "no room": (problem(max_length=3), "data.max_length=3 leaves no token to score"),
    "an unknown key": (problem(column="text"), "data.column is an unknown key"),
    # Text: files
    "plain": (text(), WORKS),
    "no text file": (
        ("text", {"README.md": b"x"}, {}),
        "holds 0 kinds of text files; it must hold one of .txt, .jsonl",
    ),
    "two kinds": (text(more={"b.txt": b"x"}), "holds 2 kinds of text files"),
    "a suffix in capitals": (text(name="corpus.JSONL"), WORKS),
    "hidden files": (text(more={".b.txt": b"x", "._corpus.jsonl": b"\0"}), WORKS),
    "folders with a suffix": (text(more={"b.txt/x": b"x"}), WORKS),
    "only validation": (
        text(name="val.jsonl"),
        "holds no training text; add a file that is not named validation or test",
    ),
    "two splits in a name": (text(more={"train_test.jsonl": texts()}), "train_test could be train or test; rename it"),
    "an empty split": (text(more={"dev.jsonl": b""}), "dev.jsonl is empty: it holds no row"),
    "a split without text": (
        text(more={"dev.jsonl": texts(*[{"text": " "}] * 6)}),
        "dev.jsonl holds no text; write some",
    ),
    "a split of other columns": (text(more={"dev.jsonl": lines()}), "data.column=text is not in"),
    "too few": (text(texts(count=3)), "leaves nothing of the"),
    "no such column": (text(column="body"), "data.column=body is not in"),
    "no column": (text(column=""), "data.column= is not in"),
    "zeros in a text file": (
        text("a\n\0b\nc\nd\ne\n".encode("utf-16-le"), "c.txt"),
        "c.txt, line 1: text holds '\\x00'",
    ),
    "latin-1 text": (text("a\nÄ\n".encode("latin-1"), "c.txt"), "c.txt, line 2 is not UTF-8"),
    "blank text": (text(b"\n\n \n", "c.txt"), "c.txt holds no text; write some"),
    "a table of nothing": (text(b"", "c.csv"), "c.csv is empty: it holds no row"),
    "a head alone": (text(b"text\n", "c.csv"), "c.csv is empty: it holds no row"),
    "an open quote": (text(csv('6,"never closed'), "c.csv"), "c.csv, line 7 is no CSV (unexpected end of data)"),
    "a quote inside": (text(csv('6,"a" b'), "c.csv"), "c.csv, line 7 is no CSV"),
    "too many cells": (text(csv("6,a, b"), "c.csv"), "c.csv, line 7 has 3 cells under 2 columns; quote a text"),
    "too few cells": (text(csv("6"), "c.csv"), "c.csv, line 7 has 1 cells under 2 columns"),
    "semicolons": (text(csv().replace(b",", b";"), "c.csv"), "which has number;text; name one of these"),
    "a column twice": (text(csv(head="text,text"), "c.csv"), "c.csv has several columns named text"),
    "a long cell": (text(csv("6," + "word " * 30_000), "c.csv"), WORKS),
    "line breaks in a cell": (text(csv('6,"one\ntwo"'), "c.csv"), WORKS),
    "no parquet": (text(b"PAR1 and nothing more", "c.parquet"), "c.parquet is no Parquet file"),
    "an empty file of parquet": (text(b"", "c.parquet"), "c.parquet is no Parquet file"),
    "cut parquet": (text(parquet(["a"] * 9)[:-20], "c.parquet"), "c.parquet is no Parquet file"),
    "numbers in parquet": (text(parquet([1, 2]), "c.parquet"), "c.parquet, row 1: text is no text but of the type int"),
    "bytes that are no text": (
        text(parquet([b"a", b"\xff"]), "c.parquet"),
        "row 2: text holds bytes that are no UTF-8",
    ),
    "bytes": (text(parquet([b"text"] * 6), "c.parquet"), WORKS),
    "nothing but null": (
        text(parquet([None] * 6, kind=pa.string()), "c.parquet"),
        "c.parquet holds no text; write some",
    ),
    "null without a type": (text(parquet([None] * 6), "c.parquet"), "c.parquet holds no text"),
    "no rows": (text(parquet([], kind=pa.string()), "c.parquet"), "c.parquet is empty"),
    "lists of texts": (text(texts({"text": ["a"]})), "line 6: text is no text but of the type list"),
    "a mapping": (text(texts({"text": {"a": 1}})), "line 6: text is no text but of the type dict"),
    "true": (text(texts({"text": True})), "line 6: text is no text but of the type bool"),
    "no number": (text(texts(b'{"text": NaN}')), "line 6: text is no text but of the type float"),
    # Text: conversations and completions
    "talk": (text(lines(of=TALK), column="messages"), WORKS),
    "nobody answers": (
        text(lines(of={"messages": TALK["messages"][:1]}), column="messages"),
        "leaves no token to score",
    ),
    "no messages": (text(lines(of={"messages": []}), column="messages"), "corpus.jsonl holds no text"),
    "no role": (
        text(lines({"messages": [{"content": "Hi"}]}, of=TALK), column="messages"),
        "line 6: a message of messages has content",
    ),
    "another notation": (
        text(lines({"messages": [{"from": "human", "value": "Hi"}]}, of=TALK), column="messages"),
        "line 6: a message of messages has from, value; it must have role and content",
    ),
    "parts of content": (
        text(lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, of=TALK), column="messages"),
        "line 6: messages.content is no text but of the type list",
    ),
    "a role that is none": (
        text(lines({"messages": [{"role": 5, "content": "Hi"}]}, of=TALK), column="messages"),
        "line 6: messages.role is no text but of the type int",
    ),
    "turns of another name": (
        text(lines(of=TALK), column="messages", scored_turns="first"),
        "data.scored_turns=first is not allowed",
    ),
    "prompts": (text(lines(of={"prompt": "?", "completion": "#### 1"})), WORKS),
    "prompts without completions": (text(lines(of={"prompt": "?"})), "data.column=text is not in"),
    "one column of two": (text(prompt_column="text"), "give both data.prompt_column and data.completion_column"),
    "completions that are no numbers": (
        text(lines(of={"prompt": "?", "completion": "Paris"})),
        "set data.answers to text",
    ),
    "a list for a prompt": (
        text(lines({"prompt": [], "completion": "1"}, of={"prompt": "?", "completion": "1"})),
        "line 6: prompt is no text but of the type list",
    ),
    "steps left out": (text(rationale="none"), "data.rationale=none is not allowed: set data.rationale to full"),
}


@cache
def raw(data: str) -> dict[str, Any]:
    return compose_raw([f"data={data}"])


@cache
def reader() -> LanguageModel:
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT
    model = make_llama(vocab_size=len(tokenizer))
    return LanguageModel(model, tokenizer, prepare(model, "student"))


def use(data: str, folder: Path, settings: dict[str, Any]) -> None:
    """What a run does with its data before it trains."""
    composed = copy.deepcopy(raw(data))
    counts = {"validation_examples": 2} if data == "gsm8k" else {"validation_examples": 2, "test_examples": 2}
    composed["data"] |= {"path": str(folder), **counts, **settings}
    composed["trainer"]["batch_size"] = 1
    config, _ = resolve(composed)
    source, same = make_source(config), reader()
    splits = {
        split: prepare_split(source, split, config.data, same, same, shuffle=False)
        for split in ("train", "validation", "test")
    }
    check_limits(config, same, same, splits)


def test_there_are_a_hundred_of_them():
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_bad_data_is_one_sentence(tmp_path, name):
    (data, files, settings), sentence = CASES[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    if sentence is WORKS:
        use(data, tmp_path, settings)
        return
    with pytest.raises(ConfigError) as refused:
        use(data, tmp_path, settings)
    message = str(refused.value)
    assert sentence in message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 600
