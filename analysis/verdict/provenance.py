"""Whether the runs that are compared were made alike: one commit, one set of packages, one teacher, one kind of device.

A difference between two arms is also one between the codes that they ran; that it is not is checked here, pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from analysis.verdict.comparison import ArmComparison
from analysis.words import count, listed

KINDS = {
    "git_commits": ("git commit", "git commits"),
    "packages": ("set of package versions", "sets of package versions"),
    "teacher_sha256": ("teacher", "teachers"),
    "device": ("device", "devices"),
}
"""Columns of `runs`, and what one and several of their values are called."""
SHOWN = 6


def origins(runs: pd.DataFrame, used: Iterable[str]) -> dict[str, list[str]]:
    """Return the different values of every column of `KINDS` among the runs that are used; what is not known is one."""
    own = runs.loc[[run for run in used if run in runs.index]]
    return {column: list(dict.fromkeys(own[column].fillna("").replace("", "unknown"))) for column in KINDS}


def origin_sentences(by_kind: dict[str, list[str]]) -> tuple[tuple[str, ...], bool]:
    """Say of each kind whether there is one or several, and whether any is mixed."""
    sentences, mixed = [], False
    for column, values in by_kind.items():
        one, many = KINDS[column]
        if len(values) == 1:
            sentences.append(f"One {one}: {values[0]}.")
        elif values:
            mixed = True
            more = f"; and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
            sentences.append(f"Mixed: {count(len(values), one, many)} ({'; '.join(values[:SHOWN])}{more}).")
    return tuple(sentences), mixed


def pairs_made_differently(
    runs: pd.DataFrame, comparison: ArmComparison, by_cell: dict[tuple[str, str, int], str]
) -> str:
    """Return a warning where the two runs of a pair differ in what made them; empty where none do.

    Parameters
    ----------
    runs
        Of `analysis.read.collect`.
    comparison
        Whose pairs are looked at.
    by_cell
        The run of each (arm, group, seed).
    """
    pairs = [(by_cell[*comparison.arm, seed], by_cell[*comparison.against, seed]) for seed in comparison.pairs.seeds]
    differing = []
    for column, (_, many) in KINDS.items():
        values = runs[column].fillna("")
        number = sum(values.get(a, "") != values.get(b, "") for a, b in pairs)
        if number:
            differing.append(f"{many} in {number}")
    if not differing:
        return ""
    return (
        f"Of the {count(len(pairs), 'pair')} of the primary comparison the two runs have different {listed(differing)}: "
        "what these change is part of the difference."
    )
