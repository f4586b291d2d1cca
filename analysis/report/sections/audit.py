"""Section of the report: coverage, pairing, problems, provenance, cost."""

from __future__ import annotations

import pandas as pd

from analysis.design.cells import DIVERGED, FINISHED, states
from analysis.design.cost import FLOPS_NOTE
from analysis.report.render.document import Block, Bullets, Heading, Paragraph, Table
from analysis.report.sections.tables import Draw
from analysis.stats.paired import relative_percent
from analysis.verdict.provenance import origin_sentences, origins
from analysis.verdict.study import Study
from analysis.words import amount, count, listed, number, percent_interval, seconds, share

SHOWN_PROBLEMS = 60


def section(study: Study, draw: Draw) -> list[Block]:
    """5. Coverage, pairing audit, lost runs with bounds, problems, provenance, looks, cost."""
    return [
        Heading(2, "Coverage and audit"),
        *_coverage(study),
        *_pairing(study),
        *_problems(study),
        *_provenance(study),
        *_cost(study),
    ]


def texts(table: pd.DataFrame, *columns: str) -> list[tuple[str, ...]]:
    """Rows of some columns as texts."""
    return list(zip(*(table[name].astype(str) for name in columns), strict=True))


def _coverage(study: Study) -> list[Block]:
    grid = study.grid
    by_state = states(grid.cells)
    ended = by_state[FINISHED] + by_state[DIVERGED]
    others = [f"{many} {state}" for state, many in by_state.items() if state not in (FINISHED, DIVERGED)]
    sentence = f"{ended} of {count(len(grid.cells), 'expected run')} ended"
    if by_state[DIVERGED]:
        sentence += f", {by_state[DIVERGED]} of them diverged"
    sentence += f"; {listed(others)}." if others else "."
    if not grid.planned:
        sentence += " Without a plan, every arm found times every seed found is what is expected."
    columns = ("arm", "loss", "expected", "finished", "diverged", "not ended")
    rows = []
    for arm, group, control in grid.arms:
        cells = grid.cells[(grid.cells["arm"] == arm) & (grid.cells["group"] == group)]
        own = states(cells)
        finished, diverged = own[FINISHED], own[DIVERGED]
        rows.append(
            (
                arm,
                "control" if control else group,
                str(len(cells)),
                str(finished),
                str(diverged) if diverged else "",
                str(len(cells) - finished - diverged) if finished + diverged < len(cells) else "",
            )
        )
    blocks: list[Block] = [Paragraph(sentence), Table(columns, tuple(rows), "", frozenset(columns[2:]))]
    lost = grid.cells[grid.cells["state"] != FINISHED]
    if len(lost):
        folded = _folded(lost)
        more = f" {len(folded) - SHOWN_PROBLEMS} more lines are in runs.csv." if len(folded) > SHOWN_PROBLEMS else ""
        caption = "Runs without a result. A diverged run is an outcome, the worst one; any other is a missing pair."
        table = Table(("arm", "loss", "seeds", "state", "reason"), folded[:SHOWN_PROBLEMS], caption + more)
        blocks.append(table)
    return [*blocks, *_collapses(study), *_bounds(study)]


def _folded(lost: pd.DataFrame) -> tuple[tuple[str, ...], ...]:
    """One row for all seeds of an arm that have the same state and reason; arms of which nothing is there in one."""
    seeds: dict[tuple[str, ...], list[str]] = {}
    for arm, group, seed, state, reason in texts(lost, "arm", "group", "seed", "state", "reason"):
        seeds.setdefault((arm, group or "control", state, reason), []).append(seed)
    return tuple((arm, loss, ", ".join(own), state, reason) for (arm, loss, state, reason), own in seeds.items())


def _collapses(study: Study) -> list[Block]:
    """Name every run in which a target's or the student's variance collapsed, whatever its cosine says."""
    cells = study.grid.cells
    shares = cells["variance_share_min"].astype(float)
    collapsed = cells[shares < study.criteria.collapse_share]
    if collapsed.empty:
        return []
    names = [
        f"{arm}, {group or 'control'}, seed {seed}" for arm, group, seed in texts(collapsed, "arm", "group", "seed")
    ]
    rest = f" and {len(names) - SHOWN_PROBLEMS} more" if len(names) > SHOWN_PROBLEMS else ""
    sentence = (
        f"A target's or student's variance fell below {share(study.criteria.collapse_share)} of its start in "
        f"{count(len(names), 'run')}: {'; '.join(names[:SHOWN_PROBLEMS])}{rest}. Their cosine says nothing."
    )
    return [Paragraph(sentence, "Collapse.", "warning")]


