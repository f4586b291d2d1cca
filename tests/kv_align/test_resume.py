"""A run that is killed, asked to leave, or finds a damaged checkpoint ends where an undisturbed one does, bit for bit."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kv_align.experiment.experiment import run as do_run
from kv_align.runs.run_dir import EXIT_CODES, RunDirectory, read_rows
from kv_align.training import checkpoint
from tests.short_runs import SHORT, command, results, short_config, wait_for_step

OVERRIDES = ("loss=kv+struct", "seed=5", "model.student_start=scratch")
# A run that is killed by its own hand while it digests the files of its second checkpoint: in the middle of writing it.
KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from kv_align.training import checkpoint
from kv_align.config.compose import compose_config
from kv_align.experiment.experiment import run

digest, calls = checkpoint.file_digest, []
def digest_and_die(file):
    calls.append(file)
    if "00000004" in str(file) and len([c for c in calls if "00000004" in str(c)]) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(file)
checkpoint.file_digest = digest_and_die
run(compose_config(sys.argv[2:])[0], Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = RunDirectory(tmp_path_factory.mktemp("undisturbed") / "run")
    assert do_run(short_config(*OVERRIDES), directory.path) == "finished"
    return directory


def test_a_run_is_the_same_when_repeated(undisturbed: RunDirectory, tmp_path: Path) -> None:
    again = RunDirectory(tmp_path / "run")
    assert do_run(short_config(*OVERRIDES), again.path) == "finished"
    assert results(again) == results(undisturbed)
    assert [row["step"] for row in read_rows(again.metrics_file)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_rows(again.evaluations_file)] == [0, 3, 6]


def test_another_seed_is_another_run(undisturbed: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "run")
    assert do_run(short_config(*OVERRIDES, "seed=6"), other.path) == "finished"
    ours, theirs = results(other), results(undisturbed)
    assert ours["weights"] != theirs["weights"]
    assert ours["metrics"][0]["task_loss"] != theirs["metrics"][0]["task_loss"]


def test_a_killed_run_goes_on_as_if_nothing_had_been(undisturbed: RunDirectory, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    process = subprocess.Popen(
        command(*OVERRIDES, f"output_dir={tmp_path}", "run_name=run"),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for_step(directory, 3, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    status = directory.status()
    assert status is not None
    assert status.state == "running"
    assert do_run(short_config(*OVERRIDES), directory.path) == "finished"
    assert results(directory) == results(undisturbed)
    status = directory.status()
    assert status is not None
    assert (status.state, status.attempt, status.step) == ("finished", 2, 6)


def test_a_killed_run_of_an_aligner_on_rotations_goes_on_with_the_same_ones(tmp_path: Path) -> None:
    overrides = ("experiment=orthogonal", "trainer.aligner_lr=1e-1")
    undisturbed, directory = RunDirectory(tmp_path / "undisturbed"), RunDirectory(tmp_path / "run")
    assert do_run(short_config(*overrides), undisturbed.path) == "finished"
    process = subprocess.Popen(
        command(*overrides, f"output_dir={tmp_path}", "run_name=run"),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for_step(directory, 3, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert do_run(short_config(*overrides), directory.path) == "finished"
    assert results(directory) == results(undisturbed)
    ours, theirs = (load_file(next(run.path.glob("aligner/*.safetensors"))) for run in (directory, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(name.endswith("original") and each.abs().max() > 0.05 for name, each in theirs.items())


def test_a_kill_in_the_middle_of_a_checkpoint_costs_only_steps(undisturbed: RunDirectory, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(directory.path), *SHORT, *OVERRIDES],
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = sorted(path.name for path in directory.checkpoints.iterdir())
    assert left[1:] == ["step_00000002"]
    assert left[0].startswith(".writing_00000004")
    found = checkpoint.newest_sound(directory.checkpoints)
    assert found is not None
    assert found.name == "step_00000002"
    assert do_run(short_config(*OVERRIDES), directory.path) == "finished"
    assert results(directory) == results(undisturbed)


def test_a_run_asked_to_leave_saves_and_says_so(undisturbed: RunDirectory, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    process = subprocess.Popen(
        command(*OVERRIDES, f"output_dir={tmp_path}", "run_name=run"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    wait_for_step(directory, 1, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    status = directory.status()
    assert status is not None
    assert process.returncode == EXIT_CODES["interrupted"] == 75, stderr.decode()
    assert status.state == "interrupted"
    assert "SIGTERM" in status.reason
    found = checkpoint.newest_sound(directory.checkpoints)
    assert found is not None
    assert found.name == f"step_{status.step:08d}"
    assert do_run(short_config(*OVERRIDES), directory.path) == "finished"
    assert results(directory) == results(undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, undisturbed: RunDirectory) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(undisturbed.checkpoints, copy)
    newest = max(copy.glob("step_*"))
    weights = newest / "model.safetensors"
    content = weights.read_bytes()
    match damage:
        case "truncated":
            weights.write_bytes(content[:-1])
        case "missing":
            weights.unlink()
        case _:
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not checkpoint.is_sound(newest)
    found = checkpoint.newest_sound(copy)
    assert found is not None
    assert found.name == "step_00000004"


def test_a_finished_run_is_never_overwritten(undisturbed: RunDirectory) -> None:
    before = {file: file.stat().st_mtime_ns for file in undisturbed.path.rglob("*") if file.is_file()}
    assert do_run(short_config(*OVERRIDES), undisturbed.path) == "finished"
    after = {file: file.stat().st_mtime_ns for file in undisturbed.path.rglob("*") if file.is_file()}
    changed = {file.name for file in before if before[file] != after[file]}
    assert changed <= {"run.lock"}
    assert set(after) == set(before)


def test_only_the_declared_number_of_checkpoints_is_kept(undisturbed: RunDirectory) -> None:
    names = sorted(path.name for path in undisturbed.checkpoints.iterdir())
    assert names == ["step_00000004", "step_00000006"]
