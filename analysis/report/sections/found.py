"""Section of the report: expected against found, for every arm and control."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure as Drawing

from analysis.report.render import figures
from analysis.report.render.document import Block, Heading, Paragraph, Table
from analysis.report.sections.tables import Draw, arm_colours, interval_cell, number_cells
from analysis.report.sections.wording import (
    family_sentence,
    label,
)
from analysis.stats.paired import relative_percent
from analysis.verdict.comparison import ArmComparison
from analysis.verdict.controls import Control, not_better_than
from analysis.verdict.study import Study
from analysis.words import declared_percent, listed, number, percent, share


def section(study: Study, draw: Draw) -> list[Block]:
    """2. Expected against found."""
    grid, criteria = study.grid, study.criteria
    control = criteria.ideal.better_than
    blocks: list[Block] = [Heading(2, "Expected against found")]
    if not study.arms:
        return [*blocks, Paragraph("There is nothing to compare: the sweep holds one arm only.")]
    palette = arm_colours(study)
    panels = {
        f"loss {group}": [
            _forest_row(comparison, palette)
            for comparison in study.arms
            if comparison.group == group and comparison.pairs.seeds
        ]
        for group in grid.groups
    }
    caption = (
        f"Perplexity on the validation split against {grid.baseline}, paired by seed: mean, "
        f"{share(criteria.confidence)} t interval (bar), every seed (ticks) and what was expected (open diamond)."
    )
    blocks.append(draw("differences", caption, lambda: figures.forest(panels, grid.baseline)))
    interval, beside = f"{share(criteria.confidence)} interval", f"against {control}"
    # What is read first stands first: on a phone the rest is reached by scrolling.
    columns = ("arm", "verdict", "found", "p", interval, "wins", "expected", "perplexity", "Hedges g", beside)
    for group in grid.groups:
        planned = [comparison for comparison in study.arms if comparison.group == group]
        members = [comparison for comparison in planned if study.verdict.complete or comparison.pairs.seeds]
        rows = [_baseline_row(study, group), *(_row(comparison, study) for comparison in members)]
        role = (
            "The primary comparison stands out; the others are exploratory."
            if any(comparison.role == "primary" for comparison in members)
            else "All of this table is exploratory."
        )
        caption = " ".join(
            comparison
            for comparison in (
                f"Change of perplexity against {grid.baseline} with the same loss; negative is better.",
                family_sentence(members),
                role,
                _not_run([comparison.arm[0] for comparison in planned if comparison not in members]),
                _label_words(study) if group == grid.groups[0] else "",
                "Expected improvements are written as lower perplexity; Hedges g is paired (dz with the exact "
                "small-sample correction).",
            )
            if comparison
        )
        strong = frozenset(place for place, comparison in enumerate(members, 1) if comparison.role == "primary")
        blocks += [Heading(3, f"Loss {group}"), Table(columns, tuple(rows), caption, frozenset(columns[2:]), strong)]
    return [*blocks, *_controls(study), draw(*_seed_lines(study, palette))]


def _not_run(arms: list[str]) -> str:
    """Arms of which no pair is there yet, in one line instead of a row each."""
    return f"No pair of runs has ended yet of {listed(arms)}." if arms else ""


def _label_words(study: Study) -> str:
    margin = declared_percent(study.criteria.minimum.tolerated_percent)
    return (
        f"Better by > {declared_percent(study.criteria.ideal.improvement_percent)}: the whole interval is; not worse by "
        f"{margin}: the interval excludes that harm; equivalent ±{margin}: two one-sided tests; detects: the smallest "
        f"difference found with {share(study.criteria.power)} power."
    )


def _forest_row(comparison: ArmComparison, palette: dict[str, str]) -> figures.ForestRow:
    summary, expected = comparison.summary, comparison.expected_percent
    differences = comparison.pairs.differences[comparison.pairs.finished]
    interval = None
    if summary is not None and summary.interval is not None:
        interval = type(summary.interval)(*(relative_percent(end) for end in summary.interval))
    return figures.ForestRow(
        comparison.arm[0],
        palette[comparison.arm[0]],
        None if summary is None else relative_percent(summary.mean),
        interval,
        None if expected is None else -expected,
        tuple(relative_percent(difference) for difference in differences),
    )


def _seed_lines(study: Study, palette: dict[str, str]) -> tuple[str, str, Callable[[], Drawing]]:
    primary = study.verdict.primary
    group = primary.group if primary is not None else study.grid.groups[0]
    members = [comparison for comparison in study.arms if comparison.group == group]
    seeds = sorted({seed for comparison in members for seed in comparison.pairs.seeds})
    percent_SA = np.full((len(seeds), len(members)), np.nan)
    for column, comparison in enumerate(members):
        for seed, difference in zip(comparison.pairs.seeds, comparison.pairs.differences, strict=True):
            percent_SA[seeds.index(seed), column] = 100 * np.expm1(difference)
    arms = [comparison.arm[0] for comparison in members]
    caption = f"Paired differences to {study.grid.baseline} with loss {group}: one line per seed."
    return "seeds", caption, lambda: figures.seed_lines(arms, percent_SA, seeds, palette, study.grid.baseline)


def _baseline_row(study: Study, group: str) -> tuple[str, ...]:
    baseline = study.grid.baseline
    against = _against(study, baseline, group)
    return (baseline, "reference", *["–"] * 5, _perplexity(study, baseline, group), "–", against)


def _row(comparison: ArmComparison, study: Study) -> tuple[str, ...]:
    arm, group = comparison.arm[0], comparison.group
    expected = comparison.expected_percent
    name = f"{arm} (control)" if comparison.role == "control" else arm
    verdict = label(comparison, study.criteria)
    short = [] if comparison.role == "control" else not_better_than(study.controls, arm, group)
    estimate, interval, p_value, hedges_g, wins = number_cells(comparison, study.criteria.alpha)
    return (
        name,
        f"{verdict}; not better than {listed(short)}" if short else verdict,
        estimate,
        p_value,
        interval,
        wins,
        "–" if expected is None else percent(-expected),
        _perplexity(study, arm, group),
        hedges_g,
        _against(study, arm, group),
    )


def _perplexity(study: Study, arm: str, group: str) -> str:
    own = study.grid.group_of(arm, group)
    cells = study.grid.cells
    losses = cells.loc[(cells["arm"] == arm) & (cells["group"] == own), "validation_loss"].dropna()
    return "–" if losses.empty else number(float(np.exp(losses.astype(float).mean())), 4)


def _against(study: Study, arm: str, group: str) -> str:
    """The arm against the declared control."""
    for control in study.controls:
        comparison = control.against.get((arm, group))
        if control.kind == "declared" and comparison is not None and comparison.summary is not None:
            return percent(relative_percent(comparison.summary.mean)) + ("*" if comparison.conditional else "")
    return "–"


def _controls(study: Study) -> list[Block]:
    """Every arm against every control that it has to beat."""
    rows = [
        (arm, group, *(_against_control(beaten, arm, group) for beaten in study.controls))
        for group in study.grid.groups
        for arm, own, control in study.grid.arms
        if own == group and not control
    ]
    if not study.controls:
        return []
    titles = tuple(f"against {control.name}" for control in study.controls)
    marked = (
        " * conditional on both runs of a pair having finished." if any("*" in "".join(row) for row in rows) else ""
    )
    caption = (
        f"Change of perplexity against each control, with {share(study.criteria.confidence)} t interval, paired by seed; "
        f"negative is better. What the method claims is what helps only where an arm is better than all of them. "
        f"Not tested.{marked}"
    )
    return [
        Heading(3, "Against the controls"),
        Table(("arm", "loss", *titles), tuple(rows), caption, frozenset(titles)),
    ]


def _against_control(control: Control, arm: str, group: str) -> str:
    comparison = control.against.get((arm, group))
    if comparison is None or comparison.summary is None:
        return "–"
    text = percent(relative_percent(comparison.summary.mean))
    if comparison.summary.interval is not None:
        text += f" ({interval_cell(comparison.summary.interval)})"
    return text + ("*" if comparison.conditional else "")
