"""GSM8K (openai/gsm8k, MIT licence): from the hub, or from a folder that holds `train.jsonl` and `test.jsonl`.

The data set has no validation split; it is carved from the end of a fixed shuffle of the training split, the same in
every run whatever its seed. Imports no torch.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from kv_align.config.options import PositiveInt
from kv_align.data.example import DataSource, Example, Split, first_examples
from kv_align.data.table import Table, hub_tables, read_table, text_of

# A calculator call such as <<48/2=24>>, which the authors inserted into the human solutions.
_CALCULATOR = re.compile(r"<<[^>]*>>")
_THOUSANDS = re.compile(r"\D*[1-9]\d{0,2}(?:,\d{2,3})*,\d{3}(?:\.\d*)?\D*")
_COLUMNS = ("question", "answer")


class GSM8K(DataSource):
    """Grade-school word problems with worked solutions.

    Parameters
    ----------
    path
        A folder with `train.jsonl` and `test.jsonl`, which are read at once; empty: the hub's data set of that name.
    hub_name
        Where to find it on the hub.
    validation_examples
        How many training problems become the validation split.
    train_examples
        How many of the others are trained on; None: all.

    Raises
    ------
    ValueError
        If a file is missing or cannot be read, or a row has no question, or no answer after `####`.
    """

    def __init__(
        self,
        *,
        path: str = "",
        hub_name: str = "openai/gsm8k",
        validation_examples: PositiveInt = 512,
        train_examples: PositiveInt | None = None,
    ) -> None:
        self._path, self._hub_name = path, hub_name
        self._validation_examples, self._train_examples = validation_examples, train_examples
        if path:
            self.files = tuple(Path(path) / f"{split}.jsonl" for split in ("train", "test"))
            for file in self.files:
                if not file.is_file():
                    raise ValueError(f"data.path={path} holds no {file.name}; name the folder with the GSM8K files")
            self.examples("train")
            self.examples("test")

    def examples(self, split: Split) -> list[Example]:
        """Return the problems of a split, in a fixed order."""
        if split == "test":
            return list(_problems(self._table("test"), "test"))
        train = _shuffled(self._table("train"))
        if self._validation_examples >= len(train):
            raise ValueError(
                f"data.validation_examples={self._validation_examples} leaves nothing of the {len(train)} training "
                "problems: lower it"
            )
        held_out = len(train) - self._validation_examples
        return train[held_out:] if split == "validation" else first_examples(train[:held_out], self._train_examples)

    def _table(self, split: Literal["train", "test"]) -> Table:
        if self._path:
            return read_table(Path(self._path) / f"{split}.jsonl", _COLUMNS)
        tables = hub_tables(self._hub_name, "main", _COLUMNS)
        if split not in tables:
            raise ValueError(
                f"data.hub_name={self._hub_name} has no split {split}, but {', '.join(tables)}; name another"
            )
        return tables[split]


@lru_cache(maxsize=4)
def _shuffled(table: Table) -> list[Example]:
    train = list(_problems(table, "train"))
    random.Random("kv-align gsm8k validation").shuffle(train)
    return train


@lru_cache(maxsize=4)
def _problems(table: Table, split: str) -> tuple[Example, ...]:
    for column in _COLUMNS:
        if column not in table.columns:
            raise ValueError(
                f"{table.name} has no column {column}, but {', '.join(table.columns)}; GSM8K has question and answer"
            )
    rows = enumerate(zip(table.rows, table.places, strict=True))
    return tuple(parse_row(f"{split}-{index}", row, place) for index, (row, place) in rows)


def parse_row(identifier: str, row: dict[str, Any], place: str) -> Example:
    """Return a row of the data set as an example: calculator calls removed, a step a line, thousands without commas.

    Raises
    ------
    ValueError
        If it has no question or no answer, naming its place.
    """
    question, written = (text_of(row.get(column), place, column) for column in _COLUMNS)
    if question is None or written is None:
        missing = "question" if question is None else "answer"
        raise ValueError(f"{place} has no {missing}; write one, or remove the row")
    solution, separator, answer = written.rpartition("####")
    if not separator:
        raise ValueError(f"{place} has no answer after ####; write one, or remove the row")
    lines = (" ".join(_CALCULATOR.sub("", line).split()) for line in solution.splitlines())
    steps = tuple(line for line in lines if line)
    answer = answer.strip()
    if _THOUSANDS.fullmatch(answer):
        answer = re.sub(r"(?<=\d),(?=\d)", "", answer)
    return Example(identifier, " ".join(question.split()), steps, answer)
