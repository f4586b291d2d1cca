"""Two processes that each hold a part of what learns are one process with the whole batch, up to rounding."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kv_align.experiment.experiment import run as do_run
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_rows
from tests.short_runs import results, short_config, weight_files, without_timing
from tests.two_processes import DISTURBED, by_two

RUNS = {
    "structured": ("loss=kv+struct",),
    "flat": ("aligner=flat", "trainer.micro_batch_size=2", "data.shuffle_teacher=true"),
    "checkpointed": ("loss=kv+struct", "model.gradient_checkpointing=true", "trainer.micro_batch_size=2"),
    "alternating": ("align.fit=alternate", "align.period=1"),
    "frozen": ("align.fit=frozen", "trainer.aligner_lr=null"),
    "projected": ("loss=hidden",),
    "adapted": ("adapter=lora", "model.student_start=pretrained"),
}
SHARDED = "trainer.parallel=fsdp"
BF16 = ("loss=kv+struct", "trainer.mixed_precision=bf16")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs by two processes, one after the other: `RUNS`, the first of them disturbed, one in bfloat16, also whole."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = {name: (*overrides, SHARDED) for name, overrides in RUNS.items()}
    disturbed = (*runs["structured"], "trainer.checkpoint_interval=100")
    by_two(folder, {**runs, DISTURBED: disturbed, "bf16": (*BF16, SHARDED), "bf16_whole": BF16})
    return folder


def assert_alike(ours: RunDirectory, theirs: RunDirectory, relative: float, absolute: float) -> None:
    """Weights and every number that was logged or evaluated agree to a tolerance."""
    assert [each.relative_to(ours.path) for each in weight_files(ours)] == [
        each.relative_to(theirs.path) for each in weight_files(theirs)
    ]
    for one, other in zip(weight_files(ours), weight_files(theirs), strict=True):
        expected = load_file(other)
        found = load_file(one)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.allclose(tensor, expected[name], rtol=relative, atol=absolute), name
    for file in ("metrics_file", "evaluations_file"):
        rows = zip(read_rows(getattr(ours, file)), read_rows(getattr(theirs, file)), strict=True)
        for one_row, other_row in rows:
            expected_row = without_timing(other_row)
            assert without_timing(one_row).keys() == expected_row.keys()
            for name, value in expected_row.items():
                assert one_row[name] == pytest.approx(value, rel=relative, abs=absolute), (name, expected_row["step"])


@pytest.mark.parametrize("name", RUNS)
def test_shards_are_one_process_with_the_whole_batch(name: str, sharded: Path, tmp_path: Path) -> None:
    alone = RunDirectory(tmp_path / name)
    assert (
        do_run(short_config(*RUNS[name], SHARDED), alone.path) == "finished"
    )  # of one process, so nothing is shared out
    assert (alone.checkpoints / "step_00000006" / "model.safetensors").exists()
    both = RunDirectory(sharded / name)
    assert_alike(both, alone, 1e-4, 1e-6)
    ours, theirs = (json.loads(each.provenance_file.read_text()) for each in (both, alone))
    for what in ("content_hash", "data_order_sha256", "initial_weights_sha256", "initial_aligner_sha256", "parameters"):
        assert ours[what] == theirs[what]
    assert (ours["processes"], theirs["processes"]) == (2, 1)


def test_bfloat16_means_the_same_with_shards_as_without(sharded: Path) -> None:
    assert_alike(RunDirectory(sharded / "bf16"), RunDirectory(sharded / "bf16_whole"), 2e-3, 2e-4)


def test_a_sharded_run_that_was_asked_to_leave_ends_as_if_nothing_had_been(sharded: Path) -> None:
    disturbed = RunDirectory(sharded / DISTURBED)
    status = disturbed.status()
    assert status is not None
    assert status.attempt == 2
    assert results(disturbed) == results(RunDirectory(sharded / "structured"))


def test_every_process_keeps_its_part_of_a_checkpoint(sharded: Path) -> None:
    newest = max((sharded / "structured" / "checkpoints").glob("step_*"))
    sealed = json.loads((newest / "manifest.json").read_text())["sha256"]
    parts = {"pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/__1_0.distcp", "random_states_1.safetensors"}
    assert parts <= sealed.keys()
    sizes = [(newest / "pytorch_model_fsdp_0" / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    whole = sum(file.stat().st_size for file in weight_files(RunDirectory(sharded / "structured")))
    assert max(sizes) < 0.75 * whole  # a half, and what the format adds to each tensor, which is much for small ones


def test_shards_are_not_taken_for_a_whole_checkpoint(sharded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sharded / "structured", copy)
    (copy / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"saved with trainer\.parallel=fsdp and several"):
        do_run(short_config(*RUNS["structured"]), copy)
    assert (copy / "checkpoints" / "step_00000006").exists()
