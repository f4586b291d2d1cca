"""What a job of Slurm does with its place, its disk and its queue."""

import errno
import os
from types import SimpleNamespace

import pytest

from launch.executors.slurm import ending
from launch.executors.slurm.task import Helper, join_tasks
from launch.journal.journal import Journal
from launch.worker.worker import execute
from tests.launch.sweeps import launch

FULL = OSError(errno.ENOSPC, "No space left on device")
POLICY = "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Job violates accounting/QOS policy (job submit limit)\n"


@pytest.mark.parametrize(("nodes", "address"), [(1, "127.0.0.1"), (2, "n1")])
def test_tasks_of_one_node_meet_on_the_loopback(monkeypatch, nodes, address):
    task = SimpleNamespace(global_rank=3, num_tasks=4, local_rank=1, num_nodes=nodes, hostnames=["n1", "n2"])
    monkeypatch.setattr("submitit.JobEnvironment", lambda: task)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "20007")
    join_tasks()
    assert (os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("3", str(4 // nodes))
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (address, "20007")


def test_a_full_disk_is_no_attempt_and_no_failure(queued, fake_slurm, monkeypatch, capsys):
    sweep = queued()
    run = sweep.runs()[0]
    journal = Journal(sweep.directory)
    uid = journal.ledger().jobs[run.id].uid

    def no_space(*arguments, **options):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("launch.journal.pause.tempfile.TemporaryFile", no_space)
        assert execute(str(sweep.path), [run.id], uid, to_log=False) == 73
    assert journal.attempts(run.id) == []
    assert "was found full" in launch("status", str(sweep.path)).out.replace("\n", " ")
    fake_slurm.calls()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(ending.signal, "signal", lambda *arguments: None)
    ending.end_job(str(sweep.path), uid, 73)
    assert fake_slurm.calls() == ["scontrol requeue 77", "scontrol update JobId=77 StartTime=now+300"]
    assert journal.attempts(run.id) == []


def test_an_end_that_cannot_be_written_queues_the_job_again(queued, fake_slurm, monkeypatch):
    sweep = queued()
    run = sweep.runs()[0]
    journal = Journal(sweep.directory)
    uid = journal.ledger().jobs[run.id].uid
    journal.add_attempt(run.id, "start", uid)

    def no_space(*arguments, **options):
        raise FULL

    monkeypatch.setattr("launch.journal.journal.append_row", no_space)
    monkeypatch.setattr(ending.signal, "signal", lambda *arguments: None)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    fake_slurm.calls()
    ending.end_job(str(sweep.path), uid, 1)
    assert fake_slurm.calls()[0] == "scontrol requeue 77"


def test_a_helper_that_was_cancelled_does_nothing(queued, tmp_path):
    sweep = queued()
    journal = Journal(sweep.directory)
    mark = tmp_path / "mark"
    submission = journal.submitting([["prepare"]], "p", command=f"touch {mark}")
    journal.cancelled(["prepare"])
    with pytest.raises(SystemExit) as left:
        Helper(str(sweep.path), "prepare", submission.uid, submission.command)()
    assert (left.value.code, mark.exists()) == (1, False)


def test_who_waits_for_room_gets_all_runs_in(fake_slurm, standin, monkeypatch):
    sweep = standin("cluster=slurm", "seeds=1", behaviour={})
    fake_slurm.refuses(POLICY)
    told = launch(*sweep.words)
    assert (told.code, told.err.startswith("launch: cluster=slurm takes no more jobs of yours now")) == (2, True)
    monkeypatch.setattr("launch.commands.time.sleep", lambda seconds: fake_slurm.accepts(78))
    told = launch(*sweep.words, "--when-full", "wait")
    assert told.code == 0, told.err
    assert "3 runs on cluster=slurm" in told.out
    assert {ref.submission.job for ref in Journal(sweep.directory).ledger().jobs.values()} == {"78"}
