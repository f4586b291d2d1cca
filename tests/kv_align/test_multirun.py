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


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_failing_run_fails_the_command_and_no_other_run(tmp_path: Path, launcher: str) -> None:
    # 64 examples a batch are more than the 32 there are: known only when the data has been read.
    options = {
        "joblib": ("hydra.launcher.n_jobs=2",),
        "submitit_local": ("hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"),
    }
    done = sweep(
        tmp_path / "sweep", "trainer.batch_size=4,64", f"hydra/launcher={launcher}", *options.get(launcher, ())
    )
    assert done.returncode == 1, done.stderr
    assert states(tmp_path / "sweep") == {"0": "finished", "1": "failed"}
    assert "trainer.batch_size=64 is above the 32 training examples" in done.stdout + done.stderr


def test_a_sweep_is_a_folder_of_runs_that_differ_in_their_axis(tmp_path: Path) -> None:
    done = sweep(tmp_path / "sweep", "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert states(tmp_path / "sweep") == {"0": "finished", "1": "finished"}
    assert (tmp_path / "sweep" / "multirun.yaml").exists()
    found = [RunDirectory(tmp_path / "sweep" / number).status() for number in ("0", "1")]
    assert [status.seed for status in found if status is not None] == [0, 1]


def test_bad_data_found_by_a_single_run_is_one_sentence_and_leaves_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        command(*QUICK, "trainer.batch_size=64", f"output_dir={tmp_path}"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    sentences = [line for line in done.stderr.splitlines() if line.startswith("kv-align: ")]
    assert sentences == ["kv-align: trainer.batch_size=64 is above the 32 training examples: lower it to at most that."]
    assert "Traceback" not in done.stderr
