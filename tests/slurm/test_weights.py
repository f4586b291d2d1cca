"""The real trainer under the faults that the policy retries: its end weights are those of an undisturbed run, bit for bit."""

import json
import os
import signal

from kv_align.runs import TIMING, read_rows
from tests.launch.sweeps import Sweep, launch
from tests.slurm.conftest import SMALL

WORDS = ("sweep=tiny", "seeds=1", "trainer.max_steps=80", "trainer.checkpoint_interval=5")


def test_end_weights_after_preemption_a_kill_and_the_signal_of_the_time_limit(slurm, tmp_path):
    calm = Sweep(*WORDS, "cluster=debug", f"output_dir={tmp_path / 'calm'}")
    calm.submit()
    sweep = Sweep(*WORDS, f"output_dir={tmp_path / 'disturbed'}", *SMALL, "cluster.mem_gb=1.3")
    sweep.submit()
    sweep.wait_step("none", 12, 120)
    slurm.call("scancel", "--signal=USR2", sweep.state("none").job)
    sweep.wait_step("v4_0_2", 12, 120)
    attempts = sweep.path / "launch" / "attempts" / f"{sweep.id_of('v4_0_2')}.jsonl"
    os.kill(json.loads(attempts.read_text().splitlines()[-1])["pid"], signal.SIGKILL)
    sweep.wait_step("baseline", 12, 120)
    slurm.preempt(sweep.state("baseline").job)
    sweep.wait_done(240)
    slurm.settle()
    assert [sweep.state(run.id).attempt for run in sweep.runs()] == [2, 2, 2]
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
