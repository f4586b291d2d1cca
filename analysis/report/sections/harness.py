"""Section of the report: tasks of the evaluation harness, where runs were asked for them."""

from __future__ import annotations

from analysis.report.render.document import Block, Heading, Table
from analysis.report.sections.tables import Draw
from analysis.stats.paired import paired_summary
from analysis.verdict.study import Study, runs_of
from analysis.words import number, share

_PREFIX = "lm_eval_"


def section(study: Study, draw: Draw) -> list[Block]:
    """What the harness found of each arm, and paired by seed against the baseline; nothing where no run was asked."""
    names = sorted(name for name in study.collected.runs.columns if name.startswith(_PREFIX))
    rows = [
        (name.removeprefix(_PREFIX), arm, own or "own", *_cells(study, name, arm, own, control))
        for name in names
        for arm, own, control in study.grid.arms
    ]
    if not rows:
        return []
    interval = f"{share(study.criteria.confidence)} interval"
    columns = ("task and metric", "arm", "loss", "runs", "mean", "sd", f"− {study.grid.baseline}", interval)
    caption = (
        "As the harness gives them, on the saved students. Secondary and not tested: the difference is paired by seed, its "
        "interval a t interval without correction for the number of tasks."
    )
    return [
        Heading(2, "Tasks of the evaluation harness"),
        Table(columns, tuple(rows), caption, frozenset(columns[3:])),
    ]


def _cells(study: Study, name: str, arm: str, own: str, control: bool) -> tuple[str, ...]:
    """Cells for runs, mean, sd, difference and its interval."""
    values = _by_seed(study, name, arm, own)
    if not values:
        return ("0", "–", "–", "–", "–")
    summary = paired_summary(list(values.values()), lower_is_better=False)
    own_cells = (str(len(values)), number(summary.mean, 4), number(summary.sd, 2))
    group = study.grid.groups[0] if control else own
    baseline = _by_seed(study, name, study.grid.baseline, group)
    shared = [seed for seed in values if seed in baseline]
    if not shared or arm == study.grid.baseline:
        return (*own_cells, "–", "–")
    paired = paired_summary(
        [values[seed] - baseline[seed] for seed in shared],
        confidence=study.criteria.confidence,
        lower_is_better=False,
    )
    ends = paired.interval
    between = "–" if ends is None else " to ".join(number(end, 2, signed=True) for end in ends)
    return (*own_cells, number(paired.mean, 2, signed=True), between)


def _by_seed(study: Study, name: str, arm: str, group: str) -> dict[int, float]:
    """The values of the finished runs of an arm that have one, by seed."""
    runs = study.collected.runs
    chosen = runs[runs["run"].isin(runs_of(study.grid, arm, group)) & runs[name].notna()]
    return {int(seed): float(value) for seed, value in zip(chosen["seed"], chosen[name], strict=True)}
