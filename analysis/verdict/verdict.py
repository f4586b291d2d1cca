"""Criteria and statistics into a verdict on three declared levels. Says what was decided, not in which words.

    minimum   every planned run ended, both arms trained to the end, and the arm is not worse by more than is tolerated
    ideal     minimum, and the improvement that was asked for, better than the control, learning faster, aligned better,
              nothing collapsed
    paper     ideal, and the decision p below alpha, full coverage, and everything as it was declared before the runs

While the sweep is not covered as declared nothing is tested and no level is judged: there are estimates only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analysis.design.cells import Grid, coverage
from analysis.design.criteria import Criteria
from analysis.design.pairing import PairedGrid
from analysis.verdict.comparison import ArmComparison, estimate
from analysis.verdict.declared_comparisons import primary_comparison
from analysis.verdict.levels import Check, ideal_checks, minimum_checks, paper_checks
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
    levels
        minimum, ideal, paper.
    ended, expected
        Runs.
    complete
        Whether the sweep is covered as declared.
    exploratory
        Why the report is exploratory, in sentences; empty where everything is as it was declared.
    control
        The primary arm against the control it must beat; None where the sweep lacks that.
    area, probe
        The primary comparison in training area and probe R²; None where the sweep lacks its arms.
    """

    primary: ArmComparison | None
    levels: tuple[Level, ...]
    ended: int
    expected: int
    complete: bool
    exploratory: tuple[str, ...]
    control: ArmComparison | None
    area: ArmComparison | None
    probe: ArmComparison | None

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
    paired = paired or PairedGrid(grid.cells)
    ended, expected = coverage(grid.cells)
    complete = ended >= criteria.coverage * expected
    primary = primary_comparison(paired, grid, criteria)
    if primary is None:
        levels = tuple(Level(name, (), None) for name in LEVELS)
        return Verdict(None, levels, ended, expected, complete, exploratory, None, None, None)
    if complete:
        primary = decide_alone(primary, criteria)
    control = _against_control(paired, grid, criteria, primary)
    area = _other(paired, criteria, primary, "training_area", lower_is_better=True)
    probe = _other(paired, criteria, primary, "probe_r2", lower_is_better=False)
    own = {
        "minimum": minimum_checks(paired, primary, criteria, ended, expected),
        "ideal": ideal_checks(paired, primary, control, area, probe, criteria),
        "paper": paper_checks(primary, criteria, ended, expected, exploratory),
    }
    below, levels_ = True, []
    for name in LEVELS:
        below = below and all(check.passed for check in own[name])
        levels_.append(Level(name, own[name], below if complete else None))
    return Verdict(primary, tuple(levels_), ended, expected, complete, exploratory, control, area, probe)


def _against_control(
    paired: PairedGrid, grid: Grid, criteria: Criteria, primary: ArmComparison
) -> ArmComparison | None:
    own = grid.group_of(criteria.ideal.better_than, primary.group)
    if own is None:
        return None
    cell = (criteria.ideal.better_than, own)
    return estimate(paired, "contrast", f"against {cell[0]}", primary.arm, cell, primary.group, criteria)


def _other(
    paired: PairedGrid, criteria: Criteria, primary: ArmComparison, metric: str, *, lower_is_better: bool
) -> ArmComparison:
    return estimate(
        paired,
        "contrast",
        metric,
        primary.arm,
        primary.against,
        primary.group,
        criteria,
        metric=metric,
        lower_is_better=lower_is_better,
    )
