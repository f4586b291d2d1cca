"""GSM8K (openai/gsm8k, MIT licence): from the hub, or from a folder that holds `train.jsonl` and `test.jsonl`.

The data set has no validation split; it is carved from the end of a fixed shuffle of the training split, the same in
every run whatever its seed. Imports no torch.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from kv_align.config.options import PositiveInt
from kv_align.data.example import DataSource, Example, Split

# A calculator call such as <<48/2=24>>, which the authors inserted into the human solutions.
_CALCULATOR = re.compile(r"<<[^>]*>>")


class GSM8K(DataSource):
    """Grade-school word problems with worked solutions.

    Parameters
    ----------
    path
        A folder with `train.jsonl` and `test.jsonl`; empty: the hub's data set of that name.
    hub_name
        Where to find it on the hub.
    validation_examples
        How many training problems become the validation split.

    Raises
    ------
    ValueError
        If a file is missing, or a row has no answer after `####`.
    """

    def __init__(
        self,
        *,
        path: str = "",
        hub_name: str = "openai/gsm8k",
        validation_examples: PositiveInt = 512,
    ) -> None:
        for file in ("train.jsonl", "test.jsonl"):
            if path and not (Path(path) / file).is_file():
                raise ValueError(f"data.path={path} holds no {file}; name the folder with the GSM8K files")
        self._path, self._hub_name, self._validation_examples = path, hub_name, validation_examples

    def examples(self, split: Split) -> list[Example]:
        """Return the problems of a split, in a fixed order."""
        if split == "test":
            return [parse_row(f"test-{index}", row) for index, row in enumerate(self._rows("test"))]
        train = [parse_row(f"train-{index}", row) for index, row in enumerate(self._rows("train"))]
        if self._validation_examples >= len(train):
            raise ValueError(
                f"data.validation_examples={self._validation_examples} leaves nothing of the {len(train)} training "
                "problems: lower it"
            )
        random.Random("kv-align gsm8k validation").shuffle(train)
        held_out = len(train) - self._validation_examples
        return train[:held_out] if split == "train" else train[held_out:]

    def _rows(self, file_split: str) -> list[dict[str, Any]]:
        import datasets

        datasets.disable_progress_bars()

        if not self._path:
            return list(datasets.load_dataset(self._hub_name, "main", split=file_split))
        return list(datasets.Dataset.from_json(str(Path(self._path) / f"{file_split}.jsonl")))


def parse_row(identifier: str, row: dict[str, Any]) -> Example:
    """Return a row of the data set as an example: calculator calls removed, a step a line, commas out of the answer."""
    solution, separator, answer = str(row["answer"]).rpartition("####")
    if not separator:
        raise ValueError(f"GSM8K row {identifier} has no answer after ####")
    lines = (" ".join(_CALCULATOR.sub("", line).split()) for line in solution.splitlines())
    steps = tuple(line for line in lines if line)
    return Example(identifier, " ".join(str(row["question"]).split()), steps, answer.strip().replace(",", ""))
