"""Golden trajectories: what a few short runs gave when they were last looked at.

The values were written by this package at version 0.1.0, on torch 2.13 (CPU, one thread). A change that is not meant to
change results leaves them as they are; one that is says so in its commit, and why. The tolerance is for other processors.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kv_align.experiment.experiment import run as do_run
from kv_align.runs.run_dir import RunDirectory, read_rows
from tests.short_runs import short_config

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.mark.parametrize("cell", sorted(GOLDEN))
def test_a_short_run_is_what_it_was(cell: str, tmp_path: Path) -> None:
    expected = GOLDEN[cell]
    assert do_run(short_config(*cell.split()), tmp_path) == "finished"
    directory = RunDirectory(tmp_path)
    rows = read_rows(directory.metrics_file)
    summary = json.loads(directory.summary_file.read_text())
    for column in ("total_loss", "grad_norm", "kv_grad_norm"):
        found = [row[column] for row in rows if column in row]
        assert found == pytest.approx(expected[column], rel=1e-3), column
    assert summary["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-3)
    assert summary["probe_r2_key"] == pytest.approx(expected["probe_r2_key"], rel=1e-2)
