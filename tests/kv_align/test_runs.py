"""The contract of a run directory: truthful, atomic, and readable after any kill."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_align.config.identity import content_hash
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import (
    EXIT_CODES,
    RunDirectory,
    State,
    Status,
    append_row,
    file_digest,
    read_json,
    read_last_row,
    read_rows,
    write_atomically,
    write_json,
    write_rows,
)

CONFIG: dict[str, Any] = {"loss": {"name": "kv", "lambda_kv": 0.5}, "seed": 3, "arm": None, "layers": [1, 2]}


def begin(run: RunDirectory, content_hash: str = "a" * 64) -> Status:
    return run.begin(CONFIG, arm="flat", content_hash=content_hash, total_steps=10)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Status


def test_a_directory_is_not_made_by_naming_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.status() is None
    assert run.is_complete() is False
    assert not run.path.exists()


def test_a_status_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    before = time.time()
    status = begin(run)
    assert run.status() == status
    assert asdict(status) | {"started": 0.0, "updated": 0.0, "job": ""} == {
        "state": "running",
        "reason": "",
        "arm": "flat",
        "loss": "kv",
        "seed": 3,
        "content_hash": "a" * 64,
        "step": 0,
        "total_steps": 10,
        "attempt": 1,
        "started": 0.0,
        "updated": 0.0,
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "job": "",
        "peak_memory_gb": None,
        "gpu_memory_gb": None,
        "overhead_s": 0.0,
        "training_s": 0.0,
    }
    assert before <= status.started == status.updated <= time.time()
    assert run.read_config() == CONFIG


def test_an_update_replaces_state_step_and_reason_and_renews_the_heartbeat(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    began = replace(begin(run), started=1.0, updated=1.0)
    stepped = run.update(began, step=7)
    assert run.status() == stepped
    assert replace(stepped, updated=1.0) == replace(began, step=7)
    assert stepped.updated > began.updated
    ended = run.update(stepped, state="failed", reason="out of memory: 3 GB")
    assert run.status() == ended
    assert replace(ended, updated=1.0) == replace(began, step=7, state="failed", reason="out of memory: 3 GB")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"state": "running"}', "\x00\xff"],
    ids=["empty", "torn", "a list", "null", "a number", "without its fields", "no text"],
)
def test_a_status_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path)
    run.status_file.write_bytes(text.encode("latin-1"))
    assert run.status() is None


def test_a_status_with_a_field_that_this_version_does_not_know_is_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_json(run.status_file, {**asdict(begin(run)), "mood": "good"})
    assert run.status() is None


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "41"}, "41"),
        ({"SLURM_JOB_ID": "43", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"}, "41_2"),
    ],
)
def test_the_job_is_the_schedulers_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], job: str
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert begin(RunDirectory(tmp_path)).job == job


def test_every_end_state_has_its_own_exit_code_and_none_is_that_of_bad_input() -> None:
    assert EXIT_CODES == {"finished": 0, "failed": 1, "diverged": 3, "interrupted": 75}
    assert set(EXIT_CODES) == set(typing.get_args(State)) - {"running"}
    assert EXIT_CODES["interrupted"] == os.EX_TEMPFAIL


# Beginning again


def test_the_same_configuration_begins_again_as_another_attempt(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.update(begin(run), state="interrupted", step=4, reason="asked to leave")
    again = begin(run)
    assert (again.attempt, again.state, again.step, again.reason) == (2, "running", 0, "")
    assert begin(run).attempt == 3


@pytest.mark.parametrize("state", ["finished", "running", "failed"])
def test_another_configuration_is_refused_and_nothing_is_written(tmp_path: Path, state: State) -> None:
    run = RunDirectory(tmp_path / "run")
    run.update(begin(run), state=state, step=10)
    append_row(run.metrics_file, {"step": 10, "loss": 1.0})
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as refused:
        begin(run, content_hash="b" * 64)
    assert str(refused.value) == (
        f"{run.path} holds another run (flat, seed 3, hash aaaaaaaa): nothing was overwritten; "
        "choose another run_name or output_dir."
    )
    assert contents(tmp_path) == before


def test_what_was_refused_before_its_first_step_stands_in_nobodys_way(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.update(begin(run), state="failed", reason="layer 9 is not there")
    begun = begin(run, content_hash="b" * 64)
    assert (begun.content_hash, begun.attempt) == ("b" * 64, 1)
    run.update(begun, state="failed")
    write_json(run.provenance_file, {})  # what it started from is on record
    with pytest.raises(ConfigError, match="holds another run"):
        begin(run, content_hash="c" * 64)


def test_an_earlier_attempt_is_the_status_it_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.earlier_attempt("a" * 64) is None
    left = run.update(begin(run), step=5)
    assert run.earlier_attempt("a" * 64) == left
    with pytest.raises(ConfigError, match="holds another run"):
        run.earlier_attempt("b" * 64)


# Lock

HOLD = """
import sys, time
from kv_align.runs.run_dir import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""
TAKE = """
import sys
from kv_align.config.identity import content_hash
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory
try:
    with RunDirectory(sys.argv[1]).lock():
        print("taken")
except ConfigError as error:
    print(error)
"""


