"""Each fault on a real Slurm: what the policy retries ends in the weights of an undisturbed run; the rest is told apart."""

import json
import re
import shutil
import subprocess
import time

import pytest

from launch.journal.journal import Journal
from tests.launch.sweeps import CONF, launch, undisturbed
from tests.slurm.faults import die_in_sbatch

SLOW = {"step_s": 0.1}  # of 40 steps
ONE = "sweep=one"
LONG = ("trainer.max_steps=40", "trainer.checkpoint_interval=10")


def sound(sweep, timeout_s=120.0):
    """Every run is done and what it would be undisturbed, and every job has left."""
    sweep.wait_done(timeout_s)
    while subprocess.run(["squeue", "-h"], capture_output=True, check=True).stdout.strip():
        time.sleep(0.2)
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}


def slurm_says(slurm, sweep, start):
    """State and exit code of a run's job that has ended, as accounting has them."""
    (told,) = slurm.accounted(sweep.state(start).job)
    return told.split("|")


def causes(sweep, start):
    file = sweep.path / "launch" / "attempts" / f"{sweep.id_of(start)}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["cause"] for row in rows if row["event"] == "end"]


def test_preemption_of_one_element(slurm, sweep_on):
    sweep = sweep_on("seeds=1", *LONG, behaviour=SLOW)
    sweep.submit()
    sweep.wait_step("baseline", 12)
    slurm.preempt(sweep.state("baseline").job)
    sweep.wait(lambda counts: "preempted" in counts, 30)
    sound(sweep)
    assert sweep.starts("baseline") == 2
    log = (sweep.path / "logs" / f"{sweep.id_of('baseline')}.log").read_text()
    steps = [int(step) for step in re.findall(r" from step (\d+) ", log)]
    assert steps[0] == 0
    assert steps[1] >= 12, "it went on where it was asked to leave"


def test_the_last_element_of_an_array_comes_back_alone(slurm, sweep_on):
    """It has the array's number: what is asked of Slurm by that is done to all elements, also to those that have ended."""
    sweep = sweep_on("seeds=1", *LONG, "cluster.throttle=1", behaviour=SLOW)
    sweep.submit()
    sweep.wait_step("none", 12)
    last = sweep.state("none").job
    assert slurm.out("squeue", "-h", "-j", last, "-o", "%A").strip() == last.partition("_")[0]
    slurm.ask_to_leave(last)
    sweep.wait(lambda counts: "preempted" in counts, 30)
    assert slurm.out("squeue", "-h", "-r", "-t", "pending,running", "-o", "%i").split() == [last]
    sound(sweep)
    assert [sweep.starts(run.id) for run in sweep.runs()] == [1, 1, 2]


@pytest.mark.slow
def test_the_time_limit(slurm, sweep_on):
    # The run waits at a step until it is asked to leave: the controller looks at time limits only each half minute, and may
    # send the signal up to a minute early, so before the run has started as well as when it is done but for its end.
    words = ("cluster.time_min=1", "cluster.signal_delay_s=50", "trainer.checkpoint_interval=1000")
    behaviour = {"hang_at": {"baseline": 15}, "once": True}
    sweep = sweep_on("seeds=1", *words, "trainer.max_steps=40", "sweep.losses=[kv]", behaviour=behaviour)
    sweep.submit()
    sound(sweep, 240.0)
    assert sweep.starts("baseline") >= 2
    *before, last = causes(sweep, "baseline")
    assert set(before) == {"interrupted"}
    assert last == "finished"
    assert slurm_says(slurm, sweep, "baseline") == ["COMPLETED", "0:0"]


