"""Two processes are one with the whole batch, up to rounding; all their decisions are the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kv_align.data.batch import Batch, Tokens
from kv_align.data.correspondence import Correspondence
from kv_align.experiment.experiment import run as do_run
from kv_align.runs.run_dir import RunDirectory, read_rows
from kv_align.training.distributed.processes import Processes
from tests.short_runs import SHORT, results, short_config, wait_for_step, without_timing
from tests.two_processes import DISTURBED, by_two

RUNS = {
    "structured": ("loss=kv+struct",),
    "flat": ("aligner=flat", "trainer.micro_batch_size=2", "data.shuffle_teacher=true"),
    "alternating": ("align.fit=alternate", "align.period=1"),
    "untaught": ("loss=ce",),
    "adapted": ("adapter=lora", "model.student_start=pretrained"),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs by two processes, one after the other: `RUNS`, and the first of them disturbed."""
    folder = tmp_path_factory.mktemp("both")
    by_two(folder, {**RUNS, DISTURBED: (*RUNS["structured"], "trainer.checkpoint_interval=100")})
    return folder


def torchrun(*overrides: str, folder: Path) -> list[str]:
    """The command line of a short run by two processes, as a user would write it."""
    words = (*SHORT, *overrides, f"output_dir={folder}", "run_name=run")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return [sys.executable, "-m", *launcher, "-m", "kv_align.train", *words]


def end(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_with_the_whole_batch(name: str, both: Path, tmp_path: Path) -> None:
    alone, together = RunDirectory(tmp_path / name), RunDirectory(both / name)
    assert do_run(short_config(*RUNS[name]), alone.path) == "finished"
    weights, expected = (load_file(each.student / "model.safetensors") for each in (together, alone))
    for tensor_name, tensor in expected.items():
        assert torch.allclose(weights[tensor_name], tensor, rtol=1e-3, atol=2e-5), tensor_name
    rows = [
        (without_timing(ours), without_timing(theirs))
        for ours, theirs in zip(read_rows(together.metrics_file), read_rows(alone.metrics_file), strict=True)
    ]
    for ours, theirs in rows:
        assert ours.keys() == theirs.keys()
        for column in ours:
            assert ours[column] == pytest.approx(theirs[column], rel=2e-3, abs=1e-5), column
    ours, theirs = (json.loads(each.provenance_file.read_text()) for each in (together, alone))
    for what in ("data_order_sha256", "initial_weights_sha256", "initial_aligner_sha256"):
        assert ours[what] == theirs[what]
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    evaluated = [[row["validation_loss"] for row in read_rows(each.evaluations_file)] for each in (together, alone)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-3)


def test_two_processes_of_which_one_is_asked_to_leave_go_on_as_if_nothing_had_been(both: Path) -> None:
    disturbed = RunDirectory(both / DISTURBED)
    status = disturbed.status()
    assert status is not None
    assert status.attempt == 2
    assert results(disturbed) == results(RunDirectory(both / "structured"))


def test_what_torchrun_started_leaves_together_and_goes_on_as_if_nothing_had_been(both: Path, tmp_path: Path) -> None:
    command = torchrun(*RUNS["structured"], "trainer.checkpoint_interval=100", folder=tmp_path)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run = RunDirectory(tmp_path / "run")
    wait_for_step(run, 2, process)
    status = run.status()
    assert status is not None
    os.kill(status.pid, signal.SIGTERM)  # one of the two: the other must hear of it before torchrun ends it
    process.wait(timeout=120)
    status = run.status()
    assert status is not None
    assert (status.state, status.step < 6) == ("interrupted", True)
    done = end(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert results(run) == results(RunDirectory(both / "structured"))


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    done = end(torchrun("trainer.batch_size=5", folder=tmp_path))
    assert done.returncode != 0
    sentence = (
        "trainer.batch_size=5 is not allowed with 2 processes: set trainer.batch_size to a multiple of their number."
    )
    assert sentence in done.stderr


def test_rows_of_all_processes_are_the_batch() -> None:
    def tokens(start: int) -> Tokens:
        ids = torch.arange(start, start + 12).reshape(4, 3)
        return Tokens(ids, ids % 2 == 0, ids * 2, ids % 3)

    mask = torch.arange(12).reshape(4, 3) % 5 == 0
    student, teacher = tokens(0), tokens(100)
    correspondence = Correspondence(student.segments, teacher.segments, same_time=False, places=mask.float())
    batch = Batch(student, teacher, ~mask, correspondence, (7, 8, 9, 10), (10, 7, 8, 9))

    class Place:
        def __init__(self, rank: int) -> None:
            self.num_processes, self.process_index = 2, rank

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
