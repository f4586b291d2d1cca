"""What sbatch refuses: tested with the very options of the submission, and told in a sentence that names the right key."""

import json

import pytest

from launch.executors.base import SchedulerUnavailable
from launch.executors.registry import load_cluster
from launch.executors.slurm.errors import complaint
from tests.launch.sweeps import launch

POLICY = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
)
POLICY += "and/or time limits)"
SAID = [
    ("sbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission failed: Invalid partition name "
     "specified", "cluster.partition=None is not allowed"),
    ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
     "cluster.account=None is not allowed"),
    ("sbatch: error: Batch job submission failed: Invalid qos specification", "cluster.qos=None is not allowed"),
    (f"sbatch: error: AssocMaxSubmitJobLimit\n{POLICY}", "takes no more jobs of yours now: sbatch says: AssocMaxSubmit"),
    (POLICY, "takes no more jobs of yours now: sbatch says: Batch job submission failed: Job violates"),
    (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}", "cluster.time_min=240 is not allowed"),
    (f"sbatch: error: QOSMaxGRESPerJob\n{POLICY}", "cluster.gpus_per_node=1 is not allowed"),
    ("sbatch: error: Batch job submission failed: Invalid job array specification", "cluster.throttle=64 is not allowed"),
    ("sbatch: error: Memory specification can not be satisfied", "cluster.mem_gb=32.0, cluster.cpus_per_task=8"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), SAID)
def test_complaints(text, sentence):
    cluster = load_cluster("slurm", {})
    said = complaint(cluster, {}, text)
    assert sentence in str(said)
    assert not isinstance(said, SchedulerUnavailable)


@pytest.mark.parametrize("text", ["Socket timed out on send/recv operation", "Unable to contact slurm controller"])
def test_no_controller_is_no_refusal(text):
    said = complaint(load_cluster("slurm", {}), {}, f"sbatch: error: Batch job submission failed: {text}\n")
    assert isinstance(said, SchedulerUnavailable)


def test_every_array_is_tested_with_its_own_options_before_one_is_queued(fake_slurm, standin):
    fake_slurm.says("scontrol", "AccountingStorageType = accounting_storage/slurmdbd\nMaxArraySize = 2\n")
    more = ("cluster.partition=low,high", "cluster.additional_parameters={reservation: mine}", "cluster.throttle=4")
    sweep = standin("cluster=slurm", "seeds=1", *more, behaviour={})
    sweep.submit()
    calls = [line.split()[:2] for line in fake_slurm.calls("sbatch")]
    assert [each[1] == "--test-only" for each in calls] == [True, True, False, False]
    tested = (fake_slurm.folder / "tested").read_text()
    for option in ("--array=0-1%2", "--partition=low,high", "--reservation=mine", "--requeue", "--signal=USR2@90"):
        assert f"#SBATCH {option}\n" in tested
    assert tested.count("#SBATCH --array") == 1, "a single run is no array"


@pytest.mark.parametrize(("words", "seen"), [((), "site"), (("cluster.account=mine",), "unset")])
def test_sbatch_is_not_told_by_the_environment_what_the_script_says(fake_slurm, standin, monkeypatch, words, seen):
    monkeypatch.setenv("SBATCH_ACCOUNT", "site")
    standin("cluster=slurm", "seeds=1", *words, behaviour={}).submit()
    told = (fake_slurm.folder / "account").read_text().splitlines()
    assert [line for line in told if line.startswith("sbatch")] == [f"sbatch {seen}"] * 2, (
        "when tested, and when submitted"
    )


def test_partitions_that_do_not_exist_and_limits_of_several(fake_slurm, tmp_path):
    def submit(*words):
        return launch("submit", "sweep=demo", "cluster=slurm", f"output_dir={tmp_path}/out", *words).err

    assert "cluster.partition=low,gpu is not allowed: set cluster.partition to one of" in submit(
        "cluster.partition=low,gpu"
    )
    assert "at most 600, the limit of low." in submit("cluster.time_min=700", "cluster.partition=low")
    assert "at most 1440, the limit of low,high." in submit("cluster.time_min=2000", "cluster.partition='low,high'")
    assert not (tmp_path / "out").exists()


def test_a_job_has_to_run_longer_than_it_is_warned(tmp_path):
    words = ("submit", "sweep=demo", "cluster=slurm", "cluster.time_min=1", f"output_dir={tmp_path}")
    assert launch(*words).err == (
        "launch: cluster.signal_delay_s=90 is not allowed: set cluster.signal_delay_s to less than the 60 s of "
        "cluster.time_min=1.\n"
    )


