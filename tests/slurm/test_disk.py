"""A full disk pauses a sweep: nothing is called failed, nothing is lost, and it goes on by itself when there is space."""

import time

import pytest

from launch.status.overview import overview
from tests.launch.sweeps import launch, undisturbed
from tests.slurm.faults import fill_disk


@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_a_full_disk_pauses_the_sweep_until_there_is_space(slurm, sweep_on, small_disk, cluster):
    if small_disk is None:
        pytest.skip("no disk can be mounted here")
    words = ("seeds=2", "trainer.max_steps=60", "trainer.checkpoint_interval=10", f"output_dir={small_disk}")
    own = ("cluster.throttle=2",)
    if cluster == "local":
        own = ("cluster=local", "cluster.slots=2", "cluster.retry.pause_s=2", "cluster.retry.backoff_s=1")
    sweep = sweep_on(*words, *own, behaviour={"step_s": 0.1}, small=cluster == "slurm")
    sweep.submit()
    sweep.wait_step("baseline-kv-seed0", 5)
    fill_disk(small_disk)
    sweep.wait(lambda counts: any("paused" in note for note in overview(sweep.directory).notes), 60)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        assert set(sweep.counts()) <= {"pending", "preempted", "running", "done"}, sweep.counts()
        time.sleep(0.3)
    shown = launch("status", str(sweep.path)).out
    assert "was found full, or its quota used up (0 MB are free now)" in " ".join(shown.split())
    (small_disk / "filler").unlink()
    sweep.wait_done(180)
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}
    assert overview(sweep.directory).notes == ()