def test_scancel_from_outside_and_resume_of_exactly_the_missing(slurm, sweep_on):
    sweep = sweep_on(*LONG, "cluster.throttle=3", behaviour=SLOW)
    sweep.submit()
    sweep.wait_step("baseline-kv-seed0", 2)
    cancelled = [sweep.state(start).job for start in ("baseline-kv-seed0", "none-ce-seed1")]
    slurm.call("scancel", *cancelled)
    counts = sweep.wait(lambda counts: counts.get("lost") == 1 and counts.get("done") == 4, 90)
    assert counts == {"done": 4, "failed": 1, "lost": 1}
    assert sweep.state("baseline-kv-seed0").reason.startswith("its job was cancelled in Slurm")
    assert sweep.state("none-ce-seed1").reason == "it never started", "of a waiting element sacct keeps nothing"
    told = launch("resume", str(sweep.path))
    assert "queueing 2 runs on cluster=slurm" in told.out
    sound(sweep)
    assert [sweep.starts(run.id) for run in sweep.runs()] == [2, 1, 1, 1, 1, 1]


@pytest.fixture
def leaving_slowly(slurm, sweep_on):
    """A sweep of one run that is just being requeued: its worker ends with its step, some seconds later."""

    def make(accounting):
        words = ("trainer.max_steps=3", "trainer.checkpoint_interval=1")
        sweep = sweep_on(ONE, *words, behaviour={"step_s": 3.0})
        sweep.submit()
        if not accounting:
            without_accounting(sweep)
        sweep.wait_step("baseline", 1)
        job = sweep.state("baseline").job
        assert slurm.call("scontrol", "requeue", job).returncode == 0
        assert slurm.out("squeue", "-h", "-j", job, "-o", "%T").strip() == "COMPLETING"
        sweep.behave({})
        return sweep, job

    return make


