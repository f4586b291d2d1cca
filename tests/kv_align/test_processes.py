"""Two processes are one with the whole batch, up to rounding; all their decisions are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kv_align.data.batch import Batch, Tokens
from kv_align.experiment import run as do_run
from kv_align.processes import Processes
from kv_align.runs import RunDirectory, read_last_row, read_rows
from tests.short_runs import SHORT, short_config, without_timing

ACCUMULATED = ("trainer.micro_batch_size=2", "data.shuffle_teacher=true")


def two(*overrides: str, folder: Path) -> list[str]:
    """The command line of a short run by two processes."""
    words = (*SHORT, *overrides, f"output_dir={folder}", "run_name=run")
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "kv_align.train",
        *words,
    ]


def end(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss=kv+struct",),
        ("aligner=flat", *ACCUMULATED),
        ("align.fit=alternate", "align.period=1"),
        ("loss=ce",),
        ("adapter=lora", "model.student_start=pretrained"),
    ],
    ids=" ".join,
)
def test_two_processes_are_one_with_the_whole_batch(overrides: tuple[str, ...], tmp_path: Path) -> None:
    alone = RunDirectory(tmp_path / "alone")
    assert do_run(short_config(*overrides), alone.path) == "finished"
    done = end(two(*overrides, folder=tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    both = RunDirectory(tmp_path / "run")
    weights, expected = (load_file(each.student / "model.safetensors") for each in (both, alone))
    for name, tensor in expected.items():
        assert torch.allclose(weights[name], tensor, rtol=1e-3, atol=2e-5), name
    rows = [
        (without_timing(ours), without_timing(theirs))
        for ours, theirs in zip(read_rows(both.metrics_file), read_rows(alone.metrics_file), strict=True)
    ]
    for ours, theirs in rows:
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
    ours, theirs = (json.loads(each.provenance_file.read_text()) for each in (both, alone))
    for what in ("data_order_sha256", "initial_weights_sha256", "initial_aligner_sha256"):
        assert ours[what] == theirs[what]
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "run"]
    evaluated = [[row["validation_loss"] for row in read_rows(each.evaluations_file)] for each in (both, alone)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-3)


def test_two_processes_that_are_asked_to_leave_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    longer = ("trainer.max_steps=40", "evaluation.interval=40")
    done = end(two(*longer, folder=tmp_path / "calm"))
    assert done.returncode == 0, done.stderr[-3000:]
    command = two(*longer, folder=tmp_path / "disturbed")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run = RunDirectory(tmp_path / "disturbed" / "run")
    deadline = time.monotonic() + 200
    while not run.metrics_file.exists() or (read_last_row(run.metrics_file) or {"step": 0})["step"] < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    status = run.status()
    assert status is not None
    os.kill(status.pid, signal.SIGTERM)  # one of the two: the other must hear of it
    process.wait(timeout=120)
    status = run.status()
    assert status is not None
    assert (status.state, status.step < 40) == ("interrupted", True)
    assert end(command).returncode == 0
    calm = RunDirectory(tmp_path / "calm" / "run")
    ours, theirs = ((each.student / "model.safetensors").read_bytes() for each in (run, calm))
    assert ours == theirs


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    done = end(two("trainer.batch_size=5", folder=tmp_path))
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
    batch = Batch(tokens(0), tokens(100), mask, ~mask, False, (7, 8, 9, 10), mask.float())

    class Place:
        def __init__(self, rank: int) -> None:
            self.num_processes, self.process_index = 2, rank

    trainer = short_config().trainer
    parts = [Processes(Place(rank), trainer).rows(batch) for rank in (0, 1)]  # type: ignore[arg-type]
    assert parts[0].indices + parts[1].indices == batch.indices
    for of in (
        lambda b: b.student.ids,
        lambda b: b.teacher.mask,
        lambda b: b.scored,
        lambda b: b.aligned,
        lambda b: b.places,
    ):
        assert torch.equal(torch.cat([of(part) for part in parts]), of(batch))
