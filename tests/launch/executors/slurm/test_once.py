"""No run is done twice on Slurm: former jobs are withdrawn, what was submitted again is left to its new job."""

import fcntl
import importlib
import json
import pickle

import pytest

import launch.worker
from launch.executors.slurm import ending
from launch.executors.slurm.task import Shell, Worker, missing_gpu
from launch.journal.journal import Journal
from launch.journal.retry import DISK_FULL
from launch.worker import admission
from launch.worker.worker import execute
from tests.launch.fake_slurm import age, running_for
from tests.launch.sweeps import launch as run_launch


def journal_rows(sweep):
    return [json.loads(line) for line in (sweep.path / "launch" / "journal.jsonl").read_text().splitlines()]


def test_resume_withdraws_the_former_jobs_first(queued, fake_slurm):
    sweep = queued()
    age(sweep, 3600)
    fake_slurm.says("sacct", "77_0|FAILED|None\n")
    assert sweep.counts() == {"failed": 1, "lost": 2}
    fake_slurm.accepts(78)
    fake_slurm.calls()
    assert run_launch("resume", str(sweep.path)).code == 0
    told = [line for line in fake_slurm.calls("scancel", "sbatch") if "--test-only" not in line]
    assert told[0] == "scancel 77_1 77_2", "of the one that ended nothing can be left"
    assert told[1].startswith("sbatch ")
    assert [row["event"] for row in journal_rows(sweep)][-3:] == ["cancelled", "submitting", "submitted"]
    assert Journal(sweep.directory).ledger().jobs[sweep.runs()[1].id].job == "78_1"


def test_resume_sees_former_jobs_gone_that_end_only_to_come_back(queued, fake_slurm, monkeypatch):
    sweep = queued()
    name, journal = sweep.runs()[0].id, Journal(sweep.directory)
    journal.submitting([[name]], "refused")
    journal.refused("refused")
    monkeypatch.setattr("launch.executors.slurm.executor._LOOK_S", 0.01)
    fake_slurm.says("sacct", "77_0|FAILED|None\n77_[1-2]|RUNNING|None\n")
    fake_slurm.says("scancel", err="scancel: error: Kill job error: Job/step already completing or completed\n", code=1)
    fake_slurm.accepts(78)
    fake_slurm.says_in_turn("squeue", *["77_0|COMPLETING|None\n"] * 4, "77_0|PENDING|BeginTime\n", "")
    fake_slurm.calls()
    assert "queueing 1 runs" in run_launch("resume", str(sweep.path), name).out
    called = [line.split(" -")[0] for line in fake_slurm.calls("scancel", "sbatch") if "--test-only" not in line]
    assert [line.split(" /")[0] for line in called] == ["scancel 77_0", "scancel 77_0", "sbatch"]


def test_resume_withdraws_all_jobs_that_a_run_ever_had_and_what_is_just_ending(queued, fake_slurm, monkeypatch):
    monkeypatch.setattr("launch.executors.slurm.executor._GONE_S", 0.0)
    sweep = queued()
    name = sweep.runs()[0].id
    journal = Journal(sweep.directory)
    journal.submitting([[name]], "refused")
    journal.refused("refused")
    fake_slurm.says("sacct", "77_0|PREEMPTED|None\n77_[1-2]|RUNNING|None\n")
    fake_slurm.says("squeue", "77_0|COMPLETING|None\n")
    fake_slurm.refuses("sbatch: error: Batch job submission failed: Invalid qos specification\n")
    fake_slurm.calls()
    assert run_launch("resume", str(sweep.path), name).code == 2
    assert fake_slurm.calls("scancel") == ["scancel 77_0"], "it may end only to come back"
    assert run_launch("cancel", str(sweep.path), name).code == 0
    assert fake_slurm.calls("scancel") == ["scancel 77_0"], "its last job was refused"


