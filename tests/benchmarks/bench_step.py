"""What a training step costs, in time and memory, beside the floor and beside what others do: `make bench`.

Floor: the teacher's forward without gradient, without its head and without what lies above the last state needed, and a
cross-entropy step of the student. Ratios are medians over interleaved repeats, each formed within one repeat, on one
thread (or one GPU). Goals hold for the small pair; the tiny one, where the steps' fixed costs show, is beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kv_align.data.batch import Batch
from tests.benchmarks.measure import Report, Work, interleaved_ms, peak_bytes, quartiles, ratios
from tests.benchmarks.operators import LAYERS, LENGTH, ROWS, VOCABULARY, make_wide_models, measure_operators
from tests.benchmarks.pairs import PAIRS, make_batch, make_model, make_texts
from tests.benchmarks.steps import Arm, Literal, MlpsAlone, Models, PlainFloor, TrlLogits
from tests.benchmarks.sweep import BATCH_SIZE, EPOCHS, RUNS, TEXTS, measure_sweep

PARTS = ("operators", "vocabulary", "time", "memory", "sweep")
WITH_GOALS = "small"
NUM_BATCHES = 4
MEMORY_LENGTHS = (256, 512, 1024)
LINEAR = 1.05
"""A token's extra memory may grow by no more than this where T doubles; of a quadratic step it would double."""


@dataclass(frozen=True)
class Row:
    """A ratio of the table: a step over others' sum, what it should be at most, and at which T (0: at all)."""

    step: str
    beside: tuple[str, ...]
    goal: float | None = None
    goal_at: int = 0


TIME_ROWS = (
    Row("structured, kv", ("floor",), 1.05),
    Row("flat, kv", ("floor", "its MLPs alone"), 1.05),
    Row("flat, kv", ("floor",)),
    Row("structured, kv+struct", ("floor",), 1.20, 512),
    Row("flat, kv+struct", ("floor",)),
    Row("structured, kv", ("trl logit distillation",), 0.90),
    Row("structured, kv", ("literal, structured",), 0.90),
    Row("flat, kv", ("literal, flat",), 0.65),
    Row("flat, kv", ("literal, one vector",)),
    Row("structured, kv, cached", ("plain fine-tuning",), 1.15),
    Row("logit distillation", ("floor",)),
    Row("plain fine-tuning", ("plain transformers",), 1.00),
)
MEMORY_ROWS = (
    Row("structured, kv", ("literal, structured",), 0.50),
    Row("flat, kv", ("literal, flat",), 0.50),
    Row("flat, kv", ("literal, one vector",)),
)
TRL = "trl logit distillation"


def verdict(value: float, goal: float | None, counts: bool) -> tuple[str, str]:
    """The columns `goal` and whether it was met; empty where there is none."""
    return ("", "") if goal is None or not counts else (f"<= {goal:.2f}", "met" if value <= goal else "MISSED")


def make_steps(models: Models) -> dict[str, Callable[[Batch], None]]:
    """All whole steps by name; TRL's only where it is installed."""
    arms = {
        "structured, kv": Arm(models, "aligner=structured", "loss=kv"),
        "flat, kv": Arm(models, "aligner=flat", "loss=kv"),
        "structured, kv+struct": Arm(models, "aligner=structured", "loss=kv+struct"),
        "flat, kv+struct": Arm(models, "aligner=flat", "loss=kv+struct"),
        "logit distillation": Arm(models, "aligner=none", "loss=logit_kd"),
        "plain fine-tuning": Arm(models, "aligner=none", "loss=ce"),
    }
    steps: dict[str, Callable[[Batch], None]] = {name: arm.step for name, arm in arms.items()}
    steps["floor"] = PlainFloor(models, taught=True).step
    steps["plain transformers"] = PlainFloor(models, taught=False).step
    for aligner in ("structured", "flat", "one vector"):
        steps[f"literal, {aligner}"] = Literal(models, aligner).step
    try:
        steps[TRL] = TrlLogits(models).step
    except ImportError as error:
        print(f"{TRL}: not measured, since TRL cannot be imported ({error}); pip install 'kv-align[bench]'")
    return steps


