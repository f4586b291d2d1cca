"""Any text: a local file or folder (txt, JSONL, Parquet, CSV), or a data set on the hub, through `datasets`.

All tokens are scored. Where a source has no validation or test split, they are carved from the end of a fixed shuffle
of its training split. Imports no torch.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

from kv_align.config.options import PositiveInt
from kv_align.data.example import DataSource, Example, Split

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class PlainText(DataSource):
    """Texts of one column.

    Parameters
    ----------
    path
        A file, or a folder of files of one kind; those named train*, validation* and test* are these splits.
    hub_name, hub_config
        The data set on the hub to use where `path` is empty, and its configuration.
    column
        The column that holds the text.
    validation_examples, test_examples
        How many texts are carved for a split that the source does not have.

    Raises
    ------
    ValueError
        If neither or both of `path` and `hub_name` are given, or a file, column or enough texts are missing.
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
    ) -> None:
        if bool(path) == bool(hub_name):
            raise ValueError("give either data.path or data.hub_name")
        if path:
            _files(Path(path))
        self._path, self._hub_name, self._hub_config = path, hub_name, hub_config
        self._column = column
        self._carved = {"validation": validation_examples, "test": test_examples}
        self._splits: dict[Split, list[Example]] = {}

    def examples(self, split: Split) -> list[Example]:
        """Return the texts of a split, in a fixed order."""
        if not self._splits:
            self._splits = self._carve(self._load())
        return self._splits[split]

    def _load(self) -> dict[str, list[str]]:
        import datasets

        datasets.disable_progress_bars()

        if self._hub_name:
            loaded = datasets.load_dataset(self._hub_name, self._hub_config or None)
        else:
            kind, files = _files(Path(self._path))
            loaded = datasets.load_dataset(kind, data_files=files)
        return {str(name): self._texts(table) for name, table in loaded.items()}

    def _texts(self, table: Any) -> list[str]:
        if self._column not in table.column_names:
            raise ValueError(
                f"data.column={self._column} is not in the data, which has {', '.join(table.column_names)}; name one of these"
            )
        return [str(text) for text in table[self._column] if text is not None and str(text).strip()]

    def _carve(self, found: dict[str, list[str]]) -> dict[Split, list[Example]]:
        if "train" not in found:
            raise ValueError(
                f"data.hub_name={self._hub_name} has no split named train, but {', '.join(found)}; choose another data set"
            )
        train = [Example(f"train-{index}", "", (text,), None) for index, text in enumerate(found["train"])]
        random.Random("kv-align text splits").shuffle(train)
        splits: dict[Split, list[Example]] = {}
        for split in ("validation", "test"):
            if split in found:
                texts = enumerate(found[split])
                splits[split] = [Example(f"{split}-{index}", "", (text,), None) for index, text in texts]
                continue
            count = self._carved[split]
            if count >= len(train):
                raise ValueError(
                    f"data.{split}_examples={count} leaves nothing of the {len(train)} texts for training; lower it"
                )
            splits[split], train = train[-count:], train[:-count]
        return {"train": train, **splits}


def _files(path: Path) -> tuple[str, dict[str, list[str]]]:
    """Return the reader of the files and the files of each split."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in _READERS]
    kinds = {_READERS[file.suffix] for file in files}
    if len(kinds) != 1:
        known = ", ".join(_READERS)
        raise ValueError(f"data.path={path} holds {len(kinds)} kinds of text files; it must hold one of {known}")
    splits: dict[str, list[str]] = {}
    for file in files:
        named = next((split for split in ("validation", "test") if file.name.startswith(split)), "train")
        splits.setdefault(named, []).append(str(file))
    if "train" not in splits:
        raise ValueError(f"data.path={path} holds no training text; add a file that is not named validation or test")
    return kinds.pop(), splits