def test_a_job_with_other_runs_to_do_is_not_withdrawn(queued, fake_slurm):
    sweep = queued("cluster.runs_per_job=2")
    age(sweep, 3600)
    first = sweep.runs()[0].id
    Journal(sweep.directory).cancelled([first])
    fake_slurm.says("sacct", "77_0|RUNNING|None\n77_1|RUNNING|None\n")
    fake_slurm.calls()
    before = Journal(sweep.directory).ledger().jobs
    from launch.executors.registry import make_executor

    executor = make_executor(sweep.directory, Journal(sweep.directory).setting())
    executor.withdraw({first: before[first]})
    assert fake_slurm.calls("scancel") == []
    executor.withdraw({run.id: before[run.id] for run in sweep.runs()})
    assert fake_slurm.calls("scancel") == ["scancel 77_0 77_1"]


def test_a_worker_and_its_last_line_leave_what_was_submitted_again(queued, fake_slurm, monkeypatch, capsys):
    sweep = queued()
    age(sweep, 3600)
    name = sweep.runs()[0].id
    former = Journal(sweep.directory).ledger().jobs[name].uid
    fake_slurm.accepts(78)
    assert run_launch("resume", str(sweep.path)).code == 0
    assert execute(str(sweep.path), [name], former, to_log=False) == 0
    assert f"{name} was submitted again since: left to its new job" in capsys.readouterr().out
    assert Journal(sweep.directory).attempts(name) == []
    assert not sweep.directory.run(sweep.runs()[0]).path.exists()
    fake_slurm.calls()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    ending.end_job(str(sweep.path), former, 75)
    ending.end_job(str(sweep.path), former, DISK_FULL)
    assert fake_slurm.calls() == [], "it is not queued again either"
    assert Journal(sweep.directory).attempts(name) == []


