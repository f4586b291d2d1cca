"""How an attempt ended, by what it wrote itself and by nothing that an earlier one left."""

import errno
import json
import time

import pytest

from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import SweepDirectory
from launch.cluster.setting import Setting
from launch.executors.registry import load_cluster
from launch.journal.attempts import cause_of_vanished, end_open_attempt, own_status, start_attempt
from launch.journal.journal import Journal
from tests.launch.fake_slurm import running_for

CONFIG = {"loss": {"name": "kv"}, "seed": 0}


@pytest.fixture
def journal(tmp_path):
    journal = Journal(SweepDirectory(tmp_path))
    journal.write_setting(Setting(load_cluster("slurm", {}), {}, False, ""))
    return journal


def wrote(journal, state, reason=""):
    """Leave what an attempt of this process has written of itself."""
    directory = RunDirectory(journal.sweep.runs / "a")
    running_for(directory, CONFIG, step=3)
    directory.update(directory.status(), state=state, reason=reason)
    return directory


def test_a_status_belongs_to_the_attempt_that_wrote_it(journal):
    start_attempt(journal, "a", "u")
    directory = wrote(journal, "failed", "out of memory: CUDA")
    assert own_status(directory, journal.attempts("a")) == directory.status()
    raw = json.loads(directory.status_file.read_text())
    for other in ({"pid": raw["pid"] + 1}, {"host": "elsewhere"}, {"started": time.time() - 60}):
        directory.status_file.write_text(json.dumps({**raw, **other}))
        assert own_status(directory, journal.attempts("a")) is None, other
    assert own_status(directory, []) is None


@pytest.mark.parametrize(
    ("state", "reason", "before"),
    [
        ("failed", "out of memory: CUDA", "out_of_memory"),
        ("failed", "OSError: [Errno 5] Input/output error", "node_failure"),
        ("failed", "OSError: [Errno 28] No space left on device", "disk_full"),
    ],
)
def test_an_error_before_a_run_begins_is_not_what_ended_it_before(journal, state, reason, before):
    start_attempt(journal, "a", "u")
    wrote(journal, state, reason)
    assert end_open_attempt(journal, "a", "u", 1) == before
    assert end_open_attempt(journal, "a", "u", 1) is None, "its end is on record"
    start_attempt(journal, "a", "again")
    assert end_open_attempt(journal, "a", "again", 1) == "code_error"
    ends = [row for row in journal.attempts("a") if row["event"] == "end"]
    assert [(row["cause"], row["exit_code"], row["retry"]) for row in ends][-1] == ("code_error", 1, False)


def test_an_attempt_that_vanished_before_it_began_was_not_interrupted_as_the_last_one(journal):
    start_attempt(journal, "a", "u")
    directory = wrote(journal, "interrupted")
    assert cause_of_vanished(directory, journal.attempts("a")) == "interrupted"
    start_attempt(journal, "a", "u")
    assert cause_of_vanished(directory, journal.attempts("a")) == "node_failure"


def test_an_end_that_cannot_be_noted_leaves_the_attempt_open(journal, monkeypatch, capsys):
    start_attempt(journal, "a", "u")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("launch.journal.journal.append_row", full)
        assert end_open_attempt(journal, "a", "u", 1) == "code_error"
    assert capsys.readouterr().out.startswith("kv-align: the end of a (code_error) could not be noted: [Errno 28]")
    assert [row["event"] for row in journal.attempts("a")] == ["start"]
