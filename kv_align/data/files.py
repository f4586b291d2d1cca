"""Which local files a data source reads, and which split each of them is. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from kv_align.data.example import Split
from kv_align.data.table import SUFFIXES

_SPLIT_WORDS: dict[Split, str] = {
    "train": "train|training",
    "validation": "validation|validate|validating|valid|val|development|devel|dev|evaluation|eval|holdout|heldout",
    "test": "test|testing",
}
_WORD = {split: re.compile(rf"(?:{words})(?:set|split|data|file|s)?") for split, words in _SPLIT_WORDS.items()}


def split_of(name: str) -> Split | None:
    """Return the split that a file's or a split's name says (val_1, my-dev-set, train); None where it says none.

    Raises
    ------
    ValueError
        If it says more than one.
    """
    words = re.findall(r"[a-z]+", name.lower())
    splits = [split for split, word in _WORD.items() if any(map(word.fullmatch, words))]
    if len(splits) > 1:
        raise ValueError(f"{name} could be {' or '.join(splits)}; rename it after one of these")
    return splits[0] if splits else None


def split_files(path: Path) -> dict[Split, list[Path]]:
    """Return the text files of each split: a file, or all of one kind in a folder. Files that name no split are training.

    Raises
    ------
    ValueError
        If there are none or several kinds, or none for training.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in SUFFIXES and file.name[0] != "." and file.is_file()]
    kinds = {SUFFIXES[file.suffix.lower()] for file in files}
    if len(kinds) != 1:
        known = ", ".join(SUFFIXES)
        raise ValueError(f"data.path={path} holds {len(kinds)} kinds of text files; it must hold one of {known}")
    splits: dict[Split, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file.stem) or "train", []).append(file)
    if "train" not in splits:
        raise ValueError(f"data.path={path} holds no training text; add a file that is not named validation or test")
    return splits
