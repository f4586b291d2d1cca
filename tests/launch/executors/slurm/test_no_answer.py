"""A Slurm that gives no answer, a late one, or only part of one: nothing is called lost, failed or missing for that."""

import io
import json
import time

import pytest
from rich.console import Console

from launch.executors.base import JobState, SchedulerUnavailable
from launch.executors.slurm.query import call, job_states
from launch.journal.journal import Journal
from launch.status.judgement import Overview, RunState
from launch.status.overview import Memory
from launch.status.table import watch
from tests.launch.fake_slurm import age, running_for
from tests.launch.sweeps import launch

RUNNING = "77_0|RUNNING|None\n77_1|RUNNING|None\n77_2|RUNNING|None\n"


def test_no_answer_is_not_the_answer_that_there_is_nothing(queued, fake_slurm):
    sweep = queued()
    age(sweep, 3600)
    journal = (sweep.path / "launch" / "journal.jsonl").read_text()
    for name, said in (("sacct", "sacct: error: slurm_persist_conn_open: failed"), ("squeue", "Unable to contact")):
        fake_slurm.says("sacct")
        fake_slurm.says(name, err=f"{said}\n", code=1)
        for words in (("status",), ("resume",), ("extend", "seeds=2"), ("status", "--json")):
            told = launch(words[0], str(sweep.path), *words[1:])
            assert told.code == 2, words
            assert told.err == f"launch: Slurm does not answer: {name} says: {said}; try again when it does.\n"
    added = json.loads((sweep.path / "plan.json").read_text())["extensions"]
    assert (sweep.path / "launch" / "journal.jsonl").read_text() == journal
    assert added == [], "a sweep is extended when it can be queued"
    assert fake_slurm.calls("scancel") == []