def _bounds(study: Study) -> list[Block]:
    rows = [
        (
            comparison.arm[0],
            comparison.group,
            str(len(comparison.pairs.unpaired)),
            str(int((~comparison.pairs.finished).sum())),
            percent_interval(*(relative_percent(end) for end in comparison.bounds)),
        )
        for comparison in study.arms
        if comparison.bounds is not None
    ]
    if not rows:
        return []
    caption = (
        "Best and worst case of the mean over all planned pairs: an unobserved run is taken to lie between the "
        "best run of the sweep and its worst run or the untrained student."
    )
    return [
        Table(
            ("arm", "loss", "missing pairs", "diverged pairs", "best and worst case"),
            tuple(rows),
            caption,
            frozenset({"missing pairs", "diverged pairs", "best and worst case"}),
        )
    ]


def _pairing(study: Study) -> list[Block]:
    refused = list(
        dict.fromkeys(
            (
                f"{comparison.arm[0]} and {comparison.against[0]}, loss {comparison.group}, seed {pair.seed}: "
                f"{pair.reason}"
            )
            for comparison in (*study.arms, *study.contrasts)
            for pair in comparison.pairs.unpaired
            if pair.refused
        )
    )
    made = sum(len(comparison.pairs.seeds) for comparison in study.arms)
    unknown = int((study.grid.cells["state"].isin([FINISHED, DIVERGED]) & study.grid.cells["inputs"].eq("")).sum())
    sentence = (
        f"{count(made, 'pair')} of arm and baseline passed the audit: recorded data order, student start and inputs "
        "(data, models, tokenizers) are the same in both runs (SHA-256). The aligner's start differs by arm and is "
        "not compared."
    )
    if unknown:
        sentence += (
            f" The inputs of {count(unknown, 'run')} were not recorded, as version 0.1.0 left them out, and could not be "
            "compared."
        )
    if not refused:
        return [Heading(3, "Pairing"), Paragraph(sentence)]
    return [
        Heading(3, "Pairing"),
        Paragraph(f"{sentence} {count(len(refused), 'pair was', 'pairs were')} refused:", tone="warning"),
        Bullets(tuple(refused[:SHOWN_PROBLEMS])),
    ]


def _problems(study: Study) -> list[Block]:
    problems = study.collected.broken
    if problems.empty:
        return [Heading(3, "Damaged, foreign and duplicated folders"), Paragraph("None were found.")]
    shown = problems.head(SHOWN_PROBLEMS)
    rest = len(problems) - len(shown)
    return [
        Heading(3, "Damaged, foreign and duplicated folders"),
        Table(
            ("folder", "kind", "what"),
            tuple(texts(shown, "run", "kind", "detail")),
            f"{rest} more are in problems.csv." if rest else "",
        ),
    ]


def _provenance(study: Study) -> list[Block]:
    items, mixed = origin_sentences(origins(study.collected.runs, study.grid.cells["run"]))
    looks = study.looks
    look = (
        f"This is look {looks.number} at the results"
        + ("" if looks.is_new else ", rendered again")
        + f"; the primary test was made on {count(looks.tests, 'set')} of runs, {study.criteria.looks} declared."
    )
    return [Heading(3, "Provenance"), Bullets((*items, look), "warning" if mixed else "plain")]


def _cost(study: Study) -> list[Block]:
    devices = set(study.collected.runs["device"].dropna()) - {""}
    unit = "device-hours" if len(devices) != 1 else "CPU-hours" if devices == {"cpu"} else "GPU-hours"
    rows = [
        (
            cost.arm,
            cost.group or "control",
            number(cost.hours, 3),
            seconds(cost.step_s),
            amount(cost.tokens),
            amount(cost.student),
            amount(cost.aligner),
            amount(cost.flops),
        )
        for cost in study.cost
    ]
    total = sum(cost.hours or 0.0 for cost in study.cost)
    columns = ("arm", "loss", unit, "per step", "tokens", "student", "aligner", "FLOPs")
    teacher = next((cost.teacher for cost in study.cost if cost.teacher is not None), None)
    caption = (
        f"{number(total, 3)} {unit} in optimizer steps over all runs, also those that did not finish. Tokens and FLOPs "
        f"are of one run; student and aligner are trained parameters, the teacher has {amount(teacher)}. {FLOPS_NOTE}"
    )
    return [Heading(3, "Cost"), Table(columns, tuple(rows), caption, frozenset(columns[2:]))]