def test_who_waits_in_vain_for_an_earlier_attempt_comes_again(queued, monkeypatch):
    sweep = queued(behaviour={})
    run = sweep.runs()[0]
    uid = Journal(sweep.directory).ledger().jobs[run.id].uid
    monkeypatch.setattr(admission, "LOCK_WAIT_S", 0.3)
    sweep.directory.run(run).path.mkdir(parents=True)
    with (sweep.directory.run(run).path / "run.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert execute(str(sweep.path), [run.id], uid, to_log=False) == 75
    assert [row["event"] for row in Journal(sweep.directory).attempts(run.id)] == ["start"]


def test_a_submission_that_may_still_come_through_is_waited_for(queued, fake_slurm):
    sweep = queued()
    journal = sweep.path / "launch" / "journal.jsonl"
    journal.write_text(journal.read_text().splitlines()[0] + "\n")  # its submitter was killed while sbatch was at it
    assert sweep.counts() == {"pending": 3}
    for words in (("resume",), ("extend", "seeds=2")):
        told = run_launch(words[0], str(sweep.path), *words[1:])
        assert told.code == 2
        assert "was being submitted a moment ago by a command that did not finish" in told.err
        assert told.err.count("\n") == 1
    fake_slurm.says("squeue", err="Socket timed out\n", code=1)
    assert "Slurm does not answer: squeue says: Socket timed out" in run_launch("resume", str(sweep.path)).err
    fake_slurm.says("squeue", "81\n81\n81\n")
    assert run_launch("cancel", str(sweep.path), "v9").code == 2
    assert Journal(sweep.directory).ledger().jobs[sweep.runs()[2].id].job == "81_2"
    journal.write_text(journal.read_text().splitlines()[0] + "\n")
    age(sweep, 3600)
    fake_slurm.says("squeue")
    fake_slurm.accepts(82)
    assert "queueing 3 runs" in run_launch("resume", str(sweep.path)).out


def test_what_sbatch_refused_can_be_submitted_again_at_once(fake_slurm, standin):
    sweep = standin("cluster=slurm", "seeds=1", behaviour={})
    fake_slurm.refuses("sbatch: error: Batch job submission failed: Invalid qos specification\n")
    told = run_launch(*sweep.words)
    assert (told.code, "cluster.qos=null" in told.err or "cluster.qos=None" in told.err) == (2, True)
    fake_slurm.refuses("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n")
    told = run_launch(*sweep.words)
    assert "Slurm does not answer: sbatch says: Batch job submission failed: Socket timed out" in told.err
    fake_slurm.accepts(78)
    assert "was being submitted a moment ago" in run_launch(*sweep.words).err, "the job may have come through"
    age(sweep, 3600)
    assert "queueing 3 runs" in sweep.submit().out


def test_scancel_that_fails_is_said_and_can_be_done_again(queued, fake_slurm):
    sweep = queued()
    fake_slurm.says("sacct", "77_[0-2]|PENDING|None\n")
    fake_slurm.says("scancel", err="scancel: error: Unable to contact slurm controller\n", code=1)
    told = run_launch("cancel", str(sweep.path))
    assert told.code == 2
    assert "scancel says: scancel: error: Unable to contact slurm controller" in told.err
    assert told.err.count("\n") == 1
    fake_slurm.calls()
    fake_slurm.says("scancel", err="scancel: error: Kill job error on job id 77_0: Invalid job id specified\n", code=1)
    assert run_launch("cancel", str(sweep.path)).code == 0
    assert fake_slurm.calls("scancel") == ["scancel 77_0 77_1 77_2"]
    fake_slurm.says("sacct", "77_0|CANCELLED|None\n77_1|CANCELLED|None\n")
    fake_slurm.says("squeue", "77_0|COMPLETING|None\n")
    assert "0 runs cancelled" in run_launch("cancel", str(sweep.path)).out
    assert fake_slurm.calls("scancel") == ["scancel 77_0 77_2"], "what is leaving may leave only to come back"


@pytest.mark.parametrize("works_at", [3, None])
def test_a_requeue_is_tried_several_times_and_its_failure_is_on_record(queued, fake_slurm, monkeypatch, works_at):
    monkeypatch.setattr(ending, "PAUSES_S", (0.0,) * 4)
    sweep = queued()
    run = sweep.runs()[0]
    uid = Journal(sweep.directory).ledger().jobs[run.id].uid
    running_for(sweep.directory.run(run), run.config, step=3)
    directory = sweep.directory.run(run)
    directory.update(directory.status(), state="interrupted", reason="asked to leave by SIGUSR2")
    Journal(sweep.directory).add_attempt(run.id, "start", uid)
    fake_slurm.calls()
    (fake_slurm.folder / "scontrol").write_text(
        f'#!/bin/bash\necho "scontrol $*" >> {fake_slurm.folder}/calls\n'
        f"[ $(wc -l < {fake_slurm.folder}/calls) = {works_at or 99} ] && exit 0\n"
        "echo 'slurm_requeue error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # of an array's last element, which is the array's own
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    ending.end_job(str(sweep.path), uid, 75)
    assert fake_slurm.calls() == ["scontrol requeue 77_0"] * (works_at or 5)
    fake_slurm.says("sacct", "77_0|FAILED|None\n")
    reason = sweep.state(run.id).reason
    assert ("it was not queued again: scontrol requeue says: slurm_requeue error" in reason) == (works_at is None)


def test_a_job_that_was_given_gpus_and_sees_none_is_a_failure_of_its_node(queued, monkeypatch):
    sweep = queued("cluster.require_gpu=true", behaviour={})
    name = sweep.runs()[0].id
    journal = Journal(sweep.directory)
    uid = journal.ledger().jobs[name].uid
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert execute(str(sweep.path), [name], uid, to_log=False, node_problem=missing_gpu) == 74
    note = journal.attempts(name)[-1]
    assert note["event"] == "note"
    assert note["reason"].startswith("its job was given cluster.gpus_per_node=1, but torch sees no GPU on ")
    assert not sweep.directory.run(sweep.runs()[0]).status_file.exists(), "it did not train"


def test_what_version_0_1_0_queued_finds_what_it_names():
    by_its_pickle = pickle.loads(b"claunch.worker\nWorker\n.")
    assert by_its_pickle is Worker
    assert launch.worker.Shell is Shell
    with pytest.raises(AttributeError):
        launch.worker.Nothing  # noqa: B018
    assert importlib.import_module("launch.ending").end_job is ending.end_job
