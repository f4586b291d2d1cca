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

from analysis.cells import FINISHED, Sweep, coverage
from analysis.compare import Comparison, estimate, primary_comparison
from analysis.criteria import Criteria
from analysis.deciding import decide_alone
from analysis.pairing import Grid
from analysis.significance import relative_percent
from analysis.words import declared_percent, p_text, percent, share

LevelName = Literal["minimum", "ideal", "paper"]
LEVELS: tuple[LevelName, ...] = ("minimum", "ideal", "paper")


@dataclass(frozen=True)
class Check:
    """One condition of a level.

    Attributes
    ----------
    asked
        The condition, in words.
    passed
        None where it cannot be judged.
    found
        What was found, in words.
    """

    asked: str
    passed: bool | None
    found: str


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

    primary: Comparison | None
    levels: tuple[Level, ...]
    ended: int
    expected: int
    complete: bool
    exploratory: tuple[str, ...]
    control: Comparison | None
    area: Comparison | None
    probe: Comparison | None

    def reached(self, name: LevelName) -> bool | None:
        """Whether a level was reached; None where it was not judged."""
        return self.levels[LEVELS.index(name)].reached


def decide(sweep: Sweep, criteria: Criteria, exploratory: tuple[str, ...] = (), grid: Grid | None = None) -> Verdict:
    """Judge a sweep.

    Parameters
    ----------
    sweep, criteria
        What was found, and what was declared.
    exploratory
        Why this report is not the declared one.
    grid
        The sweep's cells, where they are at hand already.
    """
    grid = grid or Grid(sweep.cells)
    ended, expected = coverage(sweep.cells)
    complete = ended >= criteria.coverage * expected
    primary = primary_comparison(grid, sweep, criteria)
    if primary is None:
        levels = tuple(Level(name, (), None) for name in LEVELS)
        return Verdict(None, levels, ended, expected, complete, exploratory, None, None, None)
    if complete:
        primary = decide_alone(primary, criteria)
    control = _against_control(grid, sweep, criteria, primary)
    area = _other(grid, criteria, primary, "training_area", lower_is_better=True)
    probe = _other(grid, criteria, primary, "probe_r2", lower_is_better=False)
    own = {
        "minimum": _minimum(grid, primary, criteria, ended, expected),
        "ideal": _ideal(grid, primary, control, area, probe, criteria),
        "paper": _paper(primary, criteria, ended, expected, exploratory),
    }
    below, levels_ = True, []
    for name in LEVELS:
        below = below and all(check.passed for check in own[name])
        levels_.append(Level(name, own[name], below if complete else None))
    return Verdict(primary, tuple(levels_), ended, expected, complete, exploratory, control, area, probe)


def _minimum(grid: Grid, primary: Comparison, criteria: Criteria, ended: int, expected: int) -> tuple[Check, ...]:
    cells = [row for cell in (primary.arm, primary.against) for row in grid.cell(*cell).values()]
    finished = sum(row["state"] == FINISHED for row in cells)
    interval = primary.summary.interval if primary.summary and not primary.conditional else None
    if interval is None:
        bound, shown = None, _no_interval(primary)
    else:
        bound, shown = interval.high < criteria.tolerated_nats, percent(relative_percent(interval.high))
    return (
        Check("all planned runs ended", ended == expected, f"{ended} of {expected}"),
        Check("both arms trained to the end", finished == len(cells), f"{finished} of {len(cells)} runs finished"),
        Check(
            f"upper {share(criteria.confidence)} bound of the difference in perplexity below "
            f"{declared_percent(criteria.minimum.tolerated_percent, signed=True)}",
            bound,
            shown,
        ),
    )


def _ideal(
    grid: Grid,
    primary: Comparison,
    control: Comparison | None,
    area: Comparison,
    probe: Comparison,
    criteria: Criteria,
) -> tuple[Check, ...]:
    mean = primary.summary.mean if primary.summary else None
    shown = "no pair" if mean is None else percent(relative_percent(mean))
    if mean is not None and mean <= -criteria.strong_nats:
        shown += f", beyond {declared_percent(-criteria.ideal.strong_percent)}"
    collapsed = [
        f"{row['arm']} seed {seed}"
        for cell in (primary.arm, primary.against)
        for seed, row in sorted(grid.cell(*cell).items())
        if row["variance_share_min"] is not None and row["variance_share_min"] < criteria.collapse_share
    ]
    return (
        Check(
            f"estimated difference in perplexity at most {declared_percent(-criteria.ideal.improvement_percent)}",
            None if mean is None else mean <= -criteria.improvement_nats,
            shown,
        ),
        _sign_check(f"better than the control {criteria.ideal.better_than}", control, relative=True),
        _sign_check("training loss falls faster (smaller area under it)", area, relative=False),
        _sign_check("higher probe R²", probe, relative=False),
        Check(
            f"no variance below {share(criteria.collapse_share)} of its start",
            not collapsed,
            "none" if not collapsed else ", ".join(collapsed[:4]) + (" and more" if len(collapsed) > 4 else ""),
        ),
    )


def _paper(
    primary: Comparison, criteria: Criteria, ended: int, expected: int, exploratory: tuple[str, ...]
) -> tuple[Check, ...]:
    p_value, floor = primary.p_value, primary.floor
    if p_value is None:
        passed, shown = None, primary.reason
    elif floor is not None and floor >= criteria.alpha:
        passed, shown = False, f"{len(primary.pairs.seeds)} seeds cannot reach p < {criteria.alpha:g}"
    else:
        passed, shown = p_value < criteria.alpha, p_text(p_value)
    return (
        Check(f"decision p below {criteria.alpha:g}", passed, shown),
        Check(f"coverage {share(1)}", ended == expected, f"{share(ended / max(1, expected))}"),
        Check(
            "as declared before the runs",
            not exploratory,
            "yes" if not exploratory else f"no, {len(exploratory)} reason(s) at the top",
        ),
    )


def _against_control(grid: Grid, sweep: Sweep, criteria: Criteria, primary: Comparison) -> Comparison | None:
    own = sweep.group_of(criteria.ideal.better_than, primary.group)
    if own is None:
        return None
    cell = (criteria.ideal.better_than, own)
    return estimate(grid, "contrast", f"against {cell[0]}", primary.arm, cell, primary.group, criteria)


def _other(grid: Grid, criteria: Criteria, primary: Comparison, metric: str, *, lower_is_better: bool) -> Comparison:
    return estimate(
        grid,
        "contrast",
        metric,
        primary.arm,
        primary.against,
        primary.group,
        criteria,
        metric=metric,
        lower_is_better=lower_is_better,
    )


def _sign_check(asked: str, comparison: Comparison | None, *, relative: bool) -> Check:
    """Whether the estimate is on the better side of zero."""
    if comparison is None or comparison.summary is None:
        return Check(asked, None, "not in this sweep" if comparison is None else "not measured in any pair")
    mean = comparison.summary.mean
    better = mean < 0 if comparison.lower_is_better else mean > 0
    shown = percent(relative_percent(mean)) if relative else f"{mean:+.3g}".replace("-", "−")
    return Check(asked, better, f"{shown}, better in {comparison.wins.replace('/', ' of ')}")


def _no_interval(primary: Comparison) -> str:
    if primary.conditional:
        return "no interval over all pairs, since a run diverged"
    return "no pair" if primary.summary is None else str(primary.summary.reason)