def test_resume_changes_what_jobs_ask_for(queued, fake_slurm):
    from kv_align.runs.files import read_rows
    from launch.journal.journal import Journal
    from tests.launch.fake_slurm import age

    sweep = queued()
    age(sweep, 3600)
    fake_slurm.accepts(78)
    assert launch("resume", str(sweep.path), "--retry", "all", "cluster.mem_gb=64", "cluster.retry.killed=5").code == 0
    cluster = Journal(sweep.directory).setting().cluster
    assert (cluster.mem_gb, cluster.retry.killed, cluster.time_min) == (64.0, 5, 240)
    changed = [
        row["cluster"]
        for row in read_rows(sweep.path / "launch" / "journal.jsonl", "event")
        if row["event"] == "changed"
    ]
    assert changed == [{"mem_gb": 64, "retry.killed": 5}]
    script = next(file for file in (sweep.path / "launch" / "jobs").rglob("*.sh") if "65536M" in file.read_text())
    assert "#SBATCH --mem=65536M" in script.read_text()
    for word, sentence in (
        ("cluster.kind=local", "cluster.kind=local is not allowed: kind stays as it was"),
        ("cluster.memory=1", "cluster.memory is an unknown key"),
        ("cluster.mem_gb=-1", "cluster.mem_gb=-1 is not allowed"),
        ("trainer.lr=1", "trainer.lr=1 is not allowed: the plan is frozen"),
    ):
        told = launch("resume", str(sweep.path), word)
        assert (told.code, sentence in told.err) == (2, True), told.err


def test_what_resume_was_refused_changes_nothing(queued, fake_slurm):
    from launch.journal.journal import Journal
    from tests.launch.fake_slurm import age

    sweep = queued()
    age(sweep, 3600)
    before = [file.read_text() for file in sorted((sweep.path / "launch").glob("*.json*"))]
    (fake_slurm.folder / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: Memory specification' >&2; exit 1\n")
    told = launch("resume", str(sweep.path), "cluster.mem_gb=9000")
    assert (told.code, "cluster.mem_gb=9000" in told.err) == (2, True)
    assert launch("extend", str(sweep.path), "seeds=2").code == 2
    assert [file.read_text() for file in sorted((sweep.path / "launch").glob("*.json*"))] == before
    assert len(sweep.runs()) == 3
    assert Journal(sweep.directory).setting().accounting


def test_what_was_refused_is_frozen_anew_and_what_was_queued_is_not(fake_slurm, standin, tmp_path, monkeypatch):
    source, state = tmp_path / "checkout" / "kv_align" / "train.py", ["first", ""]
    source.parent.mkdir(parents=True)
    for module in ("launch.worker.code", "launch.commands"):
        monkeypatch.setattr(f"{module}.code_root", lambda: tmp_path / "checkout")
    monkeypatch.setattr("launch.planning.plan.git_state", lambda: tuple(state))
    known = {tmp_path / "checkout": state}
    monkeypatch.setattr("launch.worker.code.git_state", lambda root: tuple(known.get(root, ("", ""))))
    fake_slurm.refuses("sbatch: error: Batch job submission failed: Invalid qos specification\n")
    source.write_text("a = 1\n")
    sweep = standin("cluster=slurm", "seeds=1", "cluster.snapshot_code=true", behaviour={})
    assert launch(*sweep.words).code == 2

    def frozen():
        plan, code = sweep.directory.plan(), json.loads((sweep.path / "launch" / "code.json").read_text())
        copy = (sweep.path / "code" / "kv_align" / "train.py").read_text()
        tracker = plan.runs[0].config["trainer"]["tracker"]
        return copy, plan.git_commit, plan.git_diff, code["commit"], code["uncommitted"], tracker

    assert frozen() == ("a = 1\n", "first", "", "first", False, [])
    source.write_text("a = 2\n")
    state[:] = "second", "+a = 2"
    fake_slurm.accepts(78)
    assert launch(*sweep.words, "trainer.tracker=[tensorboard]").code == 0
    mended = ("a = 2\n", "second", "+a = 2", "second", True, ["tensorboard"])
    assert frozen() == mended
    source.write_text("a = 3\n")
    state[:] = "third", ""
    for words in (sweep.words, ("resume", str(sweep.path))):
        assert launch(*words).code == 0
        assert frozen() == mended


def test_what_a_cluster_refused_may_go_to_another(fake_slurm, standin, done):
    fake_slurm.refuses("sbatch: error: Batch job submission failed: Invalid qos specification\n")
    sweep = standin("cluster=slurm", "seeds=1", behaviour={})
    assert launch(*sweep.words).code == 2
    assert done("seeds=1").path == sweep.path
    assert sweep.counts() == {"done": 3}
