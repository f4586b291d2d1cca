"""What a GPU makes of it, in at most eight minutes and without a network: `make bench-gpu`.

Steps at the shapes of Qwen2.5 7B -> 1.5B (random weights, bfloat16 autocast, no padding) beside plain transformers; small
runs at once against one after the other; and the filling of a teacher cache against the teacher alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from kv_align.data.batch import Batch
from tests.benchmarks.measure import Report, now_s
from tests.benchmarks.pairs import make_batch, make_texts
from tests.benchmarks.steps import Arm, MlpsAlone, Models, PlainFloor, TrlLogits


@dataclass(frozen=True)
class Shape:
    """A Qwen2: layers, hidden width, heads, key heads, inner width."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    inner: int
    tied: bool


@dataclass(frozen=True)
class Pair:
    """Teacher, in bfloat16, and student, in float32, and what they read."""

    teacher: Shape
    student: Shape
    vocabulary: int
    length: int
    batch_size: int


PAIRS = {
    "large": Pair(Shape(28, 3584, 28, 4, 18944, False), Shape(28, 1536, 12, 2, 8960, True), 151_936, 1024, 4),
    "small": Pair(Shape(28, 1536, 12, 2, 8960, True), Shape(24, 896, 14, 2, 4864, True), 151_936, 1024, 4),
    "tiny": Pair(Shape(4, 64, 4, 2, 96, False), Shape(2, 32, 4, 2, 64, True), 512, 64, 2),  # does it run at all
}


@dataclass(frozen=True)
class Row:
    """A step over others' sum, and what the ratio should be at most; and its memory over the first of them, in GB."""

    step: str
    beside: tuple[str, ...]
    goal: float | None = None
    memory_goal: float | None = None


SMALL_RUN = (
    "data.train_examples=512",
    "data.validation_examples=64",
    "data.test_examples=64",
    "evaluation.validation_examples=64",
    "evaluation.probe_examples=64",
    "evaluation.exact_match_examples=16",
    "evaluation.max_new_tokens=32",
)
ROWS = (
    Row("plain fine-tuning", ("plain transformers",), 1.00),
    Row("structured kv", ("floor",), 1.05, 1.0),
    Row("flat kv", ("floor", "its MLPs alone"), 1.05),
    Row("structured kv+struct", ("floor",), 1.20, 2.0),
    Row("logit distillation", ("floor",), None, 2.0),
    Row("logit distillation", ("trl logit distillation",), 0.90),
)


def make_model(shape: Shape, vocabulary: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
    )
    with device:
        return Qwen2ForCausalLM(config).to(dtype)


def bench_steps(name: str, models: Models, report: Report) -> None:
    pair, device = PAIRS[name], models.device
    texts = make_texts(pair.vocabulary, 2 * pair.batch_size, pair.length)
    batches = [make_batch(texts, list(range(at, at + pair.batch_size)), device) for at in (0, pair.batch_size)]

    def mlps() -> Callable[[Batch], None]:
        alone = MlpsAlone(models)
        inputs = alone.inputs(batches[0])
        return lambda batch: alone.run(inputs)

    steps: dict[str, Callable[[], Callable[[Batch], None]]] = {
        "plain transformers": lambda: PlainFloor(models, taught=False).step,
        "plain fine-tuning": lambda: Arm(models, "aligner=none", "loss=ce").step,
        "floor": lambda: PlainFloor(models, taught=True).step,
        "structured kv": lambda: Arm(models, "aligner=structured", "loss=kv").step,
        "flat kv": lambda: Arm(models, "aligner=flat", "loss=kv").step,
        "structured kv+struct": lambda: Arm(models, "aligner=structured", "loss=kv+struct").step,
        "logit distillation": lambda: Arm(models, "aligner=none", "loss=logit_kd").step,
        "trl logit distillation": lambda: TrlLogits(models).step,
        "its MLPs alone": mlps,
    }
    costs, peaks = {}, {}
    for step, make in steps.items():
        try:
            costs[step], peaks[step] = cost_of(make(), batches, device)
        except (ImportError, torch.OutOfMemoryError) as error:
            report.console.print(f"{step}: not measured ({type(error).__name__})")
        models.student.zero_grad(set_to_none=True)
        gc.collect()
        report.numbers |= {f"{name}, ms: {step}": costs[step]} if step in costs else {}
    table = Table("step", "beside", "ms", "beside, ms", "ratio", "goal", "GB over it", "goal", title=f"{name} pair")
    for row in ROWS:
        if row.step not in costs or not all(each in costs for each in row.beside):
            continue
        beside = sum(costs[each] for each in row.beside)
        ratio, memory = costs[row.step] / beside, peaks[row.step] - peaks[row.beside[0]]
        title = f"{row.step} / {' + '.join(row.beside)}"
        report.numbers |= {f"{name}: {title}": ratio, f"{name}, GB over it: {title}": memory}
        table.add_row(
            row.step,
            " + ".join(row.beside),
            *(f"{each:.1f}" for each in (costs[row.step], beside)),
            f"{ratio:.3f}",
            "" if row.goal is None else f"<= {row.goal:.2f}",
            f"{memory:+.1f}",
            "" if row.memory_goal is None else f"<= {row.memory_goal:.0f}",
        )
    report.console.print(table)


