"""The queue on this machine, with real processes that are really killed; the stand-in does the runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

from launch.journal.processes import is_alive, send
from tests.launch.sweeps import CONF, Sweep, launch, undisturbed


def sound(sweep: Sweep) -> None:
    """Every run is there once, done, and what it would be undisturbed."""
    sweep.wait_done()
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}


def test_a_sweep_is_done_and_its_supervisor_leaves(standin):
    sweep = standin()
    told = sweep.submit()
    assert "queueing 6 runs on cluster=local" in told.out
    sound(sweep)
    assert all(sweep.starts(run.id) == 1 for run in sweep.runs())
    assert not any((sweep.path / "runs" / run.id / "checkpoints").exists() for run in sweep.runs())
    while sweep.supervisor() is not None:
        pass
    again = sweep.submit()
    assert "nothing to queue" in again.err
    assert sweep.supervisor() is None


def test_packages_of_the_working_directory_are_not_taken_for_the_projects(standin, tmp_path, monkeypatch):
    for name in ("analysis", "launch", "kv_align", "conf"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "__init__.py").write_text("raise SystemExit(9)\n")
        (tmp_path / "mine" / f"{name}.py").write_text("raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path / "mine")
    sweep = standin("seeds=1")
    assert launch(*sweep.words, "--wait").code == 0
    sound(sweep)
    assert (sweep.path / "report" / "report.html").is_file()


def test_a_killed_worker_goes_on_from_its_checkpoint(standin):
    sweep = standin("seeds=1", behaviour={"hang_at": {"baseline": 4}, "once": True})
    sweep.submit()
    sweep.wait_step("baseline", 3)
    send(sweep.workers()[sweep.id_of("baseline")], signal.SIGKILL)
    sound(sweep)
    assert sweep.starts("baseline") == 2
    first_line, second_line = (sweep.path / "logs" / f"{sweep.id_of('baseline')}.log").read_text().splitlines()
    assert "from step 0" in first_line
    assert "from step 2" in second_line
    ends = [row for row in _attempts(sweep, "baseline") if row["event"] == "end"]
    assert [(row["cause"], row["retry"]) for row in ends] == [("killed", True)]


def test_a_killed_supervisor_leaves_its_workers_and_the_next_one_takes_them_over(standin):
    sweep = standin("seeds=1", "cluster.slots=1", behaviour={"hang_at": {"baseline": 4}, "once": True})
    sweep.submit()
    sweep.wait_step("baseline", 3)
    worker = sweep.workers()[sweep.id_of("baseline")]
    os.kill(sweep.supervisor(), signal.SIGKILL)
    counts = sweep.wait(lambda counts: "lost" in counts)
    assert counts == {"running": 1, "lost": 2}
    assert sweep.state("v4_0_2").reason.startswith("the local supervisor is gone")
    assert launch("resume", str(sweep.path)).code == 0
    assert sweep.workers()[sweep.id_of("baseline")] == worker
    assert is_alive(worker)
    assert sweep.state("v4_0_2").state == "pending", "the worker that was taken over has the one slot"
    send(worker, signal.SIGTERM)
    sound(sweep)
    assert sweep.starts("baseline") == 2


def test_two_submitters_at_once_run_nothing_twice(standin):
    sweep = standin("seeds=1")
    command = [sys.executable, "-m", "launch", *sweep.words]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("queueing 3 runs" in out for out, _ in said) == [False, True]
    sound(sweep)
    assert all(sweep.starts(run.id) == 1 for run in sweep.runs())


def test_two_resumers_at_once_run_nothing_twice(standin):
    sweep = standin("seeds=1", behaviour={"raise_at": {"baseline": 2}, "once": True})
    sweep.submit()
    sweep.wait(lambda counts: counts == {"done": 2, "failed": 1})
    threads = [threading.Thread(target=launch, args=("resume", str(sweep.path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sound(sweep)
    assert sweep.starts("baseline") == 2


def test_cancel_keeps_the_checkpoint_and_resume_goes_on_from_it(standin):
    sweep = standin("seeds=1", behaviour={"hang_at": {"baseline": 4, "v4_0_2": 4, "none": 4}, "once": True})
    sweep.submit()
    sweep.wait_step("baseline", 3)
    sweep.wait_step("v4_0_2", 3)
    assert "1 runs cancelled" in launch("cancel", str(sweep.path), "baseline").out
    assert sweep.state("baseline").state == "cancelled"
    assert sweep.state("v4_0_2").state == "running", "the other one goes on"
    assert "2 runs cancelled" in launch("cancel", str(sweep.path)).out
    sweep.wait(lambda counts: counts == {"cancelled": 3})
    assert sweep.submit().err == "nothing to queue\n", "what was cancelled is not submitted again by itself"
    sweep.behave({})
    assert launch("resume", str(sweep.path)).code == 0
    sound(sweep)
    assert "from step 4" in (sweep.path / "logs" / f"{sweep.id_of('baseline')}.log").read_text()


def test_a_code_error_holds_its_arm_and_no_other(standin):
    sweep = standin("cluster.slots=1", behaviour={"raise_at": {"baseline-kv-seed0": 2}})
    sweep.submit()
    counts = sweep.wait(lambda counts: counts.get("done") == 4)
    assert counts == {"done": 4, "held": 1, "failed": 1}
    assert sweep.state("baseline-kv-seed0").reason == "RuntimeError: made to fail at step 2"
    held = sweep.state("baseline-kv-seed1")
    assert held.reason == f"{sweep.id_of('baseline-kv-seed0')} ended with an error in the code: mend it and resume"
    sweep.behave({})
    assert launch("resume", str(sweep.path)).code == 0
    sound(sweep)


def test_out_of_memory_and_divergence_are_told_apart(standin):
    sweep = standin("seeds=1", behaviour={"out_of_memory_at": {"baseline": 3}, "diverge_at": {"none": 3}})
    sweep.submit()
    sweep.wait(lambda counts: counts == {"done": 1, "failed": 1, "diverged": 1})
    assert sweep.state("baseline").reason == "out of memory: made to run out of memory at step 3"
    assert sweep.state("none").reason == "the loss was not finite at step 3"
    sweep.behave({})
    launch("resume", str(sweep.path), "--retry", "diverged")
    sweep.wait(lambda counts: counts == {"done": 2, "failed": 1})
    launch("resume", str(sweep.path))
    sound(sweep)


def test_a_declared_retry_is_spent_and_no_more(standin):
    sweep = standin("seeds=1", "cluster.retry.out_of_memory=2", behaviour={"out_of_memory_at": {"baseline": 3}})
    sweep.submit()
    sweep.wait(lambda counts: counts == {"done": 2, "failed": 1})
    assert sweep.starts("baseline") == 3


def test_the_others_wait_for_the_canary(standin):
    sweep = standin("seeds=1", behaviour={"raise_at": {"baseline": 2}})
    sweep.submit("--canary")
    counts = sweep.wait(lambda counts: "failed" in counts and "pending" not in counts)
    assert counts == {"held": 2, "failed": 1}
    assert (
        sweep.state("none").reason == f"the canary {sweep.id_of('baseline')} did not finish: resume queues both again"
    )
    sweep.behave({})
    launch("resume", str(sweep.path))
    sound(sweep)


def test_jobs_run_the_plan_and_not_what_conf_says_later(standin, tmp_path):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    tiny = conf / "sweep" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("experiment: baseline", "experiment: mine"))
    (conf / "experiment").mkdir()
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /aligner: flat\naligner: {mlp_ratio: 2.0}\n"
    )
    sweep = standin("seeds=1", "cluster.slots=1", behaviour={"step_s": 0.05}, config_dir=conf)
    sweep.submit()
    (conf / "experiment" / "mine.yaml").write_text("nonsense: [")
    tiny.unlink()
    sound(sweep)
    config = sweep.directory.run(sweep.runs()[0]).read_config()
    assert config["aligner"]["mlp_ratio"] == 2.0


def test_extend_adds_seeds_to_the_frozen_cells(standin):
    sweep = standin("seeds=1")
    sweep.submit()
    sweep.wait_done()
    assert "3 runs added" in launch("extend", str(sweep.path), "seeds=2").out
    sound(sweep)
    assert [run.seed for run in sweep.runs()] == [0, 0, 0, 1, 1, 1]
    assert launch("extend", str(sweep.path), "seeds=2").code == 2


def test_each_slot_has_a_gpu_of_its_own(standin, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    sweep = standin("cluster.slots=null", behaviour={"step_s": 0.05})
    sweep.submit()
    sound(sweep)
    printed = "".join(file.read_text() for file in (sweep.path / "logs").glob("*.log"))
    assert {line.rpartition(" on ")[2] for line in printed.splitlines()} == {"3", "5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    told = launch(
        "submit", "sweep=tiny", "cluster=local", "cluster.slots=2", f"output_dir={sweep.path}", *sweep.words[-2:]
    )
    assert told.code == 2
    assert "cluster.slots=2 is not allowed: this machine has 1 GPUs" in told.err


def test_logs_follow_until_the_run_ends(standin):
    sweep = standin("seeds=1", "cluster.slots=1", behaviour={"step_s": 0.1})
    sweep.submit()
    command = [sys.executable, "-m", "launch", "logs", str(sweep.path), "baseline", "--follow"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == f"{sweep.id_of('baseline')} from step 0 on no GPU\n"
    assert sweep.state("baseline").state == "done"
    sweep.wait_done()


def test_a_snapshot_of_the_code_is_what_runs(standin):
    sweep = standin("seeds=1", "cluster.snapshot_code=true")
    sweep.submit()
    sound(sweep)
    assert json.loads((sweep.path / "launch" / "cluster.json").read_text())["code"] == "code"
    assert (sweep.path / "code" / "kv_align" / "runs" / "run_dir.py").is_file()


def _attempts(sweep: Sweep, start: str) -> list[dict]:
    file = sweep.path / "launch" / "attempts" / f"{sweep.id_of(start)}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_slots_of_a_queue_that_is_at_work_are_changed(standin):
    sweep = standin("seeds=2", "cluster.slots=1", "trainer.max_steps=200", behaviour={"step_s": 0.05})
    sweep.submit()
    sweep.wait(lambda counts: counts.get("running") == 1)
    assert launch("resume", str(sweep.path), "cluster.slots=3").err == "nothing to queue\n"
    sweep.wait(lambda counts: counts.get("running") == 3)
    assert launch("cancel", str(sweep.path)).code == 0


def test_two_sweeps_take_turns_on_a_gpu(standin, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    first = standin("seeds=1", "cluster.slots=1", behaviour={"hang_at": {"baseline": 3}, "once": True})
    second = standin("seeds=1", "cluster.slots=1", "sweep.name=other", behaviour={})
    first.submit()
    first.wait_step("baseline", 2)
    # At least one: other tests may have theirs here.
    note = r"note: (1 other sweep is|[1-9]\d* other sweeps are) at work on this machine; each GPU goes to one sweep at a time"
    assert re.search(note, second.submit().out)
    time.sleep(2.0)
    assert second.counts() == {"pending": 3}
    assert launch("cancel", str(first.path)).code == 0
    sound(second)


def test_code_that_changed_is_refused_by_name_and_taken_by_resume(standin):
    sweep = standin("seeds=1", "cluster.slots=1")
    sweep.submit()
    sweep.wait_done()
    assert launch("extend", str(sweep.path), "seeds=2").code == 0
    sound(sweep)
    code = sweep.path / "launch" / "code.json"
    frozen = json.loads(code.read_text())
    frozen["files"]["kv_align/losses/functional.py"] = "other"
    code.write_text(json.dumps(frozen))
    assert launch("extend", str(sweep.path), "seeds=3").code == 0
    sweep.wait(lambda counts: counts == {"done": 6, "failed": 3})
    assert sweep.state("none-ce-seed2").reason.startswith("kv_align/losses/functional.py of ")
    told = launch("resume", str(sweep.path))
    assert "note: kv_align/losses/functional.py changed since the sweep was submitted" in told.out
    sound(sweep)


def test_a_sweep_waits_for_the_one_that_it_was_submitted_after(standin):
    first = standin("seeds=1", behaviour={"hang_at": {"none": 3}, "once": True})
    first.submit()
    second = standin("sweep.name=second", "seeds=1")
    second.submit("--after", str(first.path))
    first.wait_step("none", 2)
    assert second.counts() == {"pending": 3}
    assert second.state("none").reason == f"waits for {first.path}"
    assert launch("cancel", str(first.path)).code == 0, "however it ends"
    second.wait_done()
    words = [word for word in second.words if not word.startswith("cluster")]
    told = launch(*words, "cluster=debug", "--after", str(first.path))
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "cluster=debug cannot wait for that" in told.err
    told = launch(*words, "cluster=local", "--after", str(first.path.parent))
    assert (told.code, told.err.count("\n")) == (2, 1)
