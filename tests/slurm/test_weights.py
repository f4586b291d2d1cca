"""The real trainer under the faults that the policy retries: its end weights are those of an undisturbed run, bit for bit."""

import json
import os
import signal
import time

from kv_align.runs.run_dir import TIMING, read_rows
from tests.launch.sweeps import PATIENCE, Sweep, launch
from tests.slurm.conftest import SMALL

WORDS = ("sweep=tiny", "seeds=1", "trainer.max_steps=500", "trainer.checkpoint_interval=20")


def running(sweep, start, attempt=1):
    """A run that is well on its way in an attempt, also for the scheduler."""
    deadline = time.monotonic() + 120 * PATIENCE
    while True:
        run = sweep.state(start)
        if run.state == "running" and run.attempt >= attempt and 8 <= run.step < run.total_steps:
            return run
        assert time.monotonic() < deadline, run
        time.sleep(0.1)


def test_end_weights_after_each_fault_that_is_retried(slurm, tmp_path):
    calm = Sweep(*WORDS, "cluster=debug", f"output_dir={tmp_path / 'calm'}")
    calm.submit()
    sweep = Sweep(*WORDS, f"output_dir={tmp_path / 'disturbed'}", *SMALL, "cluster.mem_gb=1.3", "cluster.throttle=2")
    sweep.submit()
    # Two run at a time: each is disturbed while it runs, and the third when it has come to its turn.
    slurm.ask_to_leave(running(sweep, "baseline").job)
    slurm.call("scontrol", "requeue", running(sweep, "v4_0_2").job)
    slurm.start_node(slurm.kill_node_of(running(sweep, "none").job))
    attempts = sweep.path / "launch" / "attempts" / f"{running(sweep, 'baseline', 2).id}.jsonl"
    os.kill(json.loads(attempts.read_text().splitlines()[-1])["pid"], signal.SIGKILL)
    slurm.preempt(running(sweep, "v4_0_2", 2).job)
    sweep.wait_done(300)
    slurm.settle()
    found = {run.arm: sweep.state(run.id).attempt for run in sweep.runs()}
    assert all(found[arm] >= number for arm, number in {"baseline": 3, "v4_0_2": 3, "none": 2}.items()), found
    assert sweep.weights() == calm.weights()
    for run in sweep.runs():
        ours, theirs = (
            [
                {key: value for key, value in row.items() if key not in TIMING}
                for row in read_rows(each.directory.run(run).metrics_file)
            ]
            for each in (sweep, calm)
        )
        assert ours == theirs
    assert launch("status", str(sweep.path)).code == 0
