"""The whole matrix by the real trainer, arrays that have to be split, and what a submission can ask for."""

import json
import re
from pathlib import Path

import pytest

from tests.launch.sweeps import CONF, Sweep, launch
from tests.slurm.conftest import SMALL

_TRAINER = ("cluster.mem_gb=1.3", "cluster.throttle=3")


def submissions(sweep):
    rows = [json.loads(line) for line in (sweep.path / "launch" / "journal.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "submitting"]


def scripts(sweep):
    """What sbatch was given, in the order of the jobs, whose numbers have one digit at first."""
    files = (sweep.path / "launch" / "jobs").glob("*_submission.sh")
    return [file.read_text() for file in sorted(files, key=lambda file: int(file.name.partition("_")[0]))]


@pytest.mark.slow
def test_the_expected_results_matrix_in_one_array(slurm, tmp_path):
    conf = tmp_path / "conf" / "sweep"
    conf.mkdir(parents=True)
    declared = (Path(__file__).parents[2] / "conf" / "sweep" / "expected_results.yaml").read_text()
    small = (CONF / "sweep" / "tiny.yaml").read_text().partition("overrides:")[2]
    (conf / "matrix.yaml").write_text(declared.partition("overrides:")[0] + "overrides:" + small)
    words = ("sweep=matrix", "seeds=2", "trainer.max_steps=2", f"output_dir={tmp_path}", *SMALL, *_TRAINER)
    sweep = Sweep(*words, config_dir=tmp_path / "conf")
    told = sweep.submit()
    assert "24 runs, 2 seeds (0, 1)" in told.out
    assert [len(row["batches"]) for row in submissions(sweep)] == [24]
    assert "#SBATCH --array=0-23%3" in scripts(sweep)[0]
    sweep.wait_done(420)
    assert slurm.accounted(sweep.state("none").job.partition("_")[0]) == {"COMPLETED|0:0"}
    summaries = [json.loads(sweep.directory.run(run).summary_file.read_text()) for run in sweep.runs()]
    assert {(each["arm"], each["seed"]) for each in summaries} == {(run.arm, run.seed) for run in sweep.runs()}
    assert all(each["validation_loss"] > 0 for each in summaries)


def test_a_sweep_larger_than_an_array_is_split(slurm, sweep_on):
    held = "cluster.additional_parameters={hold: true}"
    sweep = sweep_on("seeds=9", held, "cluster.throttle=8", behaviour={})
    sweep.submit()
    assert [len(row["batches"]) for row in submissions(sweep)] == [25, 2]
    assert [re.search(r"--array=(\S+)", text)[1] for text in scripts(sweep)] == ["0-24%7", "0-1%1"]
    sweep.wait(lambda counts: counts == {"held": 27})
    assert "27 runs cancelled" in launch("cancel", str(sweep.path)).out


def test_several_runs_in_one_job_go_on_after_each_fault(slurm, sweep_on):
    behaviour = {"raise_at": {"baseline-kv-seed1": 2}, "step_s": 0.1}
    sweep = sweep_on("cluster.runs_per_job=3", "cluster.hold_arm=false", "trainer.max_steps=40", behaviour=behaviour)
    sweep.submit()
    assert [row["batches"] for row in submissions(sweep)] == [
        [[run.id for run in sweep.runs()[:3]], [run.id for run in sweep.runs()[3:]]]
    ]
    sweep.wait_step("baseline-kv-seed0", 3)
    slurm.ask_to_leave(sweep.state("baseline-kv-seed0").job)
    counts = sweep.wait(lambda counts: counts == {"done": 5, "failed": 1}, 90)
    assert counts == {"done": 5, "failed": 1}
    assert sweep.starts("baseline-kv-seed0") == 2
    assert sweep.starts("baseline-kv-seed1") == 1
    assert slurm.accounted(sweep.state("baseline-kv-seed1").job) == {"FAILED|1:0"}


def test_prepare_comes_first_the_report_last_and_resources_are_per_arm(slurm, sweep_on, tmp_path):
    conf = tmp_path / "conf" / "sweep"
    conf.mkdir(parents=True)
    text = (CONF / "sweep" / "tiny.yaml").read_text()
    (conf / "tiny.yaml").write_text(
        text.replace("experiment: none}", "experiment: none, resources: {gpus_per_node: 2}}")
    )
    mark = tmp_path / "prepared"
    words = (f"cluster.prepare=sleep 1; touch {mark}", "cluster.report=true", "cluster.gpus_per_node=1")
    sweep = sweep_on("seeds=1", *words, behaviour={}, config_dir=tmp_path / "conf")
    sweep.submit()
    assert sweep.counts() == {"pending": 3}
    sweep.wait_done(90)
    assert mark.exists()
    asked = {re.search(r"--gpus-per-node=(\d)", each)[1]: each for each in scripts(sweep) if "--gpus-per-node" in each}
    assert set(asked) == {"1", "2"}
    assert all("--dependency=afterok:" in each for each in asked.values())
    assert sum("--dependency=afterany:" in each for each in scripts(sweep)) == 1
    printed = (sweep.path / "logs" / f"{sweep.id_of('none')}.log").read_text()
    assert printed.endswith(" on 0,1\n"), "both GPUs of a node"


def test_a_run_over_two_nodes_knows_its_ranks(slurm, sweep_on):
    sweep = sweep_on("seeds=1", "cluster.nodes=2", "cluster.tasks_per_node=2", behaviour={"ranks": True})
    sweep.submit()
    sweep.wait_done(90)
    ranks = (sweep.path / "runs" / sweep.id_of("baseline") / "ranks.txt").read_text().split()
    assert sorted(ranks) == ["0/4@0", "1/4@1", "2/4@0", "3/4@1"]


def test_the_canary_goes_first(slurm, sweep_on):
    sweep = sweep_on("seeds=1", behaviour={"raise_at": {"baseline": 2}})
    sweep.submit("--canary")
    counts = sweep.wait(lambda counts: counts == {"failed": 1, "held": 2}, 60)
    assert counts == {"failed": 1, "held": 2}
    sweep.behave({})
    assert launch("resume", str(sweep.path)).code == 0
    sweep.wait_done(60)
