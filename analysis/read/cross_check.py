"""A run's numbers against what else its folder holds: what decides is taken from the rows, and a contradiction is named.

A summary is written once, from the same rows and outcomes that lie beside it. Where they do not say the same, one of them
was changed, and nothing says which: the run then counts as damaged, a missing pair, whatever its numbers are.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DECIDING = ("validation_loss", "probe_r2_key", "probe_r2_value", "exact_match")
"""What the last evaluation holds and a level or a test is decided by."""
_READ = (*DECIDING, "validation_perplexity")
TOLERANCE = 1e-6
"""Relative; the files hold the same numbers, and sums over examples differ by their order."""


def last_evaluations(table: pa.Table, counts: dict[str, int]) -> dict[str, dict[str, float | None]]:
    """Return, by run, `step` and the numbers of its last evaluation; runs without one are not in it."""
    present = {run: count for run, count in counts.items() if count}
    ends = np.cumsum(list(present.values()), dtype=np.int64) - 1
    names = [name for name in ("step", *_READ) if name in table.column_names]
    rows = table.select(names).take(pa.array(ends)).to_pylist() if present else []
    return dict(zip(present, rows, strict=True))


def outcome_means(table: pa.Table, counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """Return, by run, what its outcomes say: loss per scored token of the validation split, and the share answered "
    "right."""
    places = np.repeat(np.arange(len(counts)), list(counts.values()))

    def totals(column: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        valid = np.asarray(table[column].is_valid())
        values = np.asarray(pc.fill_null(table[column].cast(pa.float64()), 0.0))
        return (
            np.bincount(places[valid], weights=values[valid], minlength=len(counts)),
            np.bincount(places[valid], minlength=len(counts)),
        )

    (loss_R, _), (tokens_R, _), (correct_R, answered_R) = (totals(name) for name in ("loss_nats", "tokens", "correct"))
    means: dict[str, dict[str, float]] = {run: {} for run in counts}
    for place, run in enumerate(counts):
        if tokens_R[place] > 0:
            means[run]["validation_loss"] = float(loss_R[place] / tokens_R[place])
        if answered_R[place] > 0:
            means[run]["exact_match"] = float(correct_R[place] / answered_R[place])
    return means


def cross_check(
    record: dict[str, Any], evaluation: dict[str, float | None] | None, means: dict[str, float]
) -> dict[str, Any]:
    """Check the numbers of a finished run and take those that decide from its rows.

    Parameters
    ----------
    record
        Of `analysis.read.records.read_record`.
    evaluation
        The run's last evaluation; None where it has none.
    means
        What its outcomes say.

    Returns
    -------
    dict
        What changes of the record: the numbers that decide, `contradictions` and `problems` with everything named.
    """
    if record["state"] != "finished":
        return {}
    changed: dict[str, Any] = {}
    contradictions = list(record["contradictions"])
    if evaluation is None:
        contradictions.append("evaluations.jsonl holds no evaluation, so its numbers cannot be checked")
    elif evaluation["step"] != record["step"]:
        contradictions.append(f"its last evaluation is of step {evaluation['step']}, its end at step {record['step']}")
    else:
        if record["has_summary"]:
            contradictions += [
                f"{name} is {_text(record.get(name))} in summary.json and {_text(evaluation.get(name))} in "
                "evaluations.jsonl"
                for name in _READ
                if not _same(record.get(name), evaluation.get(name))
            ]
        changed = {name: evaluation[name] for name in DECIDING if evaluation.get(name) is not None}
        perplexity, loss = evaluation.get("validation_perplexity"), evaluation.get("validation_loss")
        if perplexity is not None and loss is not None and not _same(perplexity, _exp(loss)):
            contradictions.append(
                f"its validation perplexity {_text(perplexity)} is not that of its loss {_text(loss)}"
            )
        contradictions += [
            f"{name} is {_text(evaluation[name])} in evaluations.jsonl and {_text(mean)} over the rows of "
            "outcomes.parquet"
            for name, mean in means.items()
            if evaluation.get(name) is not None and not _same(evaluation[name], mean)
        ]
    new = [sentence for sentence in contradictions if sentence not in record["problems"]]
    return changed | {"contradictions": contradictions, "problems": [*record["problems"], *new]}


def _same(a: float | None, b: float | None) -> bool:
    """Whether two numbers agree; one that is not there agrees with another that is not."""
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return _absent(a) and _absent(b)
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-12)


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _text(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"
