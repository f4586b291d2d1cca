"""What a checkpoint holds: nothing that is executed, all that a run goes on from, in files that others may read too."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.checkpointing import save_accelerator_state, save_custom_state

from kv_align.experiment.experiment import run as do_run
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, file_digest, read_json, write_json
from kv_align.training import random_states
from tests.short_runs import results, short_config

OVERRIDES = (
    "trainer.max_steps=4",
    "trainer.warmup_steps=1",
    "teacher_cache=CACHE",
    "evaluation.interval=4",
    "evaluation.exact_match_examples=1",
    "evaluation.max_new_tokens=1",
)


def config(folder: Path):
    return short_config(*(each.replace("CACHE", str(folder / "cache")) for each in OVERRIDES))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run that could keep its files to itself, and does not."""
    folder = tmp_path_factory.mktemp("finished")
    mask = os.umask(0o027)
    try:
        assert do_run(config(folder), folder / "run") == "finished"
    finally:
        os.umask(mask)
    return RunDirectory(folder / "run")


def unfinished(run: RunDirectory, folder: Path) -> RunDirectory:
    """The run as it was killed after its checkpoint at step 2."""
    shutil.copytree(run.path, folder / "run")
    directory = RunDirectory(folder / "run")
    directory.summary_file.unlink()
    for name in ("student", "aligner"):
        shutil.rmtree(directory.path / name)
    shutil.rmtree(directory.checkpoints / "step_00000004")
    status = read_json(directory.path / "status.json")
    write_json(directory.path / "status.json", {**status, "state": "running"})
    assert (directory.checkpoints / "step_00000002").is_dir()
    return directory


def seal(checkpoint: Path) -> None:
    """Make the digests of a checkpoint's manifest those of its files."""
    manifest = read_json(checkpoint / "manifest.json")
    files = [file for file in checkpoint.iterdir() if file.name != "manifest.json"]
    write_json(checkpoint / "manifest.json", {**manifest, "sha256": {file.name: file_digest(file) for file in files}})


def test_every_file_has_the_mode_that_new_files_get(run: RunDirectory) -> None:
    files = [file for file in run.path.parent.rglob("*") if file.is_file()]
    kinds = {file.name.partition("-")[0] for file in files if file.suffix == ".safetensors"}
    assert kinds >= {"model.safetensors", "aligner.safetensors", "random_states_0.safetensors", "k", "v"}
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: "0o640" for file in files}


def test_nothing_in_a_checkpoint_is_executed(run: RunDirectory) -> None:
    (newest,) = run.checkpoints.glob("step_00000004")
    assert sorted(file.name for file in newest.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.bin",
        "random_states_0.safetensors",
    ]
    torch.load(newest / "optimizer.bin", weights_only=True)


class Executed:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("name", ["optimizer.bin", "custom_checkpoint_0.pkl"])
def test_what_a_stranger_put_into_a_checkpoint_is_not_executed(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = unfinished(run, tmp_path)
    checkpoint = directory.checkpoints / "step_00000002"
    if name != "optimizer.bin":
        as_0_1_0_wrote(checkpoint)
    torch.save({"state": Executed()}, checkpoint / name)
    seal(checkpoint)
    with pytest.raises(ConfigError, match=f"^{checkpoint} cannot be gone on from: "):
        do_run(config(run.path.parent), directory.path)
    assert not (tmp_path / "executed").exists()


def as_0_1_0_wrote(checkpoint: Path) -> None:
    """Bring a checkpoint into the form of version 0.1.0: random states and schedule as Accelerate's pickles."""

    class Schedule:
        def state_dict(self) -> dict[str, object]:
            return manifest["schedule"]

    manifest = read_json(checkpoint / "manifest.json")
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random_states.restore(checkpoint, 0)
    save_accelerator_state(str(checkpoint), [], [], [], [], 0, 0)
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    save_custom_state(Schedule(), str(checkpoint), 0)
    (checkpoint / "random_states_0.safetensors").unlink()
    write_json(checkpoint / "manifest.json", {key: value for key, value in manifest.items() if key != "schedule"})
    seal(checkpoint)


@pytest.mark.parametrize("written_by", ["this version", "0.1.0"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(run: RunDirectory, tmp_path: Path, written_by: str) -> None:
    directory = unfinished(run, tmp_path)
    if written_by == "0.1.0":
        as_0_1_0_wrote(directory.checkpoints / "step_00000002")
    torch.manual_seed(5)
    assert do_run(config(run.path.parent), directory.path) == "finished"
    assert results(directory) == results(run)


@pytest.mark.parametrize("damage", ["missing", "empty", "of another kind", "executable"])
def test_damaged_random_states_are_one_sentence(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "step_00000002"
    shutil.copytree(run.checkpoints / "step_00000002", checkpoint)
    file = checkpoint / "random_states_0.safetensors"
    match damage:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "of another kind":
            shutil.copyfile(checkpoint / "model.safetensors", file)
        case _:
            file.unlink()
            torch.save({"random_state": Executed()}, checkpoint / "random_states_0.pkl")
    with pytest.raises(ConfigError) as refused:
        random_states.restore(checkpoint, 0)
    assert str(refused.value).startswith(
        f"{checkpoint} cannot be gone on from: its random states of process 0 are missing or damaged ("
    )
    assert str(refused.value).endswith(
        "); delete this checkpoint to go on from the one before, or all of them to start again."
    )
    assert not (tmp_path / "executed").exists()


def test_random_states_are_all_of_them(tmp_path: Path) -> None:
    random.gauss(0, 1)  # of which Python keeps a spare one
    np.random.standard_normal()
    random_states.save(tmp_path, 3)

    def draw() -> tuple[float, ...]:
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), float(torch.rand(()))

    first = draw()
    assert draw() != first
    random_states.restore(tmp_path, 3)
    assert draw() == first