def bench_time(pair: str, length: int, batch_size: int, repeats: int, device: torch.device, report: Report) -> None:
    models = _models(pair, device)
    texts = make_texts(PAIRS[pair].vocabulary_size, NUM_BATCHES * batch_size, length)
    batches = [make_batch(texts, list(range(at, at + batch_size)), device) for at in range(0, len(texts), batch_size)]
    steps = make_steps(models)
    with tempfile.TemporaryDirectory() as folder:
        cached = Arm(models, "aligner=structured", "loss=kv")
        cached.read_from_cache(texts, Path(folder))
        steps["structured, kv, cached"] = cached.step
        work: dict[str, Work] = {
            name: (lambda repeat, step=step: step(batches[repeat % NUM_BATCHES])) for name, step in steps.items()
        }
        mlps = MlpsAlone(models)
        inputs = mlps.inputs(batches[0])
        work["its MLPs alone"] = lambda repeat: mlps.run(inputs)
        costs_ms = interleaved_ms(work, repeats, device)
    what = "ms" if device.type == "cuda" else "ms of processor time"
    table = _table(f"{pair} pair, T {length}: {what}, {repeats} repeats", "step / beside", "step", "beside", "ratio")
    for row in TIME_ROWS:
        if not all(name in costs_ms for name in row.beside):
            continue
        low, median, high = quartiles(ratios(costs_ms, row.step, row.beside))
        one, other = (sum(statistics.median(costs_ms[name]) for name in names) for names in ([row.step], row.beside))
        counts = pair == WITH_GOALS and row.goal_at in (0, length)
        ratio = f"{median:.3f} ({low:.3f} - {high:.3f})"
        report.numbers[f"{pair}, T {length}: {_name(row)}"] = median
        table.add_row(_name(row), f"{one:.1f}", f"{other:.1f}", ratio, *verdict(median, row.goal, counts))
    report.console.print(table)


def bench_memory(pair: str, lengths: Sequence[int], batch_size: int, device: torch.device, report: Report) -> None:
    """Peaks of the steps above what is held between them, and how much of that is extra over the floor's peak."""
    extra: dict[str, dict[int, int]] = {}
    goal = pair == WITH_GOALS
    table = _table(f"{pair} pair: peak memory in MB", "step", "T", "peak", "extra over the floor")
    for length in lengths:
        steps = make_steps(_models(pair, device))
        batch = make_batch(make_texts(PAIRS[pair].vocabulary_size, batch_size, length), list(range(batch_size)), device)
        for step in steps.values():
            step(batch)
        peaks = {name: peak_bytes(partial(step, batch), device) for name, step in steps.items()}
        for name, peak in peaks.items():
            over = peak - peaks["floor"]
            extra.setdefault(name, {})[length] = over
            table.add_row(name, str(length), f"{peak / 1e6:.1f}", f"{over / 1e6:.1f}")
            report.numbers[f"{pair}, T {length}: peak MB of {name}"] = peak / 1e6
    report.console.print(table)
    table = _table(f"{pair} pair: peak extra memory", "step / beside", "T", "ratio")
    for row in MEMORY_ROWS:
        for length in lengths:
            ratio = extra[row.step][length] / extra[row.beside[0]][length]
            table.add_row(_name(row), str(length), f"{ratio:.3f}", *verdict(ratio, row.goal, goal))
    for first, second, third in zip(lengths, lengths[1:], lengths[2:], strict=False):
        for name in ("structured, kv+struct", "flat, kv+struct"):
            per_token = [
                (extra[name][after] - extra[name][before]) / (after - before)
                for before, after in ((first, second), (second, third))
            ]
            growth = per_token[1] / per_token[0]
            title = f"{name}: a token from T {second} to {third} / from T {first} to {second}"
            table.add_row(title, str(third), f"{growth:.3f}", *verdict(growth, LINEAR, goal))
    report.console.print(table)