def cost_of(step: Callable[[Batch], None], batches: list[Batch], device: torch.device) -> tuple[float, float]:
    """Median milliseconds of five steps after two, and the peak in GB."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times_ms = []
    for number in range(7):
        began = now_s(device)
        step(batches[number % 2])
        times_ms.append(1000 * (now_s(device) - began))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return statistics.median(times_ms[2:]), peak


def bench_cache(name: str, models: Models, report: Report) -> None:
    """Texts a second while a cache is filled, over those of the teacher alone."""
    pair = PAIRS[name]
    texts = make_texts(pair.vocabulary, 64, pair.length)
    arm = Arm(models, "aligner=structured", "loss=kv")
    began = now_s(models.device)
    for start in range(0, len(texts), 16):
        batch = make_batch(texts, list(range(start, start + 16)), models.device)
        with models.autocast():
            arm.teacher.read(batch, arm.signals)
    alone_s = now_s(models.device) - began
    with tempfile.TemporaryDirectory() as folder:
        began = now_s(models.device)
        arm.read_from_cache(texts, Path(folder))
        filling_s = now_s(models.device) - began
    report.numbers[f"{name}: filling a cache / the teacher alone"] = filling_s / alone_s
    report.console.print(
        f"{name} pair, cache of {len(texts)} texts: {filling_s:.1f} s, the teacher alone {alone_s:.1f} s "
        f"({filling_s / alone_s:.2f} times)"
    )


def start_run(folder: Path, seed: int, steps: int) -> subprocess.Popen[bytes]:
    """Start a run of the embedded pair, of few texts: what is measured is how runs share a GPU."""
    places = [f"output_dir={folder.parent}", f"run_name={folder.name}", f"seed={seed}"]
    choices = [f"trainer.max_steps={steps}", f"trainer.warmup_steps={min(5, steps - 1)}", *SMALL_RUN]
    return subprocess.Popen(
        [sys.executable, "-m", "kv_align.train", *places, *choices],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def bench_runs(at_once: int, steps: int, report: Report) -> None:
    """Runs of the embedded pair in an hour, several at once and one after the other."""
    hourly = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, at_once):
            began = time.perf_counter()
            runs = [start_run(Path(folder) / f"{number}-{seed}", seed, steps) for seed in range(number)]
            failed = sum(run.wait() != 0 for run in runs)
            if failed:
                report.console.print(f"{failed} of {number} small runs failed")
            hourly[number] = 3600 * (number - failed) / (time.perf_counter() - began)
            report.numbers[f"small runs that failed, {number} at once"] = failed
    if hourly[1]:
        report.numbers[f"small runs an hour, {at_once} at once / one at a time"] = hourly[at_once] / hourly[1]
    report.console.print(
        f"small runs of {steps} steps: {hourly[at_once]:.0f} an hour {at_once} at once, {hourly[1]:.0f} one at a time"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", choices=sorted(PAIRS), default="large", help="tiny: whether it runs at all, on a CPU")
    parser.add_argument("--at-once", type=int, default=8, help="small runs at once")
    parser.add_argument("--steps", type=int, default=100, help="of each small run")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench_gpu.json"))
    arguments = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(Console(width=140))
    report.console.print(torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: only that it runs")
    torch.manual_seed(0)
    pair = PAIRS[arguments.pair]
    teacher = make_model(pair.teacher, pair.vocabulary, torch.bfloat16, device)
    student = make_model(pair.student, pair.vocabulary, torch.float32, device)
    models = Models(teacher, student, device)
    bench_steps(arguments.pair, models, report)
    bench_cache(arguments.pair, models, report)
    del models, teacher, student
    gc.collect()
    if arguments.at_once:
        bench_runs(arguments.at_once, arguments.steps, report)
    report.write(arguments.json)


if __name__ == "__main__":
    main()
