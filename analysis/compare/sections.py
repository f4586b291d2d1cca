"""Sections of a comparison of two sides: quality and alignment at the end, what differs, and the audit."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from analysis.compare.sides import Side
from analysis.design.cells import FINISHED
from analysis.design.expected import config_leaves
from analysis.report.render.document import Block, Bullets, Heading, Paragraph, Table
from analysis.verdict.comparison import ArmComparison
from analysis.verdict.provenance import KINDS
from analysis.words import count, number

_QUALITY = (
    ("validation_loss", "validation perplexity", False),
    ("exact_match", "exact match (share)", True),
    ("validation_kv_loss", "KV loss on the validation split", None),
    ("cosine_key", "cosine of keys, through its own aligner", None),
    ("cosine_value", "cosine of values, through its own aligner", None),
    ("norm_ratio_key", "norm ratio of keys, student over target", None),
    ("norm_ratio_value", "norm ratio of values, student over target", None),
    ("probe_r2_key", "probe R² of keys", True),
    ("probe_r2_value", "probe R² of values", True),
    ("kv_grad_norm_median", "gradient norm from the alignment loss", None),
    ("variance_share_min", "smallest variance, share of its start", None),
    ("parameters_aligner", "aligner parameters", None),
    ("step_time_s_median", "seconds per step", False),
)


def quality(sides: tuple[Side, Side]) -> list[Block]:
    """Means at the end, side by side, and which is better where that can be said."""
    rows = []
    for column, name, higher_is_better in _QUALITY:
        a, b = (mean_of(side, column) for side in sides)
        if a is None and b is None:
            continue
        better = ""
        if a is not None and b is not None and higher_is_better is not None and a != b:
            better = "A" if (a > b) == higher_is_better else "B"
        if column == "validation_loss":  # the same geometric mean as in the table of equal steps
            a, b = (None if value is None else math.exp(value) for value in (a, b))
        rows.append((name, number(a, 4), number(b, 4), better))
    if not rows:
        return []
    return [
        Heading(2, "At the end: quality and alignment"),
        Table(
            ("", "A", "B", "better"),
            tuple(rows),
            "Means over runs, of perplexity the geometric one. KV loss and cosine are seen through the run's own "
            "aligner and cannot be compared between aligners; the probe is the same for both.",
            frozenset({"A", "B"}),
        ),
    ]


def configuration(sides: tuple[Side, Side]) -> list[Block]:
    """Every setting in which the two differ."""
    if not all(side.config for side in sides):
        return [Heading(2, "What differs"), Paragraph("A configuration could not be read, so this cannot be said.")]
    a, b = (dict(config_leaves(side.config)) for side in sides)
    rows = [
        (key, *("–" if key not in leaves else json.dumps(leaves[key]) for leaves in (a, b)))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not key.endswith("_target_")
    ]
    if not rows:
        return [Heading(2, "What differs"), Paragraph("The configurations differ in nothing but seed and place.")]
    return [Heading(2, "What differs"), Table(("setting", "A", "B"), tuple(rows))]


def audit(sides: tuple[Side, Side], comparison: ArmComparison) -> list[Block]:
    """Runs, end states, pairs, and what is wrong with the folders."""
    pairs = comparison.pairs
    items = [
        f"{letter}: {count(len(side.records), 'run')}, "
        + ", ".join(
            f"seed {record['seed']:g} {_state(record)}" for record in side.records if record.get("seed") is not None
        )
        for letter, side in zip("AB", sides, strict=True)
    ]
    items.append(
        f"{count(len(pairs.seeds), 'pair')} with the same data order and student start (recorded hashes)"
        if pairs.seeds
        else "No pair: A and B share no seed whose data order and student start are recorded and the same"
    )
    items += [f"Seed {pair.seed} was not paired: {pair.reason}" for pair in pairs.unpaired]
    items += _made_differently(sides)
    items += [problem for side in sides for problem in side.problems]
    return [Heading(2, "Audit"), Bullets(tuple(f"{item}." for item in items))]


def _made_differently(sides: tuple[Side, Side]) -> list[str]:
    """Every kind of origin of which the two sides do not have the same single one."""
    sentences = []
    for column, (_, many) in KINDS.items():
        a, b = (sorted({str(record.get(column) or "unknown") for record in side.records}) for side in sides)
        if a != b or len(a) > 1:
            sentences.append(f"Different {many}, which are part of the difference: A {'; '.join(a)}, B {'; '.join(b)}")
    return sentences


def _state(record: dict[str, Any]) -> str:
    return f"{record['state']} ({record['reason']})" if record.get("reason") else str(record["state"])


def mean_of(side: Side, column: str) -> float | None:
    """Mean of a column over the finished runs of a side; None where none has it."""
    values = [record.get(column) for record in side.records if record["state"] == FINISHED]
    numbers = [float(value) for value in values if isinstance(value, int | float) and value == value]
    return float(np.mean(numbers)) if numbers else None
