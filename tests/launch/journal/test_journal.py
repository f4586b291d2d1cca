"""The journal survives whatever kills its writer, and its lock is gone with who held it."""

import errno
import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kv_align.runs.errors import ConfigError
from kv_align.runs.files import append_row, read_rows
from kv_align.runs.sweep_dir import SweepDirectory
from launch.cluster.setting import Setting
from launch.executors.registry import load_cluster, make_executor
from launch.journal.journal import Journal
from launch.worker.code import changed_code


def test_the_ledger_knows_the_last_place_of_each_run(tmp_path):
    journal = Journal(SweepDirectory(tmp_path))
    journal.submitting([["a"], ["b", "c"]], "first")
    journal.submitted("first", "12")
    journal.cancelled(["a", "b"])
    journal.submitting([["a"]], "second", after="first")
    ledger = journal.ledger()
    assert ledger.cancelled == {"b"}
    assert {name: ref.job for name, ref in ledger.jobs.items()} == {"a": None, "b": "12_1", "c": "12_1"}
    assert ledger.jobs["a"].submission.after == "first"
    journal.submitted("second", "13")
    assert journal.ledger().jobs["a"].job == "13", "a single batch is no array"


def test_a_torn_line_costs_only_itself(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_row(file, {"event": "one"}, durable=True)
    with file.open("a") as stream:
        stream.write('{"event": "to')
    append_row(file, {"event": "three"})
    assert [row["event"] for row in read_rows(file, "event")] == ["one", "three"]


def test_a_first_line_that_comes_while_a_file_is_read_is_no_damage(tmp_path, monkeypatch):
    journal = Journal(SweepDirectory(tmp_path))
    journal.submitting([["a"]], "first")
    attempts = tmp_path / "launch" / "attempts" / "a.jsonl"
    attempts.parent.mkdir()
    attempts.touch()
    read = Path.read_bytes

    def slowly(file):
        content = read(file)
        if not content:
            journal.add_attempt("a", "start", "first")
        return content

    monkeypatch.setattr(Path, "read_bytes", slowly)
    assert journal.attempts("a") == []
    assert [row["event"] for row in journal.attempts("a")] == ["start"]
    attempts.write_text("no row\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl is damaged: none of its lines can be read"):
        journal.attempts("a")


def test_a_setting_that_is_written_while_it_is_looked_for_is_not_lost(tmp_path, monkeypatch):
    journal, setting = Journal(SweepDirectory(tmp_path)), Setting(load_cluster("local", {}), {}, False, "/code")
    read, looks = journal.setting, []

    def submitted_meanwhile():
        looks.append(read())
        if len(looks) == 1:
            journal.write_setting(setting)
            journal.submitting([["a"]], "first")
        return looks[-1]

    monkeypatch.setattr(journal, "setting", submitted_meanwhile)
    assert journal.frozen_setting().code == "/code"
    (tmp_path / "launch" / "cluster.json").unlink()
    assert "cluster.json is damaged or gone" in journal.lost_setting()


def test_the_lock_excludes_names_its_holder_and_dies_with_it(tmp_path, capsys):
    code = (
        "import sys, time; from kv_align.runs.sweep_dir import SweepDirectory; from launch.journal.journal import Journal\n"
        "with Journal(SweepDirectory(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    journal, got = Journal(SweepDirectory(tmp_path)), threading.Event()

    def wait_for_it():
        with journal.lock():
            got.set()

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    assert not got.wait(1.5)
    waiting = f"launch: waiting for process {holder.pid} on {socket.gethostname()} (-c {tmp_path}"
    assert capsys.readouterr().err.startswith(waiting)
    holder.kill()
    assert got.wait(5.0)
    thread.join()
    holder.wait()
    holder.stdout.close()


def test_a_job_that_is_found_later_does_not_take_a_run_back(tmp_path):
    journal = Journal(SweepDirectory(tmp_path))
    journal.submitting([["a"], ["b"]], "first")
    journal.submitting([["a"]], "second")
    journal.submitted("second", "13")
    journal.cancelled(["b"])
    journal.submitted("first", "12")
    ledger = journal.ledger()
    assert {name: ref.job for name, ref in ledger.jobs.items()} == {"a": "13", "b": "12_1"}
    assert ledger.cancelled == {"b"}
    assert ledger.submissions["first"].job == "12"


def test_attempts_belong_to_a_submission_whatever_the_clock_says(tmp_path):
    journal = Journal(SweepDirectory(tmp_path))
    journal.add_attempt("a", "start", "first")
    journal.add_attempt("a", "start", "second")
    append_row(tmp_path / "launch" / "attempts" / "a.jsonl", {"event": "end", "uid": "second", "time": 0.0})
    assert [row["event"] for row in journal.attempts("a", "second")] == ["start", "end"]
    assert len(journal.attempts("a")) == 3


def test_a_snapshot_moves_with_its_sweep(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    journal = Journal(SweepDirectory(before))
    journal.write_setting(Setting(load_cluster("local", {}), {}, False, str(before / "code")))
    assert journal.setting().code == str(before / "code")
    shutil.move(before, after)
    assert Journal(SweepDirectory(after)).setting().code == str(after / "code")
    journal.write_setting(Setting(load_cluster("local", {}), {}, False, "/somewhere/else"))
    assert journal.setting().code == "/somewhere/else"


def test_a_sweep_that_cannot_be_written_and_a_file_system_without_locks(tmp_path, monkeypatch):
    (tmp_path / "launch").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be changed: File exists .*; make it writable\."), _lock(tmp_path):
        pass
    (tmp_path / "launch").unlink()

    def no_flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("launch.journal.journal.fcntl.flock", no_flock)
    with pytest.raises(ConfigError, match="its file system has no locks"), _lock(tmp_path):
        pass


def _lock(path: Path):
    return Journal(SweepDirectory(path)).lock()


def test_what_version_0_1_0_wrote_is_read(tmp_path):
    sweep = SweepDirectory(tmp_path)
    cluster = load_cluster("slurm", {}).model_dump()
    for key in ("backoff_s", "pause_s"):
        del cluster["retry"][key]
    (tmp_path / "launch").mkdir()
    setting = {"cluster": cluster, "resources": {}, "accounting": True, "code": "/somewhere"}
    (tmp_path / "launch" / "cluster.json").write_text(json.dumps(setting))
    rows = [
        {"event": "submitting", "uid": "u", "time": 1.0, "after": None, "batches": [["a"], ["b"]]},
        {"event": "submitted", "uid": "u", "time": 2.0, "job": "12"},
    ]
    (tmp_path / "launch" / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    journal = Journal(sweep)
    assert (journal.setting().cluster.retry.backoff_s, journal.setting().home) == (30.0, "")
    assert make_executor(sweep, journal.setting()).cluster.partition is None
    assert {name: ref.job for name, ref in journal.ledger().jobs.items()} == {"a": "12_0", "b": "12_1"}
    assert changed_code(journal, tmp_path) == []
