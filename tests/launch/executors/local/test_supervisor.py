"""What the supervisor makes of ends that nobody wrote down, and of a machine that has nothing left for a moment."""

import errno
import os
import socket
import time

import pytest

from kv_align.runs.run_dir import write_json
from launch.executors.local.slot import Worker
from launch.executors.local.supervisor import Supervisor
from launch.journal.journal import Journal
from launch.journal.processes import Identity
from launch.status.judgement import needs
from tests.launch.sweeps import launch


def ends(sweep, start):
    rows = Journal(sweep.directory).attempts(sweep.id_of(start))
    return [(row["cause"], row["retry"]) for row in rows if row["event"] == "end"]


def test_an_error_before_a_run_begins_is_none_that_it_had_before_and_is_not_tried_again(standin):
    """Its last attempt was out of memory; after a resume something fails before the run has begun."""
    more = ("seeds=1", "cluster.slots=1", "cluster.retry.out_of_memory=1")
    sweep = standin(*more, behaviour={"out_of_memory_at": {"baseline": 3}})
    sweep.submit()
    sweep.wait(lambda counts: counts == {"done": 2, "failed": 1})
    assert ends(sweep, "baseline") == [("out_of_memory", True), ("out_of_memory", False)]
    (sweep.path / "standin.json").unlink()
    assert launch("resume", str(sweep.path)).code == 0
    sweep.wait(lambda counts: counts == {"done": 2, "failed": 1})
    assert ends(sweep, "baseline")[2:] == [("code_error", False)]


@pytest.fixture
def supervisor(standin, monkeypatch):
    """Make the supervisor of a sweep of three runs, in this process."""

    def make(*settings):
        sweep = standin("seeds=1", "cluster.slots=3", *settings)
        with monkeypatch.context() as patch:
            patch.setattr("launch.executors.local.executor.start_supervisor", lambda path, code: None)
            sweep.submit()
        made = Supervisor(sweep.path)
        made._read()
        return sweep, made

    return make


def refuse(monkeypatch, number):
    """Let no process be started; returns the tries."""
    tries = []

    def start(*arguments, **options):
        tries.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("launch.executors.local.slot.subprocess.Popen", start)
    return tries


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_a_machine_that_starts_no_process_now_is_waited_for(supervisor, monkeypatch, number):
    sweep, made = supervisor("cluster.retry.backoff_s=30")
    tries = refuse(monkeypatch, number)
    before = time.monotonic()
    made._fill()
    made._fill()
    assert len(tries) == 1, "one is enough to know it"
    assert 30 <= made._paused_until - before < 60
    assert (made.over, made.held, len(made._waiting())) == (set(), {}, 3)
    assert all(Journal(sweep.directory).attempts(run.id) == [] for run in sweep.runs())


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EACCES])
def test_code_that_is_gone_is_bad_input(supervisor, monkeypatch, number):
    sweep, made = supervisor()
    assert len(refuse(monkeypatch, number)) == 0
    made._fill()
    assert (made.over, made._waiting()) == ({run.id for run in sweep.runs()}, [])
    assert ends(sweep, "baseline") == [("bad_input", False)]


def test_an_end_that_cannot_be_written_pauses_the_sweep(supervisor, monkeypatch):
    sweep, made = supervisor("cluster.retry.pause_s=7")
    name = sweep.id_of("baseline")
    uid = Journal(sweep.directory).ledger().jobs[name].uid

    class Killed:
        def poll(self):
            return -9

    made.workers[name] = Worker(Identity(1, "x"), 0, uid, Killed())

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("launch.journal.journal.append_row", full)
        before = time.monotonic()
        made._reap()
        assert 7 <= made._paused_until - before < 30
        refuse(patch, errno.ENOENT)
        made._paused_until = 0.0
        made._fill()
        assert made._paused_until > time.monotonic()
    assert (made.over, len(made._waiting())) == (set(), 3)


def test_a_run_that_waits_to_be_done_again_has_not_ended(supervisor, monkeypatch):
    """It finished once, and its artefacts are gone: what its files say is of that time."""
    sweep, _ = supervisor()
    run = sweep.runs()[0]
    directory = sweep.directory.run(run)
    with directory.lock():
        begun = directory.begin(run.config, arm=run.arm, content_hash=run.content_hash, total_steps=6)
    directory.update(begun, state="finished", step=6)
    write_json(directory.summary_file, {})
    write_json(sweep.path / "launch" / "workers.json", {"host": socket.gethostname(), "workers": {}})
    monkeypatch.setattr("launch.executors.local.executor.Queue.is_supervised", lambda queue: True)
    assert (sweep.state("baseline").state, needs(sweep.state("baseline"), None)) == ("pending", False)
    journal = Journal(sweep.directory)
    uid = journal.ledger().jobs[run.id].uid
    journal.add_attempt(run.id, "end", uid, cause="finished", retry=False)
    assert (sweep.state("baseline").state, needs(sweep.state("baseline"), None)) == ("failed", True)