def bench_sweep(pair: str, length: int, runs: int, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure_sweep(PAIRS[pair], length, runs, Path(folder))
    costs = found.ratios()
    median = statistics.median(costs)
    table = _table(
        f"{pair} pair, T {length}: a sweep of {RUNS} runs of structured, kv", "with / without cache", "ratio"
    )
    report.numbers[f"{pair}, T {length}: sweep with / without cache"] = median
    spread = f"{median:.3f} ({min(costs):.3f} - {max(costs):.3f})"
    table.add_row("teacher_cache=DIR / off", spread, *verdict(median, 0.45, pair == WITH_GOALS))
    report.console.print(table)
    report.console.print(
        f"Whole runs in one process, of {EPOCHS * TEXTS // BATCH_SIZE} steps ({EPOCHS} epochs of {TEXTS} texts, batch "
        f"{BATCH_SIZE}), with model loading, evaluations and summary; {runs} of each kind were done, in turn: "
        f"{statistics.median(found.without_s):.1f} s without, {found.filling_s:.1f} s with filling, "
        f"{statistics.median(found.warm_s):.1f} s with the cache filled; the sweep is 1 filling run and {RUNS - 1} more."
    )


def bench_operators(report: Report) -> None:
    """Operators of a step at a large model's depth above plain transformers, and what would make a host wait."""
    title = f"{LAYERS} layers, V {VOCABULARY:,}, T {LENGTH:,}: operators above plain transformers"
    table = _table(title, "step", "above", "plain", "waits")
    for row, found in zip(ROWS, measure_operators(make_wide_models()), strict=True):
        met = "met" if found.above <= row.goal else "MISSED"
        table.add_row(row.name, str(found.above), str(found.floor), str(found.waits), f"<= {row.goal:,}", met)
        report.numbers[f"operators above plain transformers: {row.name}"] = found.above
    report.console.print(table)


def bench_vocabulary(report: Report, vocabulary: int = 65_536, length: int = 512) -> None:
    """Peaks where logits are what costs: a tiny pair of a large vocabulary, beside plain transformers."""
    table = _table(f"V {vocabulary:,}, T {length}: peak memory in MB", "step", "peak", "plain", "ratio")
    models = make_wide_models(layers=2, vocabulary=vocabulary)
    batch = make_batch(make_texts(vocabulary, 2, length), [0, 1], models.device)
    for row in ROWS:
        peaks = []
        for step in (Arm(models, *row.choices).step, PlainFloor(models, taught=row.taught).step):
            step(batch)
            peaks.append(peak_bytes(partial(step, batch), models.device) / 1e6)
        ratio = peaks[0] / peaks[1]
        table.add_row(row.name, *(f"{peak:.0f}" for peak in peaks), f"{ratio:.3f}", *verdict(ratio, 1.0, True))
        report.numbers[f"V {vocabulary:,}: peak memory / plain transformers: {row.name}"] = ratio
    report.console.print(table)


def _models(pair: str, device: torch.device) -> Models:
    chosen = PAIRS[pair]
    models = (make_model(chosen.vocabulary_size, shape) for shape in (chosen.teacher, chosen.student))
    return Models(*models, device)


def _name(row: Row) -> str:
    return f"{row.step} / {' + '.join(row.beside)}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate((*columns, "goal", "")):
        table.add_column(column, justify="right" if place else "left")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=sorted(PAIRS), default=["tiny", "small"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sweep-runs", type=int, default=3, help="measured with and without cache; 0: no sweep")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, default=Path("outputs/bench.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(Console(width=None if os.isatty(1) else 120))
    if "operators" in arguments.only:
        bench_operators(report)
    if "vocabulary" in arguments.only:
        bench_vocabulary(report)
    for pair in arguments.pairs:
        if "time" in arguments.only:
            for length in arguments.lengths:
                bench_time(pair, length, arguments.batch_size, arguments.repeats, device, report)
        if "memory" in arguments.only:
            bench_memory(pair, MEMORY_LENGTHS, arguments.batch_size, device, report)
        if "sweep" in arguments.only and arguments.sweep_runs:
            bench_sweep(pair, arguments.lengths[0], arguments.sweep_runs, report)
    if device.type == "cpu":
        report.console.print(f"load average at the end: {', '.join(f'{each:.1f}' for each in os.getloadavg())}")
    report.write(arguments.json)


if __name__ == "__main__":
    main()
