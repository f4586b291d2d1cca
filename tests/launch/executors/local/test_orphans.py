"""Processes on this machine that nobody lists any more, and sweeps that another machine works on."""

import json
import os
import signal
import time

from kv_align.runs.run_dir import write_json
from launch.journal.journal import Journal
from launch.journal.processes import Identity, is_alive, send
from tests.launch.sweeps import launch, undisturbed


def orphan(sweep) -> Identity:
    """Kill the supervisor of a run that hangs, as if it had not written down yet that it started it."""
    sweep.submit()
    sweep.wait_step("baseline", 3)
    worker = sweep.workers()[sweep.id_of("baseline")]
    os.kill(sweep.supervisor(), signal.SIGKILL)
    write_json(sweep.path / "launch" / "workers.json", {"host": "", "workers": {}})
    return worker


def test_a_worker_that_is_in_no_list_is_seen_taken_over_and_not_done_twice(standin):
    sweep = standin("seeds=1", "cluster.slots=1", behaviour={"hang_at": {"baseline": 4}, "once": True})
    worker = orphan(sweep)
    assert sweep.state("baseline").state == "running"
    assert launch("resume", str(sweep.path)).code == 0
    sweep.wait(lambda counts: counts == {"running": 1, "pending": 2})
    time.sleep(1.0)
    assert sweep.counts() == {"running": 1, "pending": 2}, "it has the one slot"
    assert is_alive(worker)
    send(worker, signal.SIGTERM)
    sweep.wait_done()
    assert sweep.starts("baseline") == 2
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}


def test_a_worker_that_is_in_no_list_is_cancelled(standin):
    sweep = standin("seeds=1", "cluster.slots=1", behaviour={"hang_at": {"baseline": 4}, "once": True})
    worker = orphan(sweep)
    assert launch("cancel", str(sweep.path), "baseline").code == 0
    assert not is_alive(worker)
    assert sweep.state("baseline").state == "cancelled"


def test_who_writes_a_run_counts_as_running_though_nobody_knows_its_process(standin):
    sweep = standin("seeds=1", "cluster.slots=1", behaviour={"hang_at": {"baseline": 4}, "once": True})
    worker = orphan(sweep)
    attempts = sweep.path / "launch" / "attempts" / f"{sweep.id_of('baseline')}.jsonl"
    kept = attempts.read_text()
    attempts.unlink()
    assert sweep.state("baseline").state == "running"
    send(worker, signal.SIGKILL)
    while is_alive(worker):
        pass
    attempts.write_text(kept)
    assert sweep.state("baseline").state == "lost", "its process is known to be gone, whatever its heartbeat says"


def test_a_fresh_heartbeat_from_another_machine_is_believed(standin):
    sweep = standin("seeds=1", behaviour={"hang_at": {"baseline": 4}, "once": True})
    worker = orphan(sweep)
    send(worker, signal.SIGKILL)
    while is_alive(worker):
        pass
    status = sweep.directory.run(sweep.runs()[0]).status_file
    write_json(status, {**json.loads(status.read_text()), "host": "elsewhere", "updated": time.time()})
    found = sweep.state("baseline")
    assert (found.state, found.reason) == ("running", "its job is unknown; it still gives signs of life")


def test_a_sweep_that_another_machine_supervises_is_shown_and_left_alone(standin):
    sweep = standin("seeds=1", "cluster.slots=1", behaviour={"hang_at": {"baseline": 4}, "once": True})
    worker = orphan(sweep)
    write_json(sweep.path / "launch" / "workers.json", {"host": "elsewhere", "workers": {}})
    journal = Journal(sweep.directory)
    uid = journal.ledger().jobs[sweep.id_of("none")].uid
    journal.add_attempt(sweep.id_of("none"), "end", uid, cause="code_error", exit_code=1, retry=False, submissions=1)
    assert [(run.state, run.reason) for run in map(sweep.state, ("baseline", "v4_0_2", "none"))] == [
        ("running", "its job is unknown; it still gives signs of life"),
        ("pending", "supervised on elsewhere"),
        ("failed", "an error in the code"),
    ]
    for words in (("resume",), ("cancel",), ("extend", "seeds=2")):
        told = launch(words[0], str(sweep.path), *words[1:])
        assert (told.code, told.err.count("\n")) == (2, 1)
        assert "is supervised on elsewhere: run this there" in told.err
    assert is_alive(worker)
    send(worker, signal.SIGKILL)


def test_a_supervisor_that_is_done_can_be_followed_by_one_elsewhere(standin):
    sweep = standin("seeds=1", behaviour={})
    sweep.submit()
    sweep.wait_done()
    while sweep.supervisor() is not None:
        time.sleep(0.05)
    assert json.loads((sweep.path / "launch" / "workers.json").read_text()) == {"host": "", "workers": {}}


def test_resume_cleans_up_after_a_run_that_was_killed_when_it_had_finished(standin):
    sweep = standin("seeds=1", behaviour={})
    sweep.submit()
    sweep.wait_done()
    left = sweep.directory.run(sweep.runs()[0]).checkpoints / "step_00000006"
    left.mkdir(parents=True)
    assert launch("resume", str(sweep.path)).code == 0
    assert not left.parent.exists()
