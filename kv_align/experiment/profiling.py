"""What one training step is made of: stage by stage, and over some real steps."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kv_align.align.aligner import count_parameters
from kv_align.align.schedule import Phase
from kv_align.config.compose import arm_name
from kv_align.config.config import Config
from kv_align.data.batch import Batch
from kv_align.experiment.assembly import Assembly, assemble
from kv_align.runs.run_dir import RunDirectory
from kv_align.training.step import Counts

Result = TypeVar("Result")


class Stages:
    """Runs the stages of a step and keeps what each cost."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.table = Table(title="one step", title_justify="left")
        for column, justify in (
            ("stage", "left"),
            ("gives", "left"),
            ("ms", "right"),
            ("MiB", "right"),
            ("GFLOP", "right"),
        ):
            self.table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]

    def run(self, name: str, stage: Callable[[], Result], shapes: Callable[[Result], Mapping[str, Tensor]]) -> Result:
        """Run a stage twice, the first time to count its arithmetic and to warm up, and note its cost.

        Memory is the growth of the process on a CPU (pages it reuses do not show), the peak above the start on a GPU.
        """
        with FlopCounterMode(display=False) as counter:
            stage()
        before, began = self._memory(), self._now()
        result = stage()
        elapsed_ms, grown = 1000 * (self._now() - began), self._memory() - before
        gives = [f"{key} {'×'.join(map(str, value.shape))}" for key, value in shapes(result).items()]
        flops = f"{counter.get_total_flops() / 1e9:.2f}"
        self.table.add_row(name, "\n".join(gives), f"{elapsed_ms:.1f}", f"{max(0, grown) / 2**20:.0f}", flops)
        return result

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _memory(self) -> int:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        return int(psutil.Process().memory_info().rss)


def profile(config: Config, num_steps: int) -> bool:
    """Profile a configuration and print it; whether all is finite and the student is taught.

    Parameters
    ----------
    config
        Of any run.
    num_steps
        Real optimizer steps to do after the stages were looked at one by one.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        built = assemble(config, RunDirectory(Path(folder)), Path(folder))
        batch = next(built.loop.batches(0))[0].to(built.accelerator.device)
        console.print(_parameters(config, built))
        console.print(_stages(built, batch).table)
        return _steps(config, built, num_steps, console)


def _parameters(config: Config, built: Assembly) -> Table:
    table = Table(title=f"{arm_name(config)}, {config.loss.name}", title_justify="left")
    for column in ("", "parameters", "layers", "heads", "head width"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for name, reader in (("teacher", built.teacher_model), ("student", built.student_model)):
        shape = reader.geometry
        heads = f"{shape.num_query_heads} query, {shape.num_key_value_heads} KV"
        width = (
            f"{shape.key_width}" if shape.key_width == shape.value_width else f"{shape.key_width}, {shape.value_width}"
        )
        table.add_row(name, f"{reader.model.num_parameters():,}", str(shape.num_layers), heads, width)
    if built.distiller.aligner is not None:
        table.add_row("aligner", f"{count_parameters(built.distiller.aligner):,}", f"from {built.layers}")
    return table


def _stages(built: Assembly, batch: Batch) -> Stages:
    stages = Stages(built.accelerator.device)
    distiller, loss = built.distiller.train(), built.distiller.loss
    both = Phase(student_learns=True, aligner_learns=True)
    autocast = built.accelerator.autocast
    tokens = batch.student

    def teacher() -> Any:
        with autocast():
            return built.teacher.read(batch, loss.requests)

    def student() -> Any:
        with autocast():
            return distiller.body(**tokens.inputs, use_cache=False)

    stages.run("batch", lambda: batch, lambda b: {"student ids": b.student.ids, "teacher ids": b.teacher.ids})
    states = stages.run("teacher", teacher, lambda given: given.tensors)
    stages.run("student", student, lambda output: {next(iter(output)): output[0]})
    if built.distiller.aligner is not None and states.target is None:
        aligner = built.distiller.aligner

        def align() -> Any:
            with autocast():
                return aligner(states.raw, batch.correspondence)

        stages.run("aligner", align, lambda target: target.tensors())

    def forward() -> Any:
        with autocast():
            weights = loss.weights(0, 1)
            return distiller(batch, states, Counts.of([batch]), weights, both)

    def backward() -> None:
        distiller.zero_grad()
        torch.autograd.backward(forward().total)

    stages.run("student, aligner and loss", forward, lambda result: {"total": result.total})
    stages.run("the same and backward", backward, lambda nothing: {})
    distiller.zero_grad()
    return stages


def _steps(config: Config, built: Assembly, num_steps: int, console: Console) -> bool:
    rows, times_s = [], []
    for _, micro_batches in zip(range(num_steps), built.loop.batches(0), strict=False):
        began = time.perf_counter()
        losses, row = built.loop.step(micro_batches, logged=True)
        times_s.append(time.perf_counter() - began)
        built.loop.progress.step += 1
        if row is None:
            console.print(f"NOT FINITE at step {built.loop.progress.step}: {losses}")
            return False
        rows.append(row)
    finite = all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    console.print(
        f"{num_steps} steps: all finite: {'yes' if finite else 'NO'}; median {statistics.median(times_s):.3f} s"
    )
    for name in ("total_loss", "task_loss", *built.distiller.loss.schedules):
        console.print(f"  {name}: {rows[0][name]:.4f} -> {rows[-1][name]:.4f}")
    if "kv_grad_norm" not in rows[0]:  # no states are compared
        return finite
    reach = [row["kv_grad_norm"] for row in rows]
    taught = max(reach) > 0
    console.print(
        f"  gradient from the alignment loss into the student: {'yes' if taught else 'NONE'}, "
        f"norm {reach[0]:.3g} -> {reach[-1]:.3g}"
    )
    return finite and taught