@contextmanager
def running(source: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the latest at the end of the block."""
    command = [sys.executable, "-c", source, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def python(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    refusal = f"{run.path} is being written by another process: wait for it, or choose another run_name."
    with running(HOLD, str(run.path)) as holder:
        assert first_line(holder) == "held\n"
        with pytest.raises(ConfigError) as refused, run.lock():
            pass
        assert str(refused.value) == refusal
        assert python(TAKE, str(run.path)).stdout == f"{refusal}\n"
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
    with run.lock():
        assert python(TAKE, str(run.path)).stdout == f"{refusal}\n"
    assert python(TAKE, str(run.path)).stdout == "taken\n"


def test_an_error_in_a_locked_run_releases_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(RuntimeError, match="broke"), run.lock():
        raise RuntimeError("broke")
    with run.lock():
        assert (run.path / "run.lock").exists()


# Rows


def test_rows_come_back_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / step, "layers": [0.5, None], "names": {"a": "ü"}} for step in (1, 2, 5)]
    for row in rows:
        append_row(tmp_path / "metrics.jsonl", row)
    assert read_rows(tmp_path / "metrics.jsonl") == rows
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_numbers_that_are_none_are_written_as_null(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_row(file, {"step": 1, "loss": math.nan, "rate": math.inf, "by_layer": [1.0, -math.inf, (math.nan,)]})
    assert file.read_text() == '{"step": 1, "loss": null, "rate": null, "by_layer": [1.0, null, [null]]}\n'
    write_json(tmp_path / "summary.json", {"loss": math.nan, "deep": {"er": [math.inf, 2]}})
    assert read_json(tmp_path / "summary.json") == {"loss": None, "deep": {"er": [None, 2]}}


@pytest.mark.parametrize("kept_bytes", [1, 5, 12, 17])
def test_a_last_line_that_a_kill_tore_is_left_out(tmp_path: Path, kept_bytes: int) -> None:
    file = tmp_path / "metrics.jsonl"
    append_row(file, {"step": 1, "loss": 2.5})
    whole = file.read_bytes()
    with file.open("ab") as stream:
        stream.write(whole.replace(b"1", b"2")[:kept_bytes])
    assert read_rows(file) == [{"step": 1, "loss": 2.5}]


def test_a_line_torn_within_a_character_and_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n[1]\n3\n\n{"loss": 2.0}\n{"step": 2}\n{"step": 3, "note": "\xc3')
    assert read_rows(file) == [{"step": 1}, {"step": 2}]


@given(
    widths=st.lists(st.integers(0, 6000), max_size=6),
    torn=st.sampled_from([b"", b'{"step": 9, "loss"', b"[1]\n", b"x" * 5000]),
)
def test_the_last_row_is_that_of_all_rows(widths: list[int], torn: bytes) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.jsonl"
        write_rows(file, [{"step": step, "note": "ü" * width} for step, width in enumerate(widths)])
        with file.open("ab") as stream:
            stream.write(torn)
        assert read_last_row(file) == next(reversed(read_rows(file)), None)


def test_rewinding_drops_what_came_after_the_checkpoint_from_both_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in range(1, 6):
        append_row(run.metrics_file, {"step": step, "loss": step / 2})
    for step in (0, 2, 4):
        append_row(run.evaluations_file, {"step": step})
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 6, "lo')
    run.rewind(3)
    append_row(run.metrics_file, {"step": 4, "loss": -1.0})
    assert read_rows(run.metrics_file) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 1.5},
        {"step": 4, "loss": -1.0},
    ]
    assert read_rows(run.evaluations_file) == [{"step": 0}, {"step": 2}]


def test_evaluations_are_kept_up_to_a_step_of_their_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in range(5):
        append_row(run.metrics_file, {"step": step})
        append_row(run.evaluations_file, {"step": step})
    run.rewind(3, 1)
    assert [row["step"] for row in read_rows(run.metrics_file)] == [0, 1, 2, 3]
    assert [row["step"] for row in read_rows(run.evaluations_file)] == [0, 1]


def test_rewinding_to_before_the_start_empties_the_files_and_makes_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    append_row(run.metrics_file, {"step": 0})
    run.rewind(-1)
    assert run.metrics_file.read_text() == ""
    assert not run.evaluations_file.exists()


# Atomic writes

DIE_BEFORE_THE_RENAME = """
import os, signal, sys
from pathlib import Path
from kv_align.runs import files as runs
os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
runs.write_atomically(Path(sys.argv[1]), "new" * 100_000)
"""
WRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from kv_align.runs.run_dir import write_atomically
for letter in itertools.cycle("ab"):
    write_atomically(Path(sys.argv[1]), letter * 200_000)
    print(letter, flush=True)
"""


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    write_atomically(file, "old")
    assert python(DIE_BEFORE_THE_RENAME, str(file)).returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    write_atomically(file, "newer")
    assert file.read_text() == "newer"


def test_a_kill_at_any_moment_leaves_one_whole_content(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    for wait_s in (0.0, 0.003, 0.01):
        with running(WRITE_FOR_EVER, str(file)) as writer:
            assert first_line(writer) == "a\n"
            for _ in range(50):  # a reader meanwhile
                assert file.read_text() in ("a" * 200_000, "b" * 200_000)
            time.sleep(wait_s)
        assert file.read_text() in ("a" * 200_000, "b" * 200_000)


def test_a_write_makes_the_folders_it_needs_and_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "er" / "file.txt", "text: ü\n")
    assert contents(tmp_path) == {"deep/er/file.txt": "text: ü\n".encode()}


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x80"])
def test_json_that_is_missing_or_no_object_reads_as_none(tmp_path: Path, text: str) -> None:
    assert read_json(tmp_path / "missing.json") is None
    (tmp_path / "broken.json").write_bytes(text.encode("latin-1"))
    assert read_json(tmp_path / "broken.json") is None


def test_a_digest_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    # FIPS 180-2, appendix B.1: the message "abc".
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "file") == expected == hashlib.sha256(b"abc").hexdigest()