def never_comes_back(slurm, job):
    # It may stand in the queue for the moment between its own requeue and its own scancel.
    slurm.until(
        "it has left", lambda: slurm.out("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip() == "CANCELLED"
    )


def without_accounting(sweep):
    setting = sweep.path / "launch" / "cluster.json"
    setting.write_text(setting.read_text().replace('"accounting": true', '"accounting": false'))


def test_a_run_that_is_just_being_requeued_is_cancelled(slurm, leaving_slowly):
    sweep, job = leaving_slowly(accounting=False)  # which would know that it was requeued
    assert launch("cancel", str(sweep.path), "baseline").code == 0
    never_comes_back(slurm, job)
    assert launch("resume", str(sweep.path)).code == 0
    sound(sweep)


def test_a_former_job_that_would_come_back_is_withdrawn_before_its_run_is_queued_again(slurm, leaving_slowly):
    sweep, job = leaving_slowly(accounting=True)
    journal = Journal(sweep.directory)
    name = sweep.id_of("baseline")
    refused = journal.submitting([[name]], "refused")  # so the job to look for is not that of the last submission
    journal.refused(refused.uid)
    journal.cancelled([name])  # by one who was killed before it called scancel
    assert launch("resume", str(sweep.path)).code == 0
    assert len(slurm.out("squeue", "-h", "-t", "pending,running").splitlines()) == 1
    never_comes_back(slurm, job)
    sound(sweep)


def test_a_job_that_is_cancelled_while_it_queues_itself_again_stays_away(slurm, sweep_on, tmp_path):
    scontrol, asked, go = shutil.which("scontrol"), tmp_path / "asked", tmp_path / "go"
    slow = tmp_path / "bin" / "scontrol"
    slow.parent.mkdir()
    wait = f"[ $1 = requeue ] && touch {asked} && while [ ! -e {go} ]; do sleep 0.1; done"
    slow.write_text(f'#!/bin/bash\n{wait}\nexec {scontrol} "$@"\n')
    slow.chmod(0o755)
    setup = f"cluster.setup=['export PATH={slow.parent}:$PATH']"
    sweep = sweep_on(ONE, setup, behaviour={"break_at": {"baseline": 3}, "once": True})
    sweep.submit()
    job = sweep.state("baseline").job
    slurm.until("it is about to queue itself again", asked.exists)
    assert launch("cancel", str(sweep.path), "baseline").code == 0
    go.touch()
    never_comes_back(slurm, job)
    assert launch("resume", str(sweep.path)).code == 0
    sound(sweep)


def test_cancel_by_launch(slurm, sweep_on):
    sweep = sweep_on("seeds=1", *LONG, "cluster.throttle=2", behaviour=SLOW)
    sweep.submit()
    sweep.wait_step("baseline", 2)
    assert "1 runs cancelled" in launch("cancel", str(sweep.path), "baseline").out
    assert "2 runs cancelled" in launch("cancel", str(sweep.path)).out
    sweep.wait(lambda counts: counts == {"cancelled": 3})
    slurm.settle()
    status = sweep.directory.run(sweep.runs()[0]).status()
    assert status.state == "interrupted", "it was given the time for a checkpoint"
    assert launch("resume", str(sweep.path)).code == 0
    sound(sweep)


def test_a_node_dies_with_its_run(slurm, sweep_on):
    sweep = sweep_on("seeds=1", *LONG, behaviour={"hang_at": {"baseline": 15}, "once": True})
    sweep.submit()
    sweep.wait_step("baseline", 14)
    slurm.kill_node_of(sweep.state("baseline").job)
    sound(sweep)
    assert sweep.starts("baseline") == 2
    assert causes(sweep, "baseline") == ["node_failure", "finished"]


def test_the_controller_is_restarted(slurm, sweep_on):
    sweep = sweep_on("seeds=1", *LONG, "cluster.throttle=2", behaviour=SLOW)
    sweep.submit()
    sweep.wait_step("baseline", 5)
    slurm.restart_controller()
    sound(sweep)
    assert [sweep.starts(run.id) for run in sweep.runs()] == [1, 1, 1]


def test_a_run_that_raises_fails_in_slurm_and_holds_its_arm(slurm, sweep_on):
    sweep = sweep_on("cluster.throttle=1", behaviour={"raise_at": {"baseline-kv-seed0": 3}})
    sweep.submit()
    counts = sweep.wait(lambda counts: counts.get("done") == 4, 120)
    assert counts == {"done": 4, "held": 1, "failed": 1}
    assert sweep.state("baseline-kv-seed0").reason == "RuntimeError: made to fail at step 3"
    assert slurm_says(slurm, sweep, "baseline-kv-seed0") == ["FAILED", "1:0"]
    assert slurm.out("squeue", "-h", "-o", "%T", "-j", sweep.state("baseline-kv-seed1").job).strip() == "PENDING"
    sweep.behave({})
    assert "queueing 2 runs" in launch("resume", str(sweep.path)).out
    sound(sweep)


def test_out_of_memory_of_the_model_and_of_the_job_and_divergence(slurm, sweep_on):
    behaviour = {"out_of_memory_at": {"baseline": 3}, "allocate_at": {"v4_0_2": 3}, "once": True}
    sweep = sweep_on("seeds=1", behaviour=behaviour | {"diverge_at": {"none": 3}})
    sweep.submit()
    counts = sweep.wait(lambda counts: counts == {"done": 2, "diverged": 1}, 120)
    assert counts == {"done": 2, "diverged": 1}
    slurm.settle()
    assert causes(sweep, "baseline") == ["out_of_memory", "finished"]
    assert causes(sweep, "v4_0_2") == ["out_of_memory", "finished"]
    assert slurm_says(slurm, sweep, "none") == ["FAILED", "3:0"]
    assert sweep.weights_of("baseline") == undisturbed(sweep.runs()[0])
    assert sweep.weights_of("v4_0_2") == undisturbed(sweep.runs()[1])
    told = launch("resume", str(sweep.path))
    assert "nothing to queue" in told.err, "what diverged would diverge again"


def test_conf_is_edited_while_jobs_queue_and_are_requeued(slurm, sweep_on, tmp_path):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "experiment").mkdir()
    mine = conf / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\ndefaults:\n  - override /aligner: flat\naligner: {mlp_ratio: 2.0}\n")
    tiny = conf / "sweep" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("experiment: baseline", "experiment: mine"))
    sweep = sweep_on("seeds=2", *LONG, "cluster.throttle=1", behaviour={"step_s": 0.02}, config_dir=conf)
    sweep.submit()
    mine.write_text("# @package _global_\ndefaults:\n  - override /aligner: flat\naligner: {mlp_ratio: 3.0}\n")
    tiny.write_text("nonsense: [")
    sweep.wait_step("baseline-kv-seed0", 1)
    slurm.call("scontrol", "requeue", sweep.state("baseline-kv-seed0").job)
    sound(sweep)
    ratios = [sweep.directory.run(run).read_config()["aligner"].get("mlp_ratio") for run in sweep.runs()]
    assert ratios == [2.0, 2.0, None, None, None, None]


