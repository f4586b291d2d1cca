"""Hydra's own sweeps: several runs of one command, with each launcher, and a failure that cannot be overlooked."""

import subprocess
from pathlib import Path

import pytest

from kv_align.runs.run_dir import RunDirectory
from tests.short_runs import command

QUICK = ("trainer.max_steps=2", "trainer.warmup_steps=1", "evaluation.exact_match_examples=0", "experiment=none")


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command("--multirun", *QUICK, *overrides), f"hydra.sweep.dir={folder}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder.parent,
        timeout=400,
    )


def states(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.rglob("status.json")):
        status = RunDirectory(file.parent).status()
        assert status is not None
        found[str(file.parent.relative_to(folder))] = status.state
    return found


# The local form of submitit polls for half a minute; its Slurm form, which is the same plugin, has tests of its own.
@pytest.mark.parametrize("launcher", ["basic", "joblib", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_a_sweep_is_a_folder_of_runs_and_a_failing_one_fails_the_command_and_no_other(
    tmp_path: Path, launcher: str
) -> None:
    # That so few tokens hold nothing to score is known only when the data has been read.
    options = {
        "joblib": ("hydra.launcher.n_jobs=2",),
        "submitit_local": ("hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"),
    }
    folder, axes = tmp_path / "sweep", ["data.max_length=64,4"]
    if launcher == "basic":
        axes.append("seed=0,1")
    done = sweep(folder, *axes, f"hydra/launcher={launcher}", *options.get(launcher, ()))
    assert done.returncode == 1, done.stderr
    if launcher == "basic":
        assert states(folder) == {"0": "finished", "1": "finished", "2": "failed", "3": "failed"}
        assert (folder / "multirun.yaml").exists()
        statuses = [RunDirectory(folder / number).status() for number in ("0", "1")]
        assert [status.seed for status in statuses if status is not None] == [0, 1]
    else:
        assert states(folder) == {"0": "finished", "1": "failed"}
    assert "data.max_length=4 leaves no token to score in the 32 texts" in done.stdout + done.stderr


def test_bad_data_found_by_a_single_run_is_one_sentence_and_leaves_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        command(*QUICK, "data.max_length=4", f"output_dir={tmp_path}"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    sentences = [line for line in done.stderr.splitlines() if line.startswith("kv-align: ")]
    assert sentences == [
        "kv-align: data.max_length=4 leaves no token to score in the 32 texts of the train split: raise it."
    ]
    assert "Traceback" not in done.stderr