def test_a_job_that_slurm_does_not_know_is_lost(queued, fake_slurm):
    sweep = queued()
    age(sweep, 3600)
    fake_slurm.says("squeue", err="slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert sweep.counts() == {"lost": 3}


def test_a_command_that_hangs_is_no_answer(fake_slurm, monkeypatch):
    (fake_slurm.folder / "squeue").write_text("#!/bin/bash\nexec sleep 30\n")
    monkeypatch.setattr("launch.executors.slurm.query.TIMEOUT_S", 0.2)
    with pytest.raises(SchedulerUnavailable, match="timed out"):
        job_states(["1"], accounting=False)


def test_cancel_needs_no_answer_but_that_of_scancel(queued, fake_slurm):
    sweep = queued()
    (fake_slurm.folder / "squeue").write_text("#!/bin/bash\nexec sleep 60\n")
    fake_slurm.says("sacct", err="sacct: error: slurm_persist_conn_open: failed\n", code=1)
    fake_slurm.calls()
    told = launch("cancel", str(sweep.path), sweep.runs()[1].id)
    assert (told.code, told.out) == (0, "1 runs cancelled\n")
    assert launch("cancel", str(sweep.path)).out == "2 runs cancelled\n"
    assert fake_slurm.calls("scancel") == ["scancel 77_1", "scancel 77_0 77_1 77_2"]
    assert Journal(sweep.directory).ledger().cancelled == {run.id for run in sweep.runs()}


def test_a_squeue_that_is_slow_keeps_nobody_from_cancelling(queued, fake_slurm, monkeypatch):
    monkeypatch.setattr("launch.executors.slurm.executor._CANCEL_ASKS_S", 0.3)
    sweep = queued()
    (fake_slurm.folder / "squeue").write_text("#!/bin/bash\nexec sleep 60\n")
    fake_slurm.calls()
    began = time.monotonic()
    assert launch("cancel", str(sweep.path)).out == "3 runs cancelled\n"
    assert time.monotonic() - began < 20
    assert fake_slurm.calls("scancel") == ["scancel 77_0 77_1 77_2"]


def test_what_is_queued_stays_queued_when_slurm_falls_silent_after_it(queued, fake_slurm, standin):
    fake_slurm.says("sacct", err="gone", code=1)
    sweep = standin("cluster=slurm", "seeds=1", behaviour={})
    told = sweep.submit()
    assert "Slurm does not answer: sacct says: gone" in told.out
    assert Journal(sweep.directory).ledger().jobs[sweep.runs()[0].id].job == "77_0"


def test_squeue_wins_where_accounting_lags(queued, fake_slurm):
    sweep = queued()
    fake_slurm.says("sacct", RUNNING)
    fake_slurm.calls()
    assert sweep.counts() == {"running": 3}
    (asked,) = fake_slurm.calls()
    assert asked.startswith("sacct --allusers ")
    fake_slurm.says("sacct", "77_0|FAILED|None\n77_1|RUNNING|None\n")
    fake_slurm.says("squeue", "77_[0,2]|PENDING|Priority\n")
    age(sweep, 3600)
    assert sweep.counts() == {"running": 1, "pending": 2}
    assert [line.split()[0] for line in fake_slurm.calls()] == ["sacct", "squeue"]
    fake_slurm.says("squeue")
    assert sweep.counts() == {"running": 1, "failed": 1, "lost": 1}


def test_without_accounting_squeue_is_asked_once(fake_slurm):
    fake_slurm.says("squeue", "12_[0-2%1]|PENDING|None\n9|COMPLETED|None\n")
    assert job_states(["12_1", "9"], accounting=False)["12_1"] == JobState("pending")
    assert len(fake_slurm.calls()) == 1


def test_lines_that_are_none_are_skipped_and_task_lists_are_not_cut(fake_slurm):
    fake_slurm.says("sacct", "a message of the site\n12||x\n13|RUNNING|None\n")
    assert job_states(["13"], accounting=True) == {"13": JobState("running")}
    assert (fake_slurm.folder / "bitstr").read_text() == "0\n"
    assert call("srun").returncode == 0


def test_running_for_accounting_without_a_sign_of_life_is_checked(queued, fake_slurm):
    sweep = queued()
    fake_slurm.says("sacct", RUNNING)
    age(sweep, 3600)
    quiet, alive, _ = sweep.runs()
    running_for(sweep.directory.run(quiet), quiet.config, step=3, silent_s=600)
    running_for(sweep.directory.run(alive), alive.config, step=3)
    found = sweep.state(quiet.id)
    assert (found.state, sweep.state(alive.id).state) == ("lost", "running")
    assert found.reason.startswith("accounting says that its job runs, but Slurm no longer knows that job; last sign")
    fake_slurm.says("squeue", "77_0|RUNNING|None\n")
    assert sweep.state(quiet.id).reason == "no sign of life for 10 min"
    fake_slurm.says("squeue")
    Journal(sweep.directory).cancelled([quiet.id])
    assert sweep.state(quiet.id).state == "cancelled"


def test_only_runs_that_never_started_are_held_by_their_arm(queued, fake_slurm):
    sweep = queued("seeds=3")
    first, second, third = (run.id for run in sweep.runs() if run.arm == "baseline")
    journal = Journal(sweep.directory)
    uid = journal.ledger().jobs[first].uid
    journal.add_attempt(first, "end", uid, cause="code_error", exit_code=1, retry=False, submissions=1)
    running_for(sweep.directory.run(sweep.runs()[1]), sweep.runs()[1].config, step=3, silent_s=60)
    fake_slurm.says("sacct", "77_[0-8]|PENDING|None\n")
    fake_slurm.says("squeue", "77_[0-8]|PENDING|Priority\n")
    assert (sweep.state(second).state, sweep.state(third).state) == ("preempted", "held")


def test_who_watches_keeps_the_last_table_until_there_is_an_answer():
    run = RunState("a", "a", "kv", 0, "running", "", 1, 2, None, 1, "7", "")
    looks = [
        Overview("p", "n", True, (run,)),
        SchedulerUnavailable("Slurm does not answer"),
        Overview("p", "n", True, ()),
    ]

    def look():
        found = looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    console = Console(file=io.StringIO())
    assert watch(look, console, 0.0).runs == ()
    assert looks == []


def test_a_watcher_asks_slurm_again_after_a_while_or_about_other_jobs():
    asked = []

    def ask():
        asked.append(1)
        return {"a": JobState("running")}

    memory = Memory()
    memory.answer({"a": "7", "b": "8"}, ask, 60.0)
    memory.answer({"a": "7"}, ask, 60.0)
    assert len(asked) == 1
    memory.answer({"a": "9"}, ask, 60.0)
    assert len(asked) == 2
    memory = Memory()
    memory.answer({"a": "7"}, ask, 0.0)
    memory.answer({"a": "7"}, ask, 0.0)
    assert len(asked) == 4

    def silent():
        asked.append(1)
        raise SchedulerUnavailable("none")

    memory = Memory()
    for _ in range(2):
        with pytest.raises(SchedulerUnavailable):
            memory.answer({"a": "7"}, silent, 60.0)
    assert len(asked) == 5, "and no more often when there is no answer"
