"""Any text: a local file or folder (txt, JSONL, Parquet, CSV), or a data set on the hub.

A column of texts is scored whole; one of messages where the assistant speaks, as the tokenizer's chat template writes it;
of a prompt and its completion, the second. Where a source has no validation or test split, they are carved from the end of
a fixed shuffle of its training split. Imports no torch.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from kv_align.config.options import PositiveInt
from kv_align.data.example import DataSource, Example, Split, Turn, first_examples
from kv_align.data.files import split_files, split_of
from kv_align.data.table import Table, hub_tables, read_table, text_of

LOGGER = logging.getLogger(__name__)


class _Columns(NamedTuple):
    """Where a table's texts are: in one column, or in a prompt's and its completion's."""

    text: str
    prompt: str | None
    completion: str | None

    def wanted(self) -> tuple[str, ...]:
        return (self.text, *self.pair())

    def pair(self) -> tuple[str, str]:
        return (self.prompt or "prompt", self.completion or "completion")


class PlainText(DataSource):
    """Texts, conversations, or prompts with their completions.

    Parameters
    ----------
    path
        A file, or a folder of files of one kind, which are read at once; those with a word for training (train), validation
        (val, valid, validation, dev, eval) or test in their names are these splits, others are for training.
    hub_name, hub_config
        The data set on the hub to use where `path` is empty, and its configuration.
    column
        The column that holds the text, or a list of messages with `role` and `content`.
    validation_examples, test_examples
        How many texts are carved for a split that the source does not have.
    prompt_column, completion_column
        The columns of question and answer, read in place of `column`; None: prompt and completion, where there is no
        `column`. Reasoning may stand before the last `####` of a completion.
    scored_turns
        Which of the assistant's messages are scored: all (None), or the last alone.
    train_examples
        How many of the training texts are used; None: all.

    Raises
    ------
    ValueError
        If neither or both of `path` and `hub_name` are given, a file, column or enough texts are missing, or one of them is
        not what it should be.
    """

    has_reasoning: ClassVar[bool] = False

    def __init__(
        self,
        *,
        path: str,
        hub_name: str,
        hub_config: str,
        column: str,
        validation_examples: PositiveInt,
        test_examples: PositiveInt,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        scored_turns: Literal["all", "last"] | None = None,
        train_examples: PositiveInt | None = None,
    ) -> None:
        if bool(path) == bool(hub_name):
            raise ValueError("give either data.path or data.hub_name")
        if (prompt_column is None) != (completion_column is None):
            raise ValueError("give both data.prompt_column and data.completion_column, or neither")
        self._hub_name, self._hub_config = hub_name, hub_config
        self._columns = _Columns(column, prompt_column, completion_column)
        self._last_turn = scored_turns == "last"
        self._carved: tuple[tuple[Split, int], ...] = (("validation", validation_examples), ("test", test_examples))
        self._train_examples = train_examples
        self._tables: dict[Split, list[Table]] = {}
        if path:
            files = split_files(Path(path))
            self.files = tuple(file for each in files.values() for file in each)
            for split, each in files.items():
                self._tables[split] = [read_table(file, self._columns.wanted()) for file in each]
            self.examples("train")

    def examples(self, split: Split) -> list[Example]:
        """Return the texts of a split, in a fixed order."""
        if not self._tables:
            self._tables = self._from_hub()
        tables = tuple((name, tuple(each)) for name, each in self._tables.items())
        examples = list(_splits(tables, self._columns, self._last_turn, self._carved)[split])
        return first_examples(examples, self._train_examples) if split == "train" else examples

    def _from_hub(self) -> dict[Split, list[Table]]:
        by_name = hub_tables(self._hub_name, self._hub_config or None, self._columns.wanted())
        tables: dict[Split, list[Table]] = {}
        for name, table in by_name.items():
            split = split_of(name)
            if split is not None and (name == split or split not in by_name):
                tables.setdefault(split, []).append(table)
        if "train" not in tables:
            raise ValueError(
                f"data.hub_name={self._hub_name} has no split named train, but {', '.join(by_name)}; choose another data set"
            )
        return tables


