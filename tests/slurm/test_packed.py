"""Several runs at once in one job of a real Slurm, on pretended GPUs with pretended memory."""

from tests.launch.sweeps import undisturbed
from tests.launch.worker.test_sharing import attempts, packed

PACKED = ("cluster.runs_per_job=6", "cluster.gpus_per_node=1", "cluster.require_gpu=false", "cluster.cpus_per_task=2")


def test_a_packed_job_does_runs_at_once_and_the_one_without_memory_alone(slurm, sweep_on):
    behaviour = {"gpu_gb": 10.0, "peak_gb": {"": 3.0, "v4_0_2": 8.0}, "step_s": 0.1, "threads": True}
    words = ("cluster.runs_per_gpu=2", "trainer.max_steps=40", "seeds=1")
    sweep = sweep_on(*PACKED, *words, behaviour=behaviour)
    sweep.submit()
    sweep.wait_done(120)
    jobs = {sweep.state(run.id).job for run in sweep.runs()}
    assert len(jobs) == 1, "one job did them all, the second try included"
    found = packed(sweep, 0)
    assert max(number for _, number in found) == 2
    heavy = sweep.id_of("v4_0_2")
    assert found[-1] == (heavy, 1)
    assert [sweep.starts(run.id) for run in sweep.runs()] == [2 if run.id == heavy else 1 for run in sweep.runs()]
    ends = attempts(sweep, heavy, "end")
    assert (ends[0]["cause"], ends[0]["retry"], ends[0]["shared"]) == ("out_of_memory", True, True)
    assert {(sweep.directory.run(run).path / "threads.txt").read_text() for run in sweep.runs()} == {"1"}


def test_a_packed_job_that_is_asked_to_leave_goes_on_with_all_its_runs(slurm, sweep_on):
    behaviour = {"gpu_gb": 10.0, "peak_gb": {"": 3.0}, "hang_at": {"baseline": 4, "v4_0_2": 4}, "once": True}
    sweep = sweep_on("seeds=1", *PACKED, "cluster.runs_per_gpu=2", behaviour=behaviour)
    sweep.submit()
    sweep.wait_step("baseline", 3)
    sweep.wait_step("v4_0_2", 3)
    slurm.ask_to_leave(sweep.state("baseline").job)
    sweep.wait_done(120)
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}
    assert {run.arm: sweep.starts(run.id) for run in sweep.runs()} == {"baseline": 2, "v4_0_2": 2, "none": 1}
    assert [attempts(sweep, sweep.id_of(arm), "end")[0]["cause"] for arm in ("baseline", "v4_0_2")] == [
        "interrupted"
    ] * 2


def test_a_code_error_in_a_packed_job_keeps_the_rest_of_its_arm_from_starting(slurm, sweep_on):
    behaviour = {"gpu_gb": 10.0, "peak_gb": {"": 3.0}, "step_s": 0.1, "raise_at": {"baseline-kv-seed0": 2}}
    sweep = sweep_on(*PACKED, "cluster.runs_per_gpu=2", "trainer.max_steps=8", behaviour=behaviour)
    sweep.submit()
    counts = sweep.wait(lambda counts: counts.get("failed") == 1 and counts.get("done") == 4, 120)
    assert counts == {"failed": 1, "done": 4, "held": 1}
