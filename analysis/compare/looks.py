"""A comparison of arms of a planned sweep is a look at it: its rules hold here too, and its history says so."""

from __future__ import annotations

from datetime import UTC, datetime

from analysis.compare.sides import PlannedSweep, Side
from analysis.design.criteria import Criteria
from analysis.design.history import History, Looks, one_at_a_time, results_digest
from analysis.report.render.document import Paragraph
from analysis.verdict.comparison import ArmComparison
from analysis.words import count
from kv_align.runs.sweep_dir import SweepDirectory


def planned_sweeps(sides: tuple[Side, Side]) -> list[PlannedSweep]:
    """The planned sweeps that the sides are arms of, each once."""
    by_path = {side.sweep.collected.sweep.resolve(): side.sweep for side in sides if side.sweep is not None}
    return list(by_path.values())


def criteria_of(sides: tuple[Side, Side], default: Criteria) -> Criteria:
    """What was declared for the sides, where it is the same for both; else the default."""
    declared = [sweep.criteria for sweep in planned_sweeps(sides)]
    return declared[0] if declared and all(criteria == declared[0] for criteria in declared) else default


def is_primary(sides: tuple[Side, Side]) -> bool:
    """Whether the two sides are the declared primary comparison of one planned sweep."""
    a, b = (side.sweep for side in sides)
    if a is None or b is None or len(planned_sweeps(sides)) != 1:
        return False
    primary = a.criteria.primary
    arms = (a.grid.group_of(primary.arm, primary.loss), a.grid.group_of(primary.baseline, primary.loss))
    return {(a.arm, a.group), (b.arm, b.group)} == {(primary.arm, arms[0]), (primary.baseline, arms[1])}


def record_looks(sides: tuple[Side, Side], comparison: ArmComparison, result: str) -> list[Looks]:
    """Append a line on the comparison to the history of every planned sweep that it looks at."""
    made = []
    for sweep in planned_sweeps(sides):
        directory = SweepDirectory(sweep.collected.sweep)
        results = results_digest(sweep.grid.cells, sweep.collected.runs)
        tested = comparison.p_value is not None and is_primary(sides)
        plan = sweep.collected.plan
        with one_at_a_time(directory):
            history = History(directory)
            look = history.looks(results, tested=tested)
            history.append(
                now=datetime.now(UTC),
                look=look,
                results=results,
                tested=tested,
                plan=plan,
                criteria=plan.criteria_hash if plan is not None else "",
                conclusion=f"Comparison of {sides[0].name} with {sides[1].name}. {result}",
            )
        made.append(look)
    return made


def caveat(sides: tuple[Side, Side], comparison: ArmComparison, criteria: Criteria, looks: list[Looks]) -> Paragraph:
    """What the comparison cannot show, or that it is the declared one."""
    incomplete = [sweep for sweep in planned_sweeps(sides) if not sweep.complete]
    tests = max((look.tests for look in looks), default=0)
    if len(comparison.pairs.seeds) < 2:
        text = (
            "One seed cannot show that A and B differ: another seed may turn the order, and how much seeds "
            "differ is not known from one. There is no p value and no interval; run both with 8 seeds or more."
        )
    elif incomplete:
        text = (
            f"{incomplete[0].collected.sweep.name} is not complete as declared: there are an estimate and the spread "
            "between seeds, and neither p value nor interval before it is, since who looks while runs come in finds "
            "something sooner or later."
        )
    elif is_primary(sides) and tests <= criteria.looks:
        text = "The levels that it is part of are judged by python -m analysis report."
        return Paragraph(text, "This is the declared primary comparison.", "lead")
    elif is_primary(sides):
        text = (
            f"This is the declared primary comparison, but it was tested on {count(tests, 'different set')} of runs, and "
            f"{criteria.looks} was declared: it is exploratory."
        )
    else:
        text = (
            "This comparison was not declared before the runs and is exploratory: other pairs of arms may "
            "have been looked at too, and this p value knows nothing of them."
        )
    return Paragraph(text, "What this cannot show.", "warning")
