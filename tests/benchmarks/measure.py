"""Measuring: what interleaved pieces of work cost, and how much memory each holds at its peak.

On a CPU the cost is processor time, so that what else the machine does is not counted; on one thread and an idle machine
that is the time on the clock. On a GPU it is the time on the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

Work = Callable[[int], None]
"""A piece of work, given the number of the repeat."""


class Report:
    """Prints tables, and keeps their numbers by name for a comparison with those of another commit."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.numbers: dict[str, float] = {}

    def write(self, file: Path) -> None:
        """Write the numbers as JSON, with the commit that they are of."""
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"commit": commit.stdout.strip(), "torch": torch.__version__, "numbers": self.numbers}
        file.write_text(json.dumps(content, indent=1))
        self.console.print(f"numbers: {file}")


def now_s(device: torch.device) -> float:
    """The clock that costs are read from."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interleaved_ms(work: Mapping[str, Work], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Cost of each piece of work in each repeat; every second repeat goes through them backwards, the first warms up."""
    costs_ms: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name in list(work)[:: -1 if repeat % 2 else 1]:
            began = now_s(device)
            work[name](repeat)
            if repeat:
                costs_ms[name].append(1000 * (now_s(device) - began))
    return costs_ms


def ratios(costs: Mapping[str, Sequence[float]], step: str, beside: Sequence[str]) -> list[float]:
    """One work's cost over the sum of others' in each repeat."""
    together = [sum(each) for each in zip(*(costs[name] for name in beside), strict=True)]
    return [one / other for one, other in zip(costs[step], together, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The most that a piece of work holds at once, above what was held before it.

    Counted by the allocator (on a CPU: every allocation and release that the profiler was told of), so it does not depend
    on what the operating system has mapped. Do the work once before, so that optimizer states are there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        peak = max(peak, held)
    return peak
