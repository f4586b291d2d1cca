"""Arms against the controls that they have to beat, if what the method claims is what helps.

A better result than the baseline's can have other reasons than a teacher's keys and values, carried over by an aligner
that learned to carry them: the control without a teacher, the aligner that never learns, and the teacher that is shown
another example each take away one part of that claim. These are intervals, and no tests: an arm is called not better than a
control only where the interval excludes a benefit worth naming, the same size as the harm that is tolerated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from analysis.design.cells import Grid
from analysis.design.criteria import Criteria
from analysis.design.pairing import PairedGrid
from analysis.stats.paired import relative_percent
from analysis.verdict.comparison import ArmComparison, estimate
from analysis.words import listed, percent, percent_interval

Kind = Literal["declared", "frozen", "shuffled"]
Standing = Literal["better", "not shown", "not better"]
"""`not shown` is either way: the interval holds zero and a benefit worth naming, or there is none."""

_WHY = {
    "declared": "That control does as well, so this is no success of the method.",
    "frozen": "The aligner of that control never learns, so that a learned alignment helps is not shown.",
    "shuffled": "That control is shown the keys and values of another example, so that what the teacher holds of an example "
    "helps is not shown.",
}
_NOT_SHOWN = {
    "declared": "Whether the method helps beside that is not shown either way.",
    "frozen": "The aligner of that control never learns; whether a learned alignment helps is not shown either way.",
    "shuffled": "Whether what the teacher holds of an example helps is not shown either way.",
}
_TAKES_AWAY = {"frozen": "align.fit", "shuffled": "data.shuffle_teacher"}
_WHY_NONE = "Training without the teacher's keys and values does as well, so this is no success of the method."


@dataclass(frozen=True, eq=False)
class Control:
    """A control, and every arm against it.

    Attributes
    ----------
    name
        The control's arm.
    kind
        `declared`: the criteria ask that it be beaten. `frozen`: its aligner never learns. `shuffled`: its teacher is
        shown another example.
    why
        What it means not to be better than this control, in a sentence.
    worth_naming
        Smallest benefit that is worth naming, in nats per token.
    against
        By (arm, loss): the arm minus the control, in nats per token.
    differing
        By (arm, loss): what the arm and the control differ in.
    """

    name: str
    kind: Kind
    why: str
    worth_naming: float
    against: dict[tuple[str, str], ArmComparison]
    differing: dict[tuple[str, str], tuple[str, ...]]

    def standing(self, arm: str, group: str) -> Standing | None:
        """Whether an arm is better than the control, by its interval; None where there is no pair."""
        comparison = self.against.get((arm, group))
        if comparison is None or comparison.summary is None:
            return None
        interval = None if comparison.conditional else comparison.summary.interval
        if interval is None:
            return "not shown"
        return "better" if interval.high < 0 else "not better" if interval.low > -self.worth_naming else "not shown"


def controls_to_beat(paired: PairedGrid, grid: Grid, criteria: Criteria) -> list[Control]:
    """Compare every arm, the baseline too, with every control that the sweep has of those that have to be beaten."""
    controls: list[Control] = []
    for name, own, _ in grid.arms:
        config = grid.configs.get((name, own), {})
        kind = _kind(name, config, criteria)
        if kind is None or name in {control_found.name for control_found in controls}:
            continue
        teaches_nothing = kind == "declared" and bool(config) and config.get("align") is None
        against = {}
        for arm, group, control in grid.arms:
            # A control is compared with the declared one only, as every other arm within each loss.
            for within in grid.groups if control and kind == "declared" else [] if control else [group]:
                opposite = grid.group_of(name, within)
                if arm != name and opposite is not None:
                    against[arm, within] = estimate(
                        paired, "contrast", f"against {name}", (arm, group), (name, opposite), within, criteria
                    )
        why = _WHY_NONE if teaches_nothing else _WHY[kind]
        differing = {cell: grid.differing(each.arm, each.against) for cell, each in against.items()}
        controls.append(Control(name, kind, why, criteria.tolerated_nats, against, differing))
    return sorted(controls, key=lambda control_found: control_found.kind != "declared")


def control_warnings(controls: list[Control], arms: list[ArmComparison]) -> list[str]:
    """Say of every control which arms are not better than it.

    Parameters
    ----------
    controls
        Of `controls_to_beat`.
    arms
        The arms against the baseline; to be no better than the declared control is worth a warning only where an arm's
        estimate is below the baseline.
    """
    warnings = []
    for control in controls:
        short = [
            _numbers(comparison, control)
            for comparison in arms
            if comparison.role != "control"
            and control.standing(comparison.arm[0], comparison.group) == "not better"
            and (control.kind != "declared" or (comparison.summary is not None and comparison.summary.mean < 0))
        ]
        if short:
            start = f"Below {arms[0].against[0]}, but not" if control.kind == "declared" else "Not"
            warnings.append(f"{start} better than {control.name}: {listed(short)}. {control.why}")
    return warnings


def control_notes(controls: list[Control], primary: ArmComparison) -> list[str]:
    """Say of which controls it is open whether the primary arm is better than they are."""
    arm, group = primary.arm[0], primary.group
    return [
        f"Against {control.name}, {arm} is neither shown to be better nor shown not to be "
        f"({_uncertain(control.against[arm, group])}{_differing(control, (arm, group))}). "
        f"{_NOT_SHOWN[control.kind]}"
        for control in controls
        if control.standing(arm, group) == "not shown"
    ]


def not_better_than(controls: list[Control], arm: str, group: str) -> list[str]:
    """Names of the controls that an arm is not better than, for its row in a table."""
    return [control.name for control in controls if control.standing(arm, group) == "not better"]


def _kind(name: str, config: dict[str, Any], criteria: Criteria) -> Kind | None:
    if name == criteria.ideal.better_than:
        return "declared"
    if (config.get("align") or {}).get("fit") == "frozen":
        return "frozen"
    return "shuffled" if (config.get("data") or {}).get("shuffle_teacher") else None


def _numbers(comparison: ArmComparison, control: Control) -> str:
    """`v4_0_2 with loss kv (+0.3 %)`; with its difference to the baseline before it where that makes the point."""
    cell = (comparison.arm[0], comparison.group)
    inside = percent(_change(control.against[cell]))
    if control.kind == "declared":
        own = percent(_change(comparison))
        inside = f"{own} against {comparison.against[0]}, {inside} against {control.name}"
    else:
        inside += _differing(control, cell)
    return f"{comparison.arm[0]} with loss {comparison.group} ({inside})"


def _differing(control: Control, cell: tuple[str, str]) -> str:
    """`; they differ in init too`, of a control that is to take one thing away, where it takes away more."""
    more = [each for each in control.differing[cell] if each != _TAKES_AWAY.get(control.kind)]
    return f"; they differ in {listed(more)} too" if more and control.kind != "declared" else ""


def _uncertain(against: ArmComparison) -> str:
    """`−0.4 %, interval −1.2 to +0.4 %`."""
    assert against.summary is not None
    interval, change = against.summary.interval, percent(_change(against))
    if against.conditional:
        return f"{change} where no run diverged"
    if interval is None:
        return f"{change}, no interval"
    return f"{change}, interval {percent_interval(*(relative_percent(end) for end in interval))}"


def _change(comparison: ArmComparison) -> float:
    assert comparison.summary is not None
    return relative_percent(comparison.summary.mean)
