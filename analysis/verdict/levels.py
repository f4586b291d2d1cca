"""The conditions of the three declared levels, each with what was found; `analysis.verdict.verdict` puts them together."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.design.cells import FINISHED
from analysis.design.criteria import Criteria
from analysis.design.pairing import PairedGrid
from analysis.stats.paired import relative_percent
from analysis.verdict.comparison import ArmComparison
from analysis.words import count, declared_percent, p_text, percent, share


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


def minimum_checks(
    paired: PairedGrid, primary: ArmComparison, criteria: Criteria, ended: int, expected: int
) -> tuple[Check, ...]:
    """Conditions of the minimum level: the runs ended, and the arm is not worse by more than is tolerated."""
    cells = [row for cell in (primary.arm, primary.against) for row in paired.cell(*cell).values()]
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


def ideal_checks(
    paired: PairedGrid,
    primary: ArmComparison,
    control: ArmComparison | None,
    area: ArmComparison,
    probe: ArmComparison,
    criteria: Criteria,
) -> tuple[Check, ...]:
    """Conditions of the ideal level beyond the minimum."""
    mean = primary.summary.mean if primary.summary else None
    shown = "no pair" if mean is None else percent(relative_percent(mean))
    if mean is not None and mean <= -criteria.strong_nats:
        shown += f", beyond {declared_percent(-criteria.ideal.strong_percent)}"
    return (
        Check(
            f"estimated difference in perplexity at most {declared_percent(-criteria.ideal.improvement_percent)}",
            None if mean is None else mean <= -criteria.improvement_nats,
            shown,
        ),
        _sign_check(f"better than the control {criteria.ideal.better_than}", control, relative=True),
        _sign_check("training loss falls faster (smaller area under it)", area, relative=False),
        _sign_check("higher probe R²", probe, relative=False),
        _nothing_collapsed(paired, primary, criteria),
    )


def _nothing_collapsed(paired: PairedGrid, primary: ArmComparison, criteria: Criteria) -> Check:
    shares = {
        f"{row['arm']} seed {seed}": row["variance_share_min"]
        for cell in (primary.arm, primary.against)
        for seed, row in sorted(paired.cell(*cell).items())
        if row["variance_share_min"] is not None and row["variance_share_min"] == row["variance_share_min"]
    }
    collapsed = [name for name, least in shares.items() if least < criteria.collapse_share]
    return Check(
        f"no variance below {share(criteria.collapse_share)} of its start",
        not collapsed if shares else None,
        (", ".join(collapsed[:4]) + (" and more" if len(collapsed) > 4 else "") or "none")
        if shares
        else "not measured",
    )


def paper_checks(
    primary: ArmComparison, criteria: Criteria, ended: int, expected: int, exploratory: tuple[str, ...]
) -> tuple[Check, ...]:
    """Conditions of the paper level beyond the ideal."""
    p_value, floor = primary.p_value, primary.floor
    if p_value is None:
        passed, shown = None, primary.reason
    elif floor is not None and floor >= criteria.alpha:
        passed, shown = False, f"{len(primary.pairs.seeds)} seeds cannot reach p < {criteria.alpha:g}"
    else:
        passed, shown = p_value < criteria.alpha, p_text(p_value)
    return (
        Check(f"decision p below {criteria.alpha:g}", passed, shown),
        Check(
            f"coverage {share(1)}, of runs and of pairs of the primary comparison",
            ended == expected and not primary.pairs.unpaired,
            f"{ended} of {count(expected, 'run')}, {len(primary.pairs.seeds)} of "
            f"{count(primary.pairs.num_planned, 'pair')}",
        ),
        Check(
            "as declared before the runs",
            not exploratory,
            "yes" if not exploratory else f"no, {len(exploratory)} reason(s) at the top",
        ),
    )


def _sign_check(asked: str, comparison: ArmComparison | None, *, relative: bool) -> Check:
    """Whether the estimate is on the better side of zero."""
    if comparison is None or comparison.summary is None:
        return Check(asked, None, "not in this sweep" if comparison is None else "not measured in any pair")
    mean = comparison.summary.mean
    better = mean < 0 if comparison.lower_is_better else mean > 0
    shown = percent(relative_percent(mean)) if relative else f"{mean:+.3g}".replace("-", "−")
    return Check(asked, better, f"{shown}, better in {comparison.wins.replace('/', ' of ')}")


def _no_interval(primary: ArmComparison) -> str:
    if primary.conditional:
        return "no interval over all pairs, since a run diverged"
    return "no pair" if primary.summary is None else str(primary.summary.reason)
