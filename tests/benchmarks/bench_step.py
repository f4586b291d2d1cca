"""What an arm's training step costs beside the floor: `make bench`.

Floor: the teacher's forward without gradient, without its head and without what lies above the last layer needed, and
a cross-entropy step of the student. Ratios are medians of interleaved repeats in one run, on one thread (or one GPU).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kv_align.align.fit import Phase
from kv_align.build import make_aligner, make_objective
from kv_align.capture import prepare
from kv_align.compose import compose_config
from kv_align.config import Config
from kv_align.data.batch import Batch, Tokens
from kv_align.distill import Counts, Distiller, Teacher, TeacherStates

ARMS = {
    "flat, kv": ("aligner=flat", "loss=kv"),
    "structured, kv": ("aligner=structured", "loss=kv"),
    "flat, kv+struct": ("aligner=flat", "loss=kv+struct"),
    "structured, kv+struct": ("aligner=structured", "loss=kv+struct"),
    "logit distillation": ("aligner=none", "loss=logit_kd"),
    "cross-entropy": ("aligner=none", "loss=ce"),
}


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, hidden width, query heads, KV heads, head width."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int


PAIRS = {
    "tiny": (497, Shape(6, 160, 8, 4, 24), Shape(3, 96, 4, 2, 16)),
    "small": (8192, Shape(12, 512, 8, 4, 64), Shape(6, 256, 4, 2, 64)),
}


def make_model(vocabulary_size: int, shape: Shape, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden_size,
        intermediate_size=int(2.75 * shape.hidden_size),
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).to(device)


def make_batch(vocabulary_size: int, batch_size: int, length: int, device: torch.device) -> Batch:
    torch.manual_seed(1)
    mask = torch.ones(batch_size, length, dtype=torch.bool)
    positions = torch.arange(length).expand(batch_size, -1).contiguous()
    ids = torch.randint(0, vocabulary_size, (batch_size, length))
    tokens = Tokens(ids, mask, positions, mask.long() * 2).to(device)
    return Batch(tokens, tokens, (positions > 0).to(device), mask.to(device), True, tuple(range(batch_size)))


class Arm:
    """An arm's whole step, on models that all arms share."""

    def __init__(self, config: Config, teacher: PreTrainedModel, student: PreTrainedModel, dtype: torch.dtype) -> None:
        geometries = (prepare(teacher, "teacher"), prepare(student, "student"))
        objective = make_objective(config)
        aligner = make_aligner(config, *geometries, queries=objective.signal == "keys_values_queries")
        number, step = geometries[1].num_layers, geometries[0].num_layers // geometries[1].num_layers
        layers = [step * (layer + 1) - 1 for layer in range(number)]
        self._teacher = Teacher(teacher, layers, rotated=False)
        ones = torch.ones(number)
        distiller = Distiller(student, aligner, objective, rotated=False, key_variance=ones, value_variance=ones)
        self._distiller = distiller.to(student.device)
        self._signal, self._weights = objective.signal, objective.weights(0, 1)
        self._optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-5)
        self._dtype = dtype

    def step(self, batch: Batch) -> None:
        with torch.autocast(batch.student.ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            states: TeacherStates = self._teacher.read(batch, self._signal)
            result = self._distiller(batch, states, Counts.of([batch]), self._weights, Phase(True, True))
        torch.autograd.backward(result.total)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def teacher_only(self, batch: Batch) -> None:
        with torch.autocast(batch.student.ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            self._teacher.read(batch, "keys_values")


def timed_ms(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def bench(pair: str, length: int, batch_size: int, repeats: int, console: Console) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vocabulary_size, teacher_shape, student_shape = PAIRS[pair]
    teacher = make_model(vocabulary_size, teacher_shape, device).eval().requires_grad_(False)
    student = make_model(vocabulary_size, student_shape, device)
    batch = make_batch(vocabulary_size, batch_size, length, device)
    arms = {name: Arm(compose_config(list(choice))[0], teacher, student, dtype) for name, choice in ARMS.items()}
    work: dict[str, Callable[[], None]] = {name: (lambda arm=arm: arm.step(batch)) for name, arm in arms.items()}
    kv, plain = arms["structured, kv"], arms["cross-entropy"]

    def floor() -> None:
        kv.teacher_only(batch)
        plain.step(batch)

    work["floor"] = floor
    times_ms: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, each in work.items():
            elapsed_ms = timed_ms(each, device)
            if repeat:  # the first round warms up
                times_ms[name].append(elapsed_ms)
    table = Table(
        title=f"{pair} pair, T {length}, batch {batch_size}, {repeats} interleaved repeats, {device}, {dtype}"
    )
    for column in ("step", "median ms", "over the floor", "quartiles of the ratio"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, found in times_ms.items():
        ratios = [one / other for one, other in zip(found, times_ms["floor"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            name, f"{statistics.median(found):.1f}", f"{statistics.median(ratios):.3f}", f"{low:.2f} - {high:.2f}"
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=sorted(PAIRS), default=["tiny", "small"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for pair in arguments.pairs:
        for length in arguments.lengths:
            bench(pair, length, arguments.batch_size, arguments.repeats, Console())


if __name__ == "__main__":
    main()