@lru_cache(maxsize=2)
def _splits(
    tables: tuple[tuple[Split, tuple[Table, ...]], ...],
    columns: _Columns,
    last_turn: bool,
    carved: tuple[tuple[Split, int], ...],
) -> dict[Split, list[Example]]:
    """Return the examples of each split; those that there are no tables for are carved from the training texts."""
    given = {split: _numbered(split, each, columns, last_turn) for split, each in tables}
    train = given["train"]
    random.Random("kv-align text splits").shuffle(train)
    splits: dict[Split, list[Example]] = {}
    for split, count in carved:
        if split in given:
            splits[split] = given[split]
            continue
        if count >= len(train):
            raise ValueError(
                f"data.{split}_examples={count} leaves nothing of the {len(train)} texts for training; lower it"
            )
        LOGGER.info(
            "there is no %s file: %d of the %d texts of the training files are kept apart for it (data.%s_examples)",
            *(split, count, len(train), split),
        )
        splits[split], train = train[-count:], train[:-count]
    return {"train": train, **splits}


def _numbered(split: Split, tables: tuple[Table, ...], columns: _Columns, last_turn: bool) -> list[Example]:
    """Return the rows that hold something, numbered without those that do not."""
    texts = [example for table in tables for example in _contents(table, columns, last_turn)]
    left_out = sum(len(table.rows) for table in tables) - len(texts)
    if not texts:
        raise ValueError(f"{tables[0].name} holds no text; write some, or remove it")
    if left_out:
        LOGGER.warning("%d rows of the %s split hold no text: left out", left_out, split)
    return [replace(example, id=f"{split}-{index}") for index, example in enumerate(texts)]


def _contents(table: Table, columns: _Columns, last_turn: bool) -> list[Example]:
    """Return the rows of a table that hold something, not numbered yet."""
    rows = zip(table.rows, table.places, strict=True)
    pair = columns.pair()
    if columns.prompt is None and columns.text in table.columns:
        contents = (_content(row.get(columns.text), place, columns.text, last_turn) for row, place in rows)
    elif set(pair) <= set(table.columns):
        contents = (_answered(row, place, *pair) for row, place in rows)
    else:
        key, column = ("column", columns.text) if columns.prompt is None else ("prompt_column", " and ".join(pair))
        raise ValueError(
            f"data.{key}={column} is not in {table.name}, which has {', '.join(table.columns)}; name one of these, or for "
            "questions with answers data.prompt_column and data.completion_column"
        )
    return [content for content in contents if content is not None]


def _content(value: Any, place: str, column: str, last_turn: bool) -> Example | None:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        turns = tuple(_turns(value, place, column, last_turn))
        return Example("", "", (), None, turns) if turns else None
    text = text_of(value, place, column)
    return Example("", "", (text,), None) if text is not None and text.strip() else None


def _answered(row: dict[str, Any], place: str, prompt_column: str, completion_column: str) -> Example | None:
    prompt, completion = (text_of(row.get(column), place, column) for column in (prompt_column, completion_column))
    if prompt is None or completion is None or not completion.strip():
        return None
    reasoning, _, answer = completion.rpartition("####")
    return Example("", prompt, (reasoning.rstrip("\n"),) if reasoning.strip() else (), answer.strip())


def _turns(messages: list[dict[str, Any]], place: str, column: str, last_turn: bool) -> Iterator[Turn]:
    spoken = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    scored = spoken[-1:] if last_turn else spoken
    for number, message in enumerate(messages):
        held = {key for key, value in message.items() if value is not None}
        if held != {"role", "content"}:
            raise ValueError(
                f"{place}: a message of {column} has {', '.join(sorted(map(str, held))) or 'nothing'}; it must have role and "
                "content, and nothing else"
            )
        role, content = (text_of(message[key], place, f"{column}.{key}") for key in ("role", "content"))
        yield Turn(str(role), str(content), number in scored)
