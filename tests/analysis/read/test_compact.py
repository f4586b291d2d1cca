"""The compact record of a finished run: the same tables as from its files, and not believed where a file was changed."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.read import compact as compact_module
from analysis.read.collect import Collected, collect
from kv_align.runs.record import read_record_file, write_record
from kv_align.runs.run_dir import RunDirectory, write_json
from kv_align.runs.sweep_dir import SweepDirectory
from tests.analysis.synthetic import SMALL, make_plan


@pytest.fixture
def recorded(small: SweepDirectory) -> SweepDirectory:
    for planned in make_plan(SMALL).runs:
        assert write_record(small.run(planned))
    return small


def run_of(sweep: SweepDirectory) -> RunDirectory:
    return sweep.run(make_plan(SMALL).runs[0])


def same(a: Collected, b: Collected) -> None:
    for level in ("metrics", "evaluations", "outcomes"):
        ours, theirs = (each.table(level).astype({"run": str}).sort_values(["run"], kind="stable") for each in (a, b))
        columns = sorted(theirs)
        pd.testing.assert_frame_equal(ours[columns].reset_index(drop=True), theirs[columns].reset_index(drop=True))
    columns = sorted(set(b.runs) - {"signature"})
    pd.testing.assert_frame_equal(a.runs[columns], b.runs[columns], check_dtype=False)
    assert a.problems.equals(b.problems)


def details(collected: Collected, run: RunDirectory) -> list[str]:
    return collected.problems.loc[collected.problems["run"] == f"runs/{run.path.name}", "detail"].tolist()


def test_a_record_holds_what_the_files_hold(recorded):
    run = run_of(recorded)
    record = read_record_file(run.record_file)
    assert record.status == json.loads(run.status_file.read_text())
    assert record.summary == json.loads(run.summary_file.read_text())
    assert record.provenance == json.loads(run.provenance_file.read_text())
    assert record.metrics.to_pylist() == [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert record.outcomes.num_rows == len(pd.read_parquet(run.outcomes_file))
    assert set(record.files) == {
        *("status.json", "summary.json", "provenance.json"),
        *("metrics.jsonl", "evaluations.jsonl", "outcomes.parquet"),
    }


def test_records_give_the_tables_that_the_files_give_and_the_files_are_not_opened(recorded, monkeypatch):
    with_records = collect(recorded.path)
    for planned in make_plan(SMALL).runs:
        recorded.run(planned).record_file.unlink()
    shutil.rmtree(recorded.report)
    from_files = collect(recorded.path)
    assert from_files.num_read == 15
    same(with_records, from_files)


def test_with_a_record_none_of_the_readable_files_is_opened(recorded, monkeypatch):
    opened = []
    monkeypatch.setattr(compact_module, "SAMPLE", 1 << 40)
    read_bytes, read_text = Path.read_bytes, Path.read_text
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.name) or read_bytes(self))
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: opened.append(self.name) or read_text(self, *a, **k))
    collect(recorded.path)
    assert set(opened) == {"plan.json", "record.arrow"}


def test_some_runs_with_a_record_and_some_without_are_one_table(recorded):
    whole = collect(recorded.path)
    for planned in make_plan(SMALL).runs[::2]:
        recorded.run(planned).record_file.unlink()
    mixed = collect(recorded.path)
    assert mixed.num_read == 8
    same(mixed, whole)


FILES = ["status.json", "summary.json", "provenance.json", "metrics.jsonl", "evaluations.jsonl", "outcomes.parquet"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed_afterwards_is_named_and_the_run_not_believed(recorded, name):
    run = run_of(recorded)
    file = run.path / name
    if name.endswith(".parquet"):
        file.write_bytes(file.read_bytes() + b" ")
    elif name.endswith(".jsonl"):
        file.write_text(file.read_text().replace("5", "6", 1))
    else:
        write_json(file, json.loads(file.read_text()) | {"tokens": 1, "host": "other"})
    collected = collect(recorded.path)
    assert f"{name} is not what it was when the run finished" in details(collected, run)
    assert len(collected.runs.loc[f"runs/{run.path.name}", "contradictions"])


def test_a_change_that_keeps_size_and_time_is_found_on_verify_and_in_the_sample(recorded, monkeypatch):
    run = run_of(recorded)
    state = run.summary_file.stat()
    run.summary_file.write_text(run.summary_file.read_text().replace('"steps": 50', '"steps": 51'))
    os.utime(run.summary_file, ns=(state.st_atime_ns, state.st_mtime_ns))
    monkeypatch.setattr(compact_module, "SAMPLE", 1 << 40)
    sentence = "summary.json is not what it was when the run finished"
    assert sentence not in details(collect(recorded.path), run)
    assert sentence in details(collect(recorded.path, verify=True), run)
    shutil.rmtree(recorded.report)
    monkeypatch.setattr(compact_module, "SAMPLE", 1)
    assert sentence in details(collect(recorded.path), run)


def test_a_copy_with_new_times_is_believed_by_its_digests(recorded, tmp_path):
    shutil.copytree(recorded.path, tmp_path / "copy", copy_function=shutil.copyfile)
    for planned in make_plan(SMALL).runs:
        record = SweepDirectory(tmp_path / "copy").run(planned).record_file
        os.utime(record, (0, 0))
    same(collect(tmp_path / "copy"), collect(recorded.path))


@pytest.mark.parametrize("content", [b"", b"no arrow", b"\xff" * 4000])
def test_a_broken_record_is_as_good_as_none(recorded, content):
    whole = collect(recorded.path)
    run_of(recorded).record_file.write_bytes(content)
    again = collect(recorded.path)
    assert again.num_read == 1
    same(again, whole)


def test_a_run_whose_rows_are_no_plain_table_has_no_record_and_no_error(small):
    run = run_of(small)
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 60, "task_loss": "low"}\n')
    assert write_record(run) is False
    assert not run.record_file.exists()


def test_starting_a_run_again_removes_its_record(recorded):
    run = run_of(recorded)
    status = run.status()
    run.begin(run.read_config(), arm=status.arm, content_hash=status.content_hash, total_steps=50)
    assert not run.record_file.exists()
