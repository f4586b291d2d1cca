"""Random faults over a sweep: nothing is lost, nothing is done twice, nothing is different. KV_ALIGN_FAULTS sets how many."""

import os

from tests.launch.sweeps import PATIENCE
from tests.slurm.faults import FaultDriver

FAULTS = int(os.environ.get("KV_ALIGN_FAULTS", "30"))
SEED = int(os.environ.get("KV_ALIGN_FAULT_SEED", "0"))


def test_random_faults(slurm, sweep_on, capsys):
    seeds = f"seeds={max(3, FAULTS // 8)}"
    words = (seeds, "trainer.max_steps=60", "trainer.checkpoint_interval=5", "cluster.throttle=6")
    sweep = sweep_on(*words, behaviour={"step_s": 0.1})
    sweep.submit()
    driver = FaultDriver(slurm, sweep, SEED)
    tally = driver.drive(FAULTS, timeout_s=PATIENCE * (45.0 * FAULTS + 120))
    with capsys.disabled():
        print(f"\nfault driver, seed {SEED}: {tally}")
    assert (tally.lost, tally.doubled, tally.different) == (0, {}, 0), tally
    assert sum(tally.faults.values()) >= FAULTS
