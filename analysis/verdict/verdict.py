"""Criteria and statistics into a verdict on three declared levels. Says what was decided, not in which words.

    minimum   every planned run ended, harm beyond what is tolerated is excluded, and the arm is not shown to be worse
    ideal     minimum, and estimates as they were asked for: the improvement, and every further step of the sequence on its
              side; nothing collapsed
    paper     ideal, and the whole sequence of tests shown, full coverage, and everything as it was declared before the runs

While the sweep is not covered as declared nothing is tested and no level is judged: there are estimates only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from analysis.design.cells import Grid, coverage
from analysis.design.criteria import Criteria
from analysis.design.pairing import PairedGrid
from analysis.verdict.comparison import ArmComparison
from analysis.verdict.declared_comparisons import primary_comparison
from analysis.verdict.levels import Check, ideal_checks, minimum_checks, paper_checks
from analysis.verdict.sequence import StepResult, run_sequence
from analysis.verdict.testing import decide_alone

LevelName = Literal["minimum", "ideal", "paper"]
LEVELS: tuple[LevelName, ...] = ("minimum", "ideal", "paper")


@dataclass(frozen=True)
class Level:
    """A declared level and its own conditions; it is reached when they and those of the levels below it hold.

    Attributes
    ----------
    name
        Of the level.
    checks
        Its own conditions.
    reached
        None where nothing was judged.
    """

    name: LevelName
    checks: tuple[Check, ...]
    reached: bool | None


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a sweep shows.

    Attributes
    ----------
    primary
        The declared primary comparison; None where the sweep lacks its arms.
    sequence
        The declared tests in their order, the primary first; empty where there is none.
    levels
        minimum, ideal, paper.
    ended, expected
        Runs.
    complete
        Whether the sweep is covered as declared.
    exploratory
        Why the report is exploratory, in sentences; empty where everything is as it was declared.
    """

    primary: ArmComparison | None
    sequence: tuple[StepResult, ...]
    levels: tuple[Level, ...]
    ended: int
    expected: int
    complete: bool
    exploratory: tuple[str, ...]

    def reached(self, name: LevelName) -> bool | None:
        """Whether a level was reached; None where it was not judged."""
        return self.levels[LEVELS.index(name)].reached


def decide(
    grid: Grid, criteria: Criteria, exploratory: tuple[str, ...] = (), paired: PairedGrid | None = None
) -> Verdict:
    """Judge a sweep.

    Parameters
    ----------
    grid, criteria
        What was found, and what was declared.
    exploratory
        Why this report is not the declared one.
    paired
        The same cells by arm, group and seed, where they are at hand already.
    """
    paired = paired or paired_grid(grid, criteria)
    ended, expected = coverage(grid.cells)
    primary = primary_comparison(paired, grid, criteria)
    if primary is None:
        levels = tuple(Level(name, (), None) for name in LEVELS)
        return Verdict(None, (), levels, ended, expected, paired.complete, exploratory)
    if paired.complete:
        primary = decide_alone(primary, criteria)
    sequence = run_sequence(paired, grid, criteria, primary)
    own = {
        "minimum": minimum_checks(primary, criteria, ended, expected),
        "ideal": ideal_checks(paired, primary, sequence, criteria),
        "paper": paper_checks(sequence, criteria, ended, expected, exploratory),
    }
    below, judged = True, []
    for name in LEVELS:
        below = below and all(check.passed for check in own[name])
        judged.append(Level(name, own[name], below if paired.complete else None))
    return Verdict(primary, sequence, tuple(judged), ended, expected, paired.complete, exploratory)


def paired_grid(grid: Grid, criteria: Criteria) -> PairedGrid:
    """The cells of a grid for pairing; complete if as many of its runs ended as the criteria declare."""
    ended, expected = coverage(grid.cells)
    needed = math.ceil(criteria.coverage * expected - 1e-9)  # 0.55 of 100 are 55, not a little more
    return PairedGrid(grid.cells, complete=ended >= needed)
