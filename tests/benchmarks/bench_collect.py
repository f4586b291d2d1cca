"""How fast a large sweep is collected: python -m tests.benchmarks.bench_collect [RUNS] [FOLDER]

Writes 2,000 runs of 500 logged steps and 4 metrics into a temporary folder (each with all the other files of a run and its
compact record), then reads them cold, warm, and after one run changed, and by the loop that one would write first:
OmegaConf.load of every configuration and pandas.read_json of every metrics file. Every reading is a process of its own, so
that its memory is its own. Not part of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from kv_align.runs.digests import digest_of_json as digest
from kv_align.runs.record import write_record
from kv_align.runs.run_dir import RunDirectory, Status
from kv_align.runs.sweep_dir import Plan, PlannedRun, SweepDirectory
from tests.analysis.synthetic import CRITERIA, Recipe, config_of, write_outcomes

STEPS = 500
METRICS = ("task_loss", "kv_loss", "total_loss", "cosine_key")


def write(folder: Path, num_runs: int) -> None:
    """Write the sweep; without fsync, since nothing here needs to survive a crash."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    sweep, rng = SweepDirectory(folder), np.random.default_rng(0)
    planned = []
    outcomes: bytes | None = None
    full = yaml.safe_load((Path(__file__).parents[2] / "conf" / "train.yaml").read_text(encoding="utf-8"))
    for number in range(num_runs):
        arm, seed = ("baseline", "v4_0_2")[number % 2], number // 2
        config = {**config_of(arm, "kv", seed), "evaluation": full["evaluation"]}
        content_hash = digest(config)
        run = PlannedRun(f"{arm}-kv-seed{seed}-{content_hash[:8]}", arm, "kv", "kv", False, seed, content_hash, config)
        planned.append(run)
        directory = sweep.run(run)
        directory.path.mkdir(parents=True)
        status = Status("finished", "", arm, "kv", seed, content_hash, STEPS, STEPS, 1, 0.0, 1.0, "host", 1, "")
        values = rng.random((STEPS, len(METRICS)))
        rows = [{"step": step + 1, **dict(zip(METRICS, row, strict=True))} for step, row in enumerate(values.tolist())]
        evaluations = [{"step": step, "validation_loss": 3.0 + rng.random()} for step in range(0, STEPS + 1, 100)]
        summary = {"content_hash": content_hash, "elapsed_s": 10.0} | evaluations[-1]
        attempt = {"git_commit": "c0ffee", "git_diff": "", "packages": {"torch": "2"}, "python": "3.11"}
        provenance = {"data_order_sha256": digest(seed), "initial_weights_sha256": digest(seed), "attempts": [attempt]}
        directory.config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
        directory.status_file.write_text(json.dumps(asdict(status)), encoding="utf-8")
        directory.summary_file.write_text(json.dumps(summary), encoding="utf-8")
        directory.provenance_file.write_text(json.dumps(provenance), encoding="utf-8")
        directory.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        directory.evaluations_file.write_text("".join(json.dumps(row) + "\n" for row in evaluations), encoding="utf-8")
        if outcomes is None:
            write_outcomes(directory, run, Recipe())
            outcomes = directory.outcomes_file.read_bytes()
        directory.outcomes_file.write_bytes(outcomes)
        assert write_record(directory)
    arms = {arm: {"expected_percent": None, "control": False, "description": ""} for arm in ("baseline", "v4_0_2")}
    sweep.write_plan(Plan("benchmark", 0.0, "baseline", arms, CRITERIA, "", "", {}, tuple(planned)))


def ours(folder: Path) -> int:
    """Collect, and load all metrics; returns the rows."""
    from analysis.read.collect import collect

    return len(collect(folder).table("metrics"))


def collect_only(folder: Path) -> int:
    """Collect, as `python -m analysis collect` does before it writes CSV."""
    from analysis.read.collect import collect

    return len(collect(folder).runs)


def naive(folder: Path) -> int:
    """The loop that one would write first."""
    import pandas as pd
    from omegaconf import OmegaConf

    tables = []
    for config in sorted(folder.glob("runs/*/config.yaml")):
        loaded = OmegaConf.load(config)
        table = pd.read_json(config.with_name("metrics.jsonl"), lines=True)
        tables.append(table.assign(arm=loaded.arm, seed=loaded.seed))
    return len(pd.concat(tables))


READINGS = {"ours": ours, "collect_only": collect_only, "naive": naive}


def measure(name: str, folder: Path, *, times: int, cold: bool = False) -> float:
    """Read several times, each in a process of its own with imports made before the clock starts; returns the best wall.

    The best is what the code needs; the rest is what else the machine was doing.
    """
    code = (
        "import sys, time, json, resource; from pathlib import Path\n"
        "import pandas, pyarrow.parquet, omegaconf, analysis.read.collect\n"
        "from tests.benchmarks import bench_collect as bench\n"
        f"before = time.perf_counter(); cpu = time.process_time(); rows = bench.READINGS[{name!r}](Path({str(folder)!r}))\n"
        "print(json.dumps([rows, time.perf_counter() - before, time.process_time() - cpu,"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))"
    )
    taken = []
    for _ in range(times):
        if cold:
            shutil.rmtree(SweepDirectory(folder).report / "data", ignore_errors=True)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        taken.append(json.loads(done.stdout))
    rows, memory_mb = taken[0][0], max(each[3] for each in taken)
    wall_s, cpu_s = ([each[place] for each in taken] for place in (1, 2))
    print(
        f"  {rows:9,} rows  best of {times}: {min(wall_s):6.2f} s wall, {min(cpu_s):6.2f} s CPU  "
        f"(median {np.median(wall_s):6.2f} s wall)  {memory_mb:5.0f} MB peak",
        flush=True,
    )
    return min(wall_s)


def main() -> None:
    """Write, measure, print."""
    num_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp(prefix="bench-collect-"))
    began = time.perf_counter()
    sweep = folder / "sweep"
    write(sweep, num_runs)
    written_s = time.perf_counter() - began
    print(
        f"{num_runs} runs x {STEPS} steps x {len(METRICS)} metrics, written in {written_s:.0f} s; {os.cpu_count()} cores"
    )
    best = {}
    for title, name, times, cold in (
        ("cold, collect", "collect_only", 3, True),
        ("cold, collect and load all metrics", "ours", 3, True),
        ("warm, collect", "collect_only", 5, False),
        ("warm, collect and load all metrics", "ours", 5, False),
        ("OmegaConf.load and pandas.read_json", "naive", 1, False),
    ):
        print(title, flush=True)
        best[title] = measure(name, sweep, times=times, cold=cold)
    first = RunDirectory(sorted((sweep / "runs").iterdir())[0])
    with first.metrics_file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": STEPS + 1, "task_loss": 1.0}) + "\n")
    print("one run changed, collect")
    measure("collect_only", sweep, times=1)
    naive_s = best.pop("OmegaConf.load and pandas.read_json")
    print(
        ", ".join(f"{title}: {naive_s / wall_s:.0f} x" for title, wall_s in best.items()), "faster than the naive loop"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
