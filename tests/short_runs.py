"""Runs of a few steps on the embedded pair, real in everything but their length."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kv_align.config.compose import compose_config
from kv_align.config.config import Config
from kv_align.runs.run_dir import TIMING, RunDirectory, read_last_row, read_rows

SHORT = (
    "trainer.max_steps=6",
    "trainer.warmup_steps=2",
    "trainer.batch_size=4",
    "trainer.aligner_lr=1e-3",
    "trainer.log_interval=1",
    "trainer.grad_norm_interval=1",
    "trainer.checkpoint_interval=2",
    "evaluation.interval=3",
    "evaluation.exact_match_examples=3",
    "evaluation.max_new_tokens=4",
    "evaluation.validation_examples=8",
    "evaluation.probe_examples=8",
    "evaluation.calibration_examples=8",
    "data.train_examples=32",
    "data.validation_examples=8",
    "data.test_examples=8",
)


def short_config(*overrides: str) -> Config:
    """The effective configuration of a short run."""
    return compose_config([*SHORT, *overrides])[0]


def command(*overrides: str) -> list[str]:
    """The command line of a short run."""
    flags = [each for each in overrides if each.startswith("--")]
    return [sys.executable, "-m", "kv_align.train", *flags, *SHORT, *(each for each in overrides if each not in flags)]


def wait_for_step(run: RunDirectory, step: int, process: subprocess.Popen[Any], timeout_s: float = 120) -> None:
    """Wait until a run in another process has logged a step."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        row = read_last_row(run.metrics_file) if run.metrics_file.exists() else None
        if row is not None and row["step"] >= step:
            return
        assert process.poll() is None, "the run ended before it was disturbed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    raise AssertionError(f"step {step} was not reached in {timeout_s} s")


def results(run: RunDirectory) -> dict[str, Any]:
    """Everything of a finished run that must not depend on how often it was disturbed."""
    summary = json.loads(run.summary_file.read_text())
    return {
        "metrics": [without_timing(row) for row in read_rows(run.metrics_file)],
        "evaluations": [without_timing(row) for row in read_rows(run.evaluations_file)],
        "summary": {
            key: value
            for key, value in without_timing(summary).items()
            if key not in ("step_time_s_median", "overhead_s", "overhead_s_by_part")
        },
        "weights": {str(file.relative_to(run.path)): file.read_bytes() for file in weight_files(run)},
    }


def weight_files(run: RunDirectory) -> list[Path]:
    """The files of the trained student and aligner."""
    return sorted([*run.student.glob("*.safetensors"), *run.aligner.glob("*.safetensors")])


def without_timing(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the columns that depend on the machine's mood."""
    return {key: value for key, value in row.items() if key not in TIMING}
