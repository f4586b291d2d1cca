"""Random faults over a sweep: no run is lost, done twice, different, or stuck. KV_ALIGN_FAULTS sets how many."""

import os

from tests.launch.sweeps import PATIENCE
from tests.slurm.faults import FaultDriver

FAULTS = int(os.environ.get("KV_ALIGN_FAULTS", "30"))
SEED = int(os.environ.get("KV_ALIGN_FAULT_SEED", "0"))


def test_random_faults(slurm, sweep_on, small_disk, tmp_path, capsys):
    seeds = f"seeds={max(3, FAULTS // 8)}"
    words = (seeds, "trainer.max_steps=60", "trainer.checkpoint_interval=5", "cluster.throttle=6")
    where = () if small_disk is None else (f"output_dir={small_disk}",)
    sweep = sweep_on(*words, "cluster.prepare=exit 0", *where, behaviour={"step_s": 0.1})
    slurm.enforce("limits")
    try:
        sweep.submit()
        driver = FaultDriver(slurm, sweep, SEED, tmp_path, small_disk)
        tally = driver.drive(FAULTS, timeout_s=PATIENCE * (45.0 * FAULTS + 120))
    finally:
        slurm.enforce("")
    with capsys.disabled():
        print(f"\nfault driver, seed {SEED}: {tally}")
    assert (tally.lost, tally.different) == (0, 0), tally
    assert (tally.doubled, tally.queued_twice, tally.stuck) == ({}, {}, {}), tally
    assert sum(tally.faults.values()) >= FAULTS
