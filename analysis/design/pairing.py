"""Pairs of runs with the same seed, and the audit that they may be paired.

A seed fixes the student's start and the data order in every arm, and all arms read the same data, teacher and tokenizers.
That is not believed but checked: the hashes of all of them were recorded when the run was built, and what does not match is
refused, with the reason. Runs of version 0.1.0 recorded no inputs; they are paired, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.design.cells import DIVERGED, FINISHED, HASHES
from analysis.stats.checks import BoolArray, FloatArray

_HASH_NAMES = dict(zip(HASHES, ("data order", "student start"), strict=True))


@dataclass(frozen=True)
class Unpaired:
    """A seed that gives no pair.

    Attributes
    ----------
    seed
        Which.
    reason
        What is missing, or does not match.
    refused
        Whether both runs ended and the audit refused them.
    """

    seed: int
    reason: str
    refused: bool


@dataclass(frozen=True, eq=False)
class Pairs:
    """The paired values of two arms; n pairs in the order of their seeds.

    Attributes
    ----------
    seeds
        (n,)
    values, reference
        (n,) of the arm and of what it is compared with; NaN where that run diverged.
    diverged, reference_diverged
        (n,)
    unpaired
        Planned seeds that gave no pair.
    """

    seeds: tuple[int, ...]
    values: FloatArray
    reference: FloatArray
    diverged: BoolArray
    reference_diverged: BoolArray
    unpaired: tuple[Unpaired, ...]

    @property
    def differences(self) -> FloatArray:
        """(n,) arm minus reference, NaN where a run of the pair diverged."""
        return self.values - self.reference

    @property
    def finished(self) -> BoolArray:
        """(n,) whether both runs have a value."""
        return ~(self.diverged | self.reference_diverged)

    @property
    def num_planned(self) -> int:
        """Pairs and unpaired seeds."""
        return len(self.seeds) + len(self.unpaired)


class PairedGrid:
    """The cells by arm, group and seed, for quick look-up.

    Parameters
    ----------
    cells
        DataFrame with the columns of `analysis.design.cells.COLUMNS`.
    complete
        Whether as many runs ended as was declared. Where they did not nothing is tested, and there are no intervals
        either: an interval that excludes zero is a test in all but name.
    """

    def __init__(self, cells: pd.DataFrame, *, complete: bool = True) -> None:
        self.complete = complete
        self._cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        columns = [cells[name].tolist() for name in cells.columns]
        for values in zip(*columns, strict=True):
            row = dict(zip(cells.columns, values, strict=True))
            self._cells.setdefault((row["arm"], row["group"]), {})[int(row["seed"])] = row

    def cell(self, arm: str, group: str) -> dict[int, dict[str, Any]]:
        """Rows of an arm by seed; empty where there is no such arm."""
        return self._cells.get((arm, group), {})

    def pair(self, arm: tuple[str, str], reference: tuple[str, str], metric: str) -> Pairs:
        """Pair two arms, each (arm, group), by seed.

        A seed that one of them was not planned with is no pair and not counted as missing.
        """
        ours, theirs = self.cell(*arm), self.cell(*reference)
        kept: list[tuple[int, float, float, bool, bool]] = []
        unpaired = []
        for seed in sorted(ours.keys() & theirs.keys()):
            a, b = ours[seed], theirs[seed]
            lost = [_lost(f"{name} is {row['state']}", row, metric) for (name, _), row in ((arm, a), (reference, b))]
            reasons = [reason for reason in lost if reason]
            if reasons:
                unpaired.append(Unpaired(seed, "; ".join(reasons), False))
                continue
            mismatch = audit(a, b)
            if mismatch:
                unpaired.append(Unpaired(seed, mismatch, True))
                continue
            diverged, reference_diverged = a["state"] == DIVERGED, b["state"] == DIVERGED
            value = np.nan if diverged else float(a[metric])
            kept.append((seed, value, np.nan if reference_diverged else float(b[metric]), diverged, reference_diverged))
        return Pairs(
            tuple(entry[0] for entry in kept),
            np.array([entry[1] for entry in kept], dtype=np.float64),
            np.array([entry[2] for entry in kept], dtype=np.float64),
            np.array([entry[3] for entry in kept], dtype=bool),
            np.array([entry[4] for entry in kept], dtype=bool),
            tuple(unpaired),
        )


def audit(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Return why two runs may not be paired; empty if they may."""
    reasons = []
    for column, name in _HASH_NAMES.items():
        ours, theirs = a.get(column), b.get(column)
        if not (isinstance(ours, str) and ours and isinstance(theirs, str) and theirs):
            reasons.append(f"the hash of the {name} was not recorded")
        elif ours != theirs:
            reasons.append(f"the {name} differs ({ours[:8]} and {theirs[:8]})")
    return "; ".join([*reasons, *_different_inputs(inputs_of(a), inputs_of(b))])


def inputs_of(row: Mapping[Any, Any]) -> dict[str, Any]:
    """What a cell's run read, as SHA-256 by name; empty where it did not record it."""
    text = row.get("inputs")
    inputs = json.loads(text) if isinstance(text, str) and text else None
    return inputs if isinstance(inputs, dict) else {}


def _different_inputs(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Say which inputs of a pair differ; none where one of the runs recorded none at all."""
    reasons = []
    for name in sorted(a.keys() | b.keys()) if a and b else []:
        ours, theirs = a.get(name), b.get(name)
        # The source of an aligner or a loss is what arms differ in, and an arm that learns from no teacher reads none.
        of_arm = name.startswith("source ") or (name.startswith("teacher") and (ours is None or theirs is None))
        if ours != theirs and not of_arm:
            shown = " and ".join("none" if value is None else str(value)[:8] for value in (ours, theirs))
            reasons.append(f"the input {name} differs ({shown})")
    return reasons


def _lost(what: str, row: dict[str, Any], metric: str) -> str:
    """Why a run gives no value; empty if it does, or diverged."""
    if row["state"] == DIVERGED:
        return ""
    if row["state"] != FINISHED:
        return f"{what} ({row['reason']})" if row["reason"] else what
    value = row[metric]
    if value is None or not np.isfinite(value):
        return f"{what}, but has no {metric}"
    return ""