def test_a_submitter_that_dies_after_sbatch_loses_nothing(slurm, sweep_on):
    sweep = sweep_on("seeds=1", behaviour=SLOW)
    sweep.submit()
    journal = sweep.path / "launch" / "journal.jsonl"
    submitting, submitted = journal.read_text().splitlines()
    assert json.loads(submitted)["event"] == "submitted"
    journal.write_text(submitting + "\n" + submitted[:20])
    assert sweep.submit().err == "nothing to queue\n"
    sound(sweep)
    assert [sweep.starts(run.id) for run in sweep.runs()] == [1, 1, 1]


def test_a_submitter_that_dies_while_sbatch_is_at_it_loses_nothing(slurm, sweep_on, tmp_path):
    sweep = sweep_on("seeds=1", behaviour=SLOW)
    assert die_in_sbatch(tmp_path / "slow", *sweep.words)
    assert not list((sweep.path / "launch" / "jobs").glob("*_submitted.pkl")), "no element finds what it is to do"
    assert sweep.submit().err == "nothing to queue\n"
    sound(sweep)
    assert [sweep.starts(run.id) for run in sweep.runs()] == [1, 1, 1]
    assert [causes(sweep, run.id) for run in sweep.runs()] == [["finished"]] * 3, "none was tried in vain before"


@pytest.mark.parametrize("accounting", [True, False])
def test_status_asks_the_scheduler_once(slurm, sweep_on, accounting, monkeypatch):
    import subprocess

    sweep = sweep_on("seeds=1", "trainer.max_steps=200", behaviour=SLOW)
    sweep.submit()
    if not accounting:
        without_accounting(sweep)
    sweep.wait_step("baseline", 5)
    ask = ("sacct", "-X", "-n", "-o", "State", "-j", ",".join(sweep.state(run.id).job for run in sweep.runs()))
    slurm.until("accounting has heard that all run", lambda: slurm.out(*ask).split() == ["RUNNING"] * 3)
    calls, real = [], subprocess.run

    def counting(command, *rest, **options):
        calls.append(command[0])
        return real(command, *rest, **options)

    monkeypatch.setattr("launch.executors.slurm.query.subprocess.run", counting)
    assert sweep.counts() == {"running": 3}
    assert calls == ["sacct" if accounting else "squeue"]


def test_status_asks_squeue_once_for_what_accounting_leaves_unclear(slurm, sweep_on, monkeypatch):
    sweep = sweep_on("seeds=1", behaviour={"raise_at": {"baseline": 3}})
    sweep.submit()
    sweep.wait(lambda counts: counts == {"done": 2, "failed": 1})
    calls, real = [], subprocess.run

    def counting(command, *rest, **options):
        calls.append(command[0])
        return real(command, *rest, **options)

    monkeypatch.setattr("launch.executors.slurm.query.subprocess.run", counting)
    assert sweep.counts() == {"done": 2, "failed": 1}
    assert calls == ["sacct", "squeue"], "it is called failed when both say that its job has ended"


def test_a_job_that_vanished_is_lost_when_its_heartbeat_is_old(slurm, sweep_on):
    sweep = sweep_on("seeds=1", "cluster.throttle=1", behaviour={"hang_at": {"baseline": 3}, "once": True})
    sweep.submit()
    sweep.wait_step("baseline", 2)
    slurm.call("scancel", *(sweep.state(run.id).job for run in sweep.runs()))
    slurm.settle()
    journal = sweep.path / "launch" / "journal.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    rows[1]["job"] = "999999"  # a job that Slurm does not know
    rows[0]["time"] -= 3600
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = sweep.directory.run(sweep.runs()[0])
    status.update(status.status(), state="running")
    assert sweep.state("baseline").state == "running", "it still gives signs of life"
    time.sleep(5.5)
    assert sweep.counts() == {"lost": 3}
    assert launch("resume", str(sweep.path)).code == 0
    sound(sweep)