# Completeness


@pytest.fixture
def complete(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.update(begin(run), state="finished", step=10)
    append_row(run.metrics_file, {"step": 10})
    write_json(run.summary_file, {"steps": 10})
    run.student.mkdir()
    (run.student / "model.safetensors").touch()
    return run


def test_a_finished_run_with_its_artefacts_is_complete(complete: RunDirectory) -> None:
    assert complete.is_complete() is True


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: run.status_file.unlink(),
        lambda run: run.status_file.write_text("{"),
        lambda run: run.summary_file.unlink(),
        lambda run: run.summary_file.write_text('{"steps": '),
        lambda run: run.metrics_file.unlink(),
        lambda run: (run.student / "model.safetensors").unlink(),
        lambda run: (run.student / "model.safetensors").rename(run.student / "model.bin"),
        lambda run: (run.student).rename(run.path / "elsewhere"),
    ],
    ids=[
        "no status",
        "torn status",
        "no summary",
        "torn summary",
        "no metrics",
        "no weights",
        "other weights",
        "no student",
    ],
)
def test_a_run_that_lacks_an_artefact_is_not_complete(
    complete: RunDirectory, spoil: Callable[[RunDirectory], object]
) -> None:
    spoil(complete)
    assert complete.is_complete() is False


@pytest.mark.parametrize("state", ["running", "failed", "diverged", "interrupted"])
def test_a_run_with_all_artefacts_that_did_not_finish_is_not_complete(complete: RunDirectory, state: State) -> None:
    status = complete.status()
    assert status is not None
    complete.update(status, state=state)
    assert complete.is_complete() is False


def test_what_is_written_is_what_others_can_read_as_plain_json(complete: RunDirectory) -> None:
    raw = json.loads(complete.status_file.read_text())
    assert raw["state"] == "finished"
    assert raw["step"] == raw["total_steps"] == 10


def test_a_finished_run_without_its_student_is_not_done_again_by_the_command_line(tmp_path: Path) -> None:
    from tests.short_runs import command, short_config

    config = short_config(f"output_dir={tmp_path}", "run_name=run")
    run = RunDirectory(tmp_path / "run")
    status = run.begin(config.model_dump(by_alias=True), arm="a", content_hash=content_hash(config), total_steps=6)
    append_row(run.metrics_file, {"step": 6, "total_loss": 1.0})
    write_json(run.summary_file, {"arm": "a"})
    run.update(status, state="finished", step=6)
    done = subprocess.run(
        command(f"output_dir={tmp_path}", "run_name=run"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "holds this run, finished, but its student or metrics are gone" in done.stderr
    assert [row["step"] for row in read_rows(run.metrics_file)] == [6]


def test_a_run_whose_status_is_broken_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    append_row(run.metrics_file, {"step": 6, "total_loss": 1.0})
    run.status_file.write_text("{")
    with pytest.raises(ConfigError, match=r"status\.json cannot be read: nothing was overwritten"):
        run.earlier_attempt("0" * 64)
