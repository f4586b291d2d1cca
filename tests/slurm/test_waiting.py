"""What can never start is said to be so, with the reason and what to do; resume queues it anew, and nobody waits for it."""

import os
import subprocess
import time

import pytest

from launch.journal.journal import Journal
from launch.journal.retry import ending
from tests.launch.sweeps import launch, undisturbed

BUSY = {"step_s": 0.1}
LONG = ("trainer.max_steps=60", "trainer.checkpoint_interval=20")


def done_as_undisturbed(sweep, timeout_s=120.0):
    sweep.wait_done(timeout_s)
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}


def helper(sweep, name):
    from launch.status.overview import overview

    return next(job for job in overview(sweep.directory).helpers if job.id == name)


@pytest.fixture
def drained(slurm):
    """Both nodes are drained; they come back afterwards."""
    slurm.call("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    yield
    slurm.call("scontrol", "update", "nodename=n1,n2", "state=resume")


def test_a_job_that_an_administrator_holds_is_shown_as_held_and_queued_anew(slurm, sweep_on):
    sweep = sweep_on("seeds=1", "cluster.throttle=1", *LONG, behaviour=BUSY)
    sweep.submit()
    held = sweep.state("v4_0_2").job
    assert slurm.call("scontrol", "hold", held).returncode == 0
    sweep.wait(lambda counts: counts.get("held") == 1)
    assert sweep.state("v4_0_2").reason == (
        "held in Slurm by an administrator: ask for its release, or resume queues it anew (JobHeldAdmin)"
    )
    assert sweep.state("none").state == "pending", "the others of its array are not held"
    told = launch("resume", str(sweep.path), "v4_0_2")
    assert "queueing 1 runs" in told.out
    assert slurm.out("squeue", "-h", "-j", held).strip() == "", "the former job is gone"
    done_as_undisturbed(sweep)
    assert [sweep.starts(run.id) for run in sweep.runs()] == [1, 1, 1]


def test_a_held_job_whose_run_is_done_is_cleared_away_by_resume(slurm, sweep_on):
    sweep = sweep_on("seeds=1", behaviour={})
    sweep.submit()
    sweep.wait_done()
    job = sweep.state("none").job
    slurm.until(
        "its job has ended", lambda: not slurm.out("squeue", "-h", "-j", job, "-t", "running,completing").strip()
    )
    assert slurm.call("scontrol", "requeuehold", job).returncode == 0
    assert "held" in slurm.out("squeue", "-h", "-r", "-j", job, "-o", "%r")
    assert sweep.counts() == {"done": 3}
    assert launch("resume", str(sweep.path)).err == "nothing to queue\n"
    slurm.until("nothing stands in the queue", lambda: slurm.out("squeue", "-h").strip() == "")


def test_drained_nodes_are_a_note_and_not_a_refusal(slurm, sweep_on, drained):
    sweep = sweep_on("seeds=1", behaviour={})
    told = sweep.submit()
    assert "note: all nodes of low are down or drained now, so its jobs wait until some come back" in told.out
    sweep.wait(lambda counts: counts == {"pending": 3})
    slurm.until("it says why", lambda: "drained or reserved" in sweep.state("none").reason)
    slurm.call("scontrol", "update", "nodename=n1,n2", "state=resume")
    done_as_undisturbed(sweep)


def test_a_prepare_that_fails_late_names_itself_holds_the_runs_and_is_done_anew_with_them(slurm, sweep_on, tmp_path):
    mended = tmp_path / "mended"
    prepare = f"echo looking; sleep 2; test -e {mended} || exit 7"
    sweep = sweep_on("seeds=1", f"cluster.prepare={prepare}", behaviour={})
    sweep.submit()
    assert helper(sweep, "prepare").state in ("pending", "running")
    assert sweep.counts() == {"pending": 3}
    sweep.wait(lambda counts: counts == {"held": 3})
    assert helper(sweep, "prepare").reason.startswith("exit code 7; see: python -m launch logs")
    assert "its prepare job ended with exit code 7" in sweep.state("none").reason
    assert launch("logs", str(sweep.path), "prepare").out == "looking\n"
    began = time.monotonic()
    told = launch("status", str(sweep.path), "--watch")
    assert time.monotonic() - began < 20, "nobody waits for what can never come"
    assert "prepare job failed: exit code 7" in told.out
    mended.touch()
    assert "queueing 3 runs" in launch("resume", str(sweep.path)).out
    done_as_undisturbed(sweep)
    attempts = Journal(sweep.directory).attempts("prepare")
    assert [row["cause"] for row in attempts if row["event"] == "end"] == ["code_error", "finished"]
    assert launch("resume", str(sweep.path), "--retry", "all").err == "nothing to queue\n"


def test_prepare_is_run_once_cancelled_with_the_sweep_and_waited_for_by_what_is_resumed(slurm, sweep_on, tmp_path):
    marks = tmp_path / "marks"
    sweep = sweep_on("seeds=1", f"cluster.prepare=echo begun >> {marks}; sleep 3", behaviour={})
    sweep.submit()
    slurm.until("prepare runs", marks.exists)
    told = launch("cancel", str(sweep.path))
    assert told.out == "3 runs cancelled, and the prepare job\n"
    slurm.settle()
    assert helper(sweep, "prepare").state == "cancelled"
    assert launch("resume", str(sweep.path), "baseline").code == 0
    assert launch("resume", str(sweep.path), "none").code == 0
    sweep.wait(lambda counts: counts == {"done": 2, "cancelled": 1}, 60)
    assert launch("resume", str(sweep.path)).code == 0
    done_as_undisturbed(sweep)
    assert marks.read_text() == "begun\n" * 2, "once before it was cancelled, once for all three afterwards"
    assert helper(sweep, "prepare").state == "done"


def test_a_canary_that_was_cancelled_in_slurm_leaves_nobody_waiting(slurm, sweep_on):
    sweep = sweep_on("seeds=1", *LONG, behaviour=BUSY)
    sweep.submit("--canary")
    sweep.wait_step("baseline", 2)
    slurm.call("scancel", sweep.state("baseline").job)
    counts = sweep.wait(lambda counts: counts.get("blocked") == 2, 60)
    assert "pending" not in counts
    assert "a job that must succeed first did not" in sweep.state("none").reason
    slurm.until("its end is known", lambda: "running" not in sweep.counts())
    assert "queueing 3 runs" in launch("resume", str(sweep.path)).out
    done_as_undisturbed(sweep)


def test_a_code_error_holds_its_arm_and_not_the_other_arms_of_its_job(slurm, sweep_on):
    sweep = sweep_on("cluster.runs_per_job=3", "cluster.throttle=1", behaviour={"raise_at": {"baseline-kv-seed0": 2}})
    sweep.submit()
    counts = sweep.wait(lambda counts: counts.get("done") == 4, 90)
    slurm.settle()
    assert sweep.wait(lambda counts: "pending" not in counts) == {"done": 4, "failed": 1, "held": 1}
    assert sweep.state("baseline-kv-seed1").state == "held", counts
    sweep.behave({})
    assert "queueing 2 runs" in launch("resume", str(sweep.path)).out
    done_as_undisturbed(sweep)


def test_the_report_is_one_job_of_the_sweep_and_is_cancelled_with_it(slurm, sweep_on):
    sweep = sweep_on("seeds=1", "cluster.report=true", *LONG, behaviour=BUSY)
    sweep.submit()
    first = helper(sweep, "report")
    assert (first.state, first.reason) == ("pending", "waits for the jobs that come before it (Dependency)")
    assert launch("extend", str(sweep.path), "seeds=2").code == 0
    second = helper(sweep, "report")
    assert second.job != first.job
    assert slurm.out("squeue", "-h", "-j", first.job).strip() == "", "there is one report"
    assert launch("cancel", str(sweep.path)).out == "6 runs cancelled, and the report job\n"
    slurm.settle()
    assert helper(sweep, "report").state == "cancelled"
    assert not (sweep.path / "report").exists()


def test_a_submit_limit_lets_in_what_fits_and_says_how_many_did(slurm, sweep_on):
    slurm.call("sacctmgr", "-i", "modify", "user", "root", "set", "maxsubmitjobs=4")
    slurm.enforce("limits")
    try:
        sweep = sweep_on("seeds=2", behaviour={"step_s": 0.3})
        told = launch(*sweep.words)
        assert told.code == 75, told
        assert told.err.startswith(
            "launch: 4 of 6 runs are queued, the others are not: cluster=slurm takes no more jobs"
        )
        assert sweep.counts()["missing"] == 2
        told = launch("resume", str(sweep.path))
        assert (told.code, "takes no more jobs of yours now" in told.err) == (2, True), "nothing was queued, so 2"
        sweep.wait(lambda counts: counts.get("done", 0) >= 1, 90)
        slurm.until(
            "there is room", lambda: len(slurm.out("squeue", "-h", "-r", "-t", "pending,running").split("\n")) < 5
        )
        told = launch("resume", str(sweep.path), "none-ce-seed1")
        assert told.code == 0, "for one run there is room, whatever else waits"
        slurm.call("sacctmgr", "-i", "modify", "user", "root", "set", "maxsubmitjobs=-1")
        assert launch("resume", str(sweep.path)).code == 0
        done_as_undisturbed(sweep)
        assert [sweep.starts(run.id) for run in sweep.runs()] == [1] * 6
    finally:
        slurm.call("sacctmgr", "-i", "modify", "user", "root", "set", "maxsubmitjobs=-1")
        slurm.enforce("")


def test_the_throttle_holds_over_all_arrays_of_the_sweep(slurm, sweep_on):
    sweep = sweep_on("seeds=2", "cluster.throttle=2", *LONG, behaviour={"step_s": 0.05})
    sweep.submit()
    assert launch("extend", str(sweep.path), "seeds=3").code == 0
    most = 0
    while "pending" in sweep.counts():
        most = max(most, sweep.counts().get("running", 0))
    assert most == 2
    done_as_undisturbed(sweep)


def test_a_submitter_that_was_killed_before_sbatch_is_not_waited_for(slurm, sweep_on):
    sweep = sweep_on("seeds=1", behaviour={})
    code = (
        "import os, sys; from tests.launch.sweeps import Sweep; import launch.executors.slurm.submission as s\n"
        "s.Submitter._submitted = lambda *rest: os.kill(os.getpid(), 9)\n"
        "from launch.__main__ import main; main(sys.argv[1:])"
    )
    killed = subprocess.run(
        [os.sys.executable, "-c", code, *sweep.words], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert killed.returncode == -9
    time.sleep(5.0)
    assert "queueing 3 runs" in sweep.submit().out
    done_as_undisturbed(sweep)


def test_a_job_is_submitted_from_a_job_as_from_anywhere(slurm, sweep_on, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    sweep = sweep_on("seeds=1", behaviour={})
    sweep.submit()
    done_as_undisturbed(sweep)
    slurm.settle()
    assert ending(Journal(sweep.directory).attempts(sweep.runs()[0].id))["cause"] == "finished"


def test_what_the_cluster_states_goes_before_what_the_environment_says(slurm, sweep_on, monkeypatch, drained):
    site = {"ACCOUNT": "other", "PARTITION": "high", "TIMELIMIT": "3", "JOB_NAME": "other", "MEM_PER_NODE": "200M"}
    site |= {"GPUS_PER_NODE": "2", "NO_REQUEUE": "1", "ARRAY_INX": "0-1"}
    slurm.call("sacctmgr", "-i", "add", "account", "other")
    slurm.call("sacctmgr", "-i", "add", "user", "root", "account=other")
    for name, value in site.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)

    def asked(sweep):
        job = sweep.state("none").job.partition("_")[0]
        shown = dict(word.split("=", 1) for word in slurm.out("scontrol", "show", "job", job).split() if "=" in word)
        keys = ("Account", "Partition", "TimeLimit", "MinMemoryNode", "TresPerNode", "Requeue", "ArrayTaskId")
        return [shown[key] for key in keys], shown["JobName"].startswith("kv-align-")

    stated = sweep_on("seeds=1", "cluster.account=mine", "cluster.partition=low", behaviour={})
    stated.submit()
    assert asked(stated) == (["mine", "low", "00:10:00", "410M", "gres:gpu:1", "1", "0-2%3"], True)
    left_open = sweep_on("seeds=1", "sweep.name=open", behaviour={})
    left_open.submit()
    assert asked(left_open) == (["other", "high", "00:10:00", "410M", "gres:gpu:1", "1", "0-2%3"], True)
    slurm.call("scontrol", "update", "nodename=n1,n2", "state=resume")
    done_as_undisturbed(stated)
    done_as_undisturbed(left_open)


def test_a_sweep_waits_for_the_jobs_of_the_one_that_it_was_submitted_after(slurm, sweep_on):
    first = sweep_on("sweep=one", behaviour={"hang_at": {"baseline": 3}, "once": True})
    first.submit()
    second = sweep_on("sweep=one", "sweep.name=second", behaviour={})
    second.submit("--after", str(first.path))
    first.wait_step("baseline", 2)
    state = second.state("baseline")
    assert (state.state, state.reason) == ("pending", "waits for the jobs that come before it (Dependency)")
    asked = slurm.out("squeue", "-h", "-j", state.job, "-o", "%E").strip()
    assert asked.startswith(f"afterany:{first.state('baseline').job}")
    assert launch("cancel", str(first.path)).code == 0, "however it ends"
    done_as_undisturbed(second)
