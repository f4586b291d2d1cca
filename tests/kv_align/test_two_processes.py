"""Two processes are one with the whole batch, up to rounding, whether each holds all that learns or a part of it.

All runs of two processes are done by one job, one after the other: starting it costs more than what most of them do.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kv_align.data.batch import Batch, Tokens
from kv_align.data.correspondence import Correspondence
from kv_align.experiment.experiment import run as do_run
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, Status, read_rows
from kv_align.runs.seeds import derive_seed
from kv_align.training.distributed.processes import Processes
from tests.short_runs import SHORT, results, short_config, wait_for_step, weight_files, without_timing
from tests.two_processes import DISTURBED, by_two

BRIEF = (
    "trainer.max_steps=3",
    "trainer.warmup_steps=1",
    "evaluation.exact_match_examples=0",
    "evaluation.validation_examples=4",
    "evaluation.probe_examples=4",
)
RUNS = {
    "structured": ("loss=kv+struct",),
    "flat": (
        *("aligner=flat", "align.fit=alternate", "align.period=1"),
        *("trainer.micro_batch_size=2", "data.shuffle_teacher=true", *BRIEF),
    ),
    "adapted": ("adapter=lora", "model.student_start=pretrained", *BRIEF),
    "untaught": ("loss=ce", *BRIEF),
    "summed": ("loss=kv+logit", "align.fit=frozen", "trainer.aligner_lr=null", *BRIEF),
    "checkpointed": ("loss=kv+struct", "model.gradient_checkpointing=true", "trainer.micro_batch_size=2", *BRIEF),
    "projected": ("loss=hidden", *BRIEF),
}
REPLICATED = ("structured", "flat", "adapted", "untaught", "summed")
SHARDED = ("structured", "flat", "adapted", "checkpointed", "summed", "projected")
FSDP = "trainer.parallel=fsdp"
BF16 = ("loss=kv+struct", "trainer.mixed_precision=bf16")  # of few examples, half precision turns the probe too far
SELDOM_SAVED = "trainer.checkpoint_interval=100"


def torchrun(*overrides: str, folder: Path) -> list[str]:
    """The command line of a short run by two processes, as a user would write it."""
    words = (*SHORT, *overrides, f"output_dir={folder}", "run_name=run")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return [sys.executable, "-m", *launcher, "-m", "kv_align.train", *words]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Status]:
    """A run by torchrun of which one process was asked to leave, and its status then."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = torchrun(*RUNS["structured"], SELDOM_SAVED, folder=folder)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run = RunDirectory(folder / "run")
    wait_for_step(run, 2, process)
    status = run.status()
    assert status is not None
    os.kill(status.pid, signal.SIGTERM)  # one of the two: the other must hear of it before torchrun ends it
    process.wait(timeout=120)
    status = run.status()
    assert status is not None
    return folder, status


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, left: tuple[Path, Status]) -> Path:
    """All runs by two processes, replicated and sharded: the first of each also disturbed, and one in bfloat16."""
    folder = tmp_path_factory.mktemp("both")
    disturbed = (*RUNS["structured"], SELDOM_SAVED)
    by_two(
        folder,
        {
            **{f"ddp/{name}": RUNS[name] for name in REPLICATED},
            **{f"fsdp/{name}": (*RUNS[name], FSDP) for name in SHARDED},
            f"ddp/{DISTURBED}": disturbed,
            f"fsdp/{DISTURBED}": (*disturbed, FSDP),
            "ddp/bf16": BF16,
            "fsdp/bf16": (*BF16, FSDP),
            f"{left[0]}/run": disturbed,
        },
    )
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    """Does a run by one process, once for all that ask for it."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def run(name: str) -> RunDirectory:
        # Where there is one process nothing is shared out.
        overrides = (*RUNS[name], FSDP) if name == "structured" else RUNS[name]
        assert do_run(short_config(*overrides), folder / name) == "finished"
        return RunDirectory(folder / name)

    return run


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
                wanted = None if value is None else pytest.approx(value, rel=relative, abs=absolute)
                assert one_row[name] == wanted, (name, expected_row["step"])


def assert_same_start(ours: RunDirectory, theirs: RunDirectory) -> None:
    one, other = (json.loads(each.provenance_file.read_text()) for each in (ours, theirs))
    for what in ("content_hash", "data_order_sha256", "initial_weights_sha256", "initial_aligner_sha256", "parameters"):
        assert one[what] == other[what]
    assert (one["processes"], other["processes"]) == (2, 1)


@pytest.mark.parametrize("name", REPLICATED)
def test_two_processes_are_one_with_the_whole_batch(
    name: str, both: Path, alone: Callable[[str], RunDirectory]
) -> None:
    assert_alike(RunDirectory(both / "ddp" / name), alone(name), 2e-3, 2e-5)
    assert_same_start(RunDirectory(both / "ddp" / name), alone(name))


@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_one_process_with_the_whole_batch(
    name: str, both: Path, alone: Callable[[str], RunDirectory]
) -> None:
    assert_alike(RunDirectory(both / "fsdp" / name), alone(name), 1e-4, 1e-6)
    assert_same_start(RunDirectory(both / "fsdp" / name), alone(name))


def test_one_process_that_is_told_to_shard_keeps_whole_checkpoints(alone: Callable[[str], RunDirectory]) -> None:
    assert (alone("structured").checkpoints / "step_00000006" / "model.safetensors").exists()


def test_bfloat16_means_the_same_with_shards_as_without(both: Path) -> None:
    assert_alike(RunDirectory(both / "fsdp" / "bf16"), RunDirectory(both / "ddp" / "bf16"), 2e-3, 2e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_of_which_one_is_asked_to_leave_go_on_as_if_nothing_had_been(kind: str, both: Path) -> None:
    disturbed = RunDirectory(both / kind / DISTURBED)
    status = disturbed.status()
    assert status is not None
    assert status.attempt == 2
    assert results(disturbed) == results(RunDirectory(both / kind / "structured"))


def test_every_process_keeps_its_part_of_a_checkpoint(both: Path) -> None:
    run = RunDirectory(both / "fsdp" / "structured")
    newest = max(run.checkpoints.glob("step_*"))
    sealed = json.loads((newest / "manifest.json").read_text())["sha256"]
    parts = {"pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/__1_0.distcp", "random_states_1.safetensors"}
    assert parts <= sealed.keys()
    sizes = [(newest / "pytorch_model_fsdp_0" / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    whole = sum(file.stat().st_size for file in weight_files(run))
    assert max(sizes) < 0.75 * whole  # a half, and what the format adds to each tensor, which is much for small ones


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_process_draws_dropout_of_its_own_and_the_first_as_one_alone(
    kind: str, both: Path, alone: Callable[[str], RunDirectory]
) -> None:
    def state(run: RunDirectory, process: int) -> Tensor:
        newest = max(run.checkpoints.glob("step_*"))
        return load_file(newest / f"random_states_{process}.safetensors")["torch"]

    # Nothing of these runs drops out: the generators are as they began.
    run = RunDirectory(both / kind / "structured")
    own = torch.Generator().manual_seed(derive_seed(0, "dropout of process 1"))
    assert torch.equal(state(run, 0), state(alone("structured"), 0))
    assert torch.equal(state(run, 1), own.get_state())
    assert not torch.equal(state(run, 0), state(run, 1))


def test_shards_are_not_taken_for_a_whole_checkpoint(both: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(both / "fsdp" / "structured", copy)
    (copy / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"saved with trainer\.parallel=fsdp and several"):
        do_run(short_config(*RUNS["structured"]), copy)
    assert (copy / "checkpoints" / "step_00000006").exists()


def test_what_torchrun_started_leaves_together_and_goes_on_as_if_nothing_had_been(
    both: Path, left: tuple[Path, Status]
) -> None:
    folder, status = left
    assert (status.state, status.step < 6) == ("interrupted", True)
    assert [path.name for path in folder.iterdir()] == ["run"]
    run = RunDirectory(folder / "run")
    now = run.status()
    assert now is not None
    assert (now.state, now.attempt) == ("finished", 2)
    assert results(run) == results(RunDirectory(both / "ddp" / "structured"))


class Place:
    """Where a process stands among two."""

    num_processes = 2

    def __init__(self, rank: int) -> None:
        self.process_index = rank


@pytest.mark.parametrize("key", ["batch_size", "micro_batch_size"])
def test_a_batch_that_cannot_be_shared_out_is_refused(key: str) -> None:
    size = {
        "batch_size": ("trainer.batch_size=5",),
        "micro_batch_size": ("trainer.batch_size=6", "trainer.micro_batch_size=3"),
    }
    trainer = short_config(*size[key]).trainer
    with pytest.raises(ConfigError) as refused:
        Processes(Place(0), trainer)  # type: ignore[arg-type]
    assert str(refused.value) == (
        f"trainer.{key}={getattr(trainer, key)} is not allowed with 2 processes: set trainer.{key} to a multiple of "
        "their number."
    )


def test_rows_of_all_processes_are_the_batch() -> None:
    def tokens(start: int) -> Tokens:
        ids = torch.arange(start, start + 12).reshape(4, 3)
        return Tokens(ids, ids % 2 == 0, ids * 2, ids % 3)

    mask = torch.arange(12).reshape(4, 3) % 5 == 0
    student, teacher = tokens(0), tokens(100)
    correspondence = Correspondence(student.segments, teacher.segments, same_time=False, places=mask.float())
    batch = Batch(student, teacher, ~mask, correspondence, (7, 8, 9, 10), (10, 7, 8, 9))

    trainer = short_config().trainer
    parts = [Processes(Place(rank), trainer).rows(batch) for rank in (0, 1)]  # type: ignore[arg-type]
    assert parts[0].indices + parts[1].indices == batch.indices
    assert parts[0].read_by_teacher + parts[1].read_by_teacher == batch.read_by_teacher
    for of in (
        lambda b: b.student.ids,
        lambda b: b.teacher.mask,
        lambda b: b.scored,
        lambda b: b.aligned,
        lambda b: b.correspondence.places,
        lambda b: b.correspondence.student_segments,
        lambda b: b.correspondence.teacher_segments,
    ):
        assert torch.equal(torch.cat([of(part) for part in parts]), of(batch))


PATIENT = """
import sys, time
from datetime import timedelta
from types import SimpleNamespace
import torch
from kv_align.training.distributed.processes import Processes

rank = int(sys.argv[1])
store = {"init_method": f"file://{sys.argv[2]}", "rank": rank, "world_size": 2}
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=5), **store)
place = SimpleNamespace(num_processes=2, process_index=rank)
with Processes(place, SimpleNamespace(micro_batch_size=None, batch_size=2)).first_alone():
    began = time.monotonic()
    time.sleep(8 if rank == 0 else 0)
print(time.monotonic() - began > 7)
total = torch.ones(1)
torch.distributed.all_reduce(total)
print(total.item())
"""


def test_the_first_process_may_take_longer_alone_than_the_run_waits_for_anyone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PATIENT]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0].split() for process in processes]
    assert said == [["True", "2.0"]] * 2
