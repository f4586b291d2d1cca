"""Comparing arms of a planned sweep is a look at it."""

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.__main__ import main
from kv_align.runs.sweep_dir import SweepDirectory
from tests.analysis.synthetic import SMALL, write_sweep

EIGHT = replace(SMALL, seeds=8)


def compared(sweep: SweepDirectory, a: str, b: str, output: Path) -> str:
    assert main(["compare", f"{sweep.path}:{a}", f"{sweep.path}:{b}", "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    return write_sweep(tmp_path_factory.mktemp("eight") / "sweep", EIGHT)


def test_an_incomplete_sweep_gives_an_estimate_and_a_spread_and_nothing_else(tmp_path):
    sweep = write_sweep(tmp_path / "s", EIGHT, keep=lambda run: (run.arm, run.seed) != ("none", 7))
    text = compared(sweep, "v4_0_2", "baseline", tmp_path / "out.md")
    assert "paired over 8 seeds (spread between seeds " in text
    assert "p =" not in text
    assert "interval" not in text.split("## ")[0].split("What this cannot show")[0]
    assert "is not complete as declared" in text
    (line,) = (line for line in sweep.history_file.read_text(encoding="utf-8").splitlines() if line.startswith("- "))
    assert "Comparison of v4_0_2, kv with baseline, kv." in line
    assert '"tested": false' in line


def test_the_declared_comparison_is_called_declared_and_counts_as_a_look(written, tmp_path):
    text = compared(written, "v4_0_2", "baseline", tmp_path / "out.md")
    assert "**This is the declared primary comparison.**" in text
    assert "p = 0.0078, exact sign-flip" in text
    assert '"tested": true' in written.history_file.read_text(encoding="utf-8")


def test_another_pair_of_arms_is_exploratory_and_leaves_a_line(written, tmp_path):
    text = compared(written, "v4_0_2", "none", tmp_path / "out.md")
    assert "was not declared before the runs and is exploratory" in text
    last = written.history_file.read_text(encoding="utf-8").splitlines()[-1]
    assert "Comparison of v4_0_2, kv with none." in last
    assert '"tested": false' in last


def test_one_mean_stands_for_one_number_and_no_better_is_said_of_what_cannot_be_compared(written, tmp_path):
    text = compared(written, "v4_0_2", "baseline", tmp_path / "out.md")
    at_equal_steps = next(line for line in text.splitlines() if line.startswith("| 50 |") and "%" in line).split("|")
    at_the_end = next(line for line in text.splitlines() if line.startswith("| validation perplexity")).split("|")
    assert [each.strip() for each in at_the_end[2:4]] == [each.strip() for each in at_equal_steps[2:4]]
    for line in text.splitlines():
        if line.startswith(("| cosine", "| KV loss")):
            assert line.endswith("|  |"), line
