"""Pairs of runs with the same seed, and the audit that they may be paired.

A seed fixes the student's start and the data order in every arm. That is not believed but checked: both hashes were
recorded when the run was built, and what does not match is refused, with the reason.
"""

from __future__ import annotations

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
    """

    def __init__(self, cells: pd.DataFrame) -> None:
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
            tuple(each[0] for each in kept),
            np.array([each[1] for each in kept], dtype=np.float64),
            np.array([each[2] for each in kept], dtype=np.float64),
            np.array([each[3] for each in kept], dtype=bool),
            np.array([each[4] for each in kept], dtype=bool),
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
    return "; ".join(reasons)


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
