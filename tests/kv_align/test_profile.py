"""What `python -m kv_align.profile` finds, by its exit code and its text."""

import os
import re
import subprocess
import sys

import pytest

from kv_align import profile
from tests.short_runs import SHORT


def profiled(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """Profile a short run in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["profile", *SHORT, *overrides, "--steps", "2"])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as left:
        profile.main()
    assert isinstance(left.value.code, int)
    return left.value.code


def mlp(width_in: int, width_out: int) -> int:
    """Parameters of a multilayer perceptron whose hidden layer is four times as wide as its input."""
    return 4 * width_in * (width_in + 1) + width_out * (4 * width_in + 1)


# Of the embedded pair, at 3 layers: 4 KV and 8 query heads of width 24 to 2 and 4 of width 16; keys, values, queries.
PARAMETERS = {
    "flat": 3 * (2 * mlp(4 * 24, 2 * 16) + mlp(8 * 24, 4 * 16)),
    "structured": 3 * (2 * (2 * 4 + 24 * 16) + 4 * 8 + 24 * 16),
}


@pytest.mark.parametrize(("aligner", "loss"), [("flat", "kv+struct"), ("structured", "kv+struct+logit")])
def test_both_aligners_are_finite_and_reach_the_student(
    aligner: str, loss: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiled(monkeypatch, f"aligner={aligner}", f"loss={loss}") == 0
    told = capsys.readouterr().out
    assert re.search(rf"aligner +│ +{PARAMETERS[aligner]:,} ", told), told
    assert re.search(r"k 4×3×4×\d+×24", told), told
    assert re.search(r"k 4×3×2×\d+×16", told), told
    assert "2 steps: all finite: yes" in told
    assert re.findall(r"^  (\w+)_loss: \d", told, re.MULTILINE) == ["total", "task", *loss.split("+")]
    assert "gradient from the alignment loss into the student: yes" in told


def test_a_student_that_is_not_taught_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiled(monkeypatch, "loss=kv", "loss.lambda_kv=0") == 1
    assert "gradient from the alignment loss into the student: NONE" in capsys.readouterr().out


def test_several_processes_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kv_align.profile", *SHORT],
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("kv-align: WORLD_SIZE=2 is not allowed: ")
