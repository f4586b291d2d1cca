"""What Slurm prints, read."""

import pytest

from kv_align.config.schema import validate
from launch.cluster.setting import Setting
from launch.executors.base import JobState
from launch.executors.registry import load_cluster
from launch.executors.slurm import query as slurm_query
from launch.executors.slurm.jobs import JobMaker, script_of
from launch.executors.slurm.query import (
    ArrayLeft,
    arrays_left,
    as_job_state,
    call,
    expand,
    job_states,
    outside_of_jobs,
)
from launch.executors.slurm.schema import SlurmCluster
from launch.executors.slurm.site import default_partition, minutes


@pytest.mark.parametrize(
    ("job", "elements"),
    [("12", ["12"]), ("12_3", ["12_3"]), ("12_[0-2,5%4]", ["12_0", "12_1", "12_2", "12_5"]), ("9_[7]", ["9_7"])],
)
def test_expand(job, elements):
    assert expand(job) == elements


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("30", 30.0),
        ("10:00", 10.0),
        ("1:30:00", 90.0),
        ("2-00:00:00", 2880.0),
        ("1-12", 2160.0),
        ("infinite", float("inf")),
    ],
)
def test_minutes(limit, value):
    assert minutes(limit) == value


@pytest.mark.parametrize(
    ("word", "reason", "phase", "said"),
    [
        ("PENDING", "Priority", "pending", ""),
        (
            "PENDING",
            "QOSMaxCpuPerUserLimit",
            "pending",
            "waits for a limit of its account or QOS (QOSMaxCpuPerUserLimit)",
        ),
        ("RUNNING", "None", "running", ""),
        ("REQUEUED", "BeginTime", "pending", "its job was requeued"),
        ("COMPLETING", "None", "running", "its job is ending"),
        ("CANCELLED", "None", "ended", "its job was cancelled in Slurm"),
        ("OUT_OF_MEMORY", "None", "ended", "out of memory"),
        ("FAILED", "NonZeroExitCode", "ended", ""),
        ("REVOKED", "None", "ended", "revoked"),
    ],
)
def test_states(word, reason, phase, said):
    state = as_job_state(word, reason)
    assert (state.phase, state.reason) == (phase, said)


@pytest.mark.parametrize(
    ("live", "phase", "said"),
    [
        ("7_1|PENDING|BeginTime\n", "pending", "its job was requeued"),
        ("7_1|COMPLETING|None\n", "pending", "its job was requeued"),
        ("7_1|CANCELLED|None\n", "pending", "its job was requeued"),
        ("", "gone", "accounting says that its job was requeued, but Slurm no longer knows that job"),
    ],
)
def test_a_job_that_accounting_calls_requeued_is_asked_about(monkeypatch, live, phase, said):
    printed = {"sacct": "7_0|RUNNING|None\n7_1|REQUEUED|BeginTime\n7_2|REQUEUED|None\n", "squeue": live}
    monkeypatch.setattr(slurm_query, "ask", lambda *command, timeout_s: printed[command[0]])
    assert job_states(["7_0", "7_1"], accounting=True) == {
        "7_0": JobState("running", ""),
        "7_1": JobState(phase, said),
        "7_2": JobState("pending", "its job was requeued"),  # of which nothing was asked
    }


@pytest.mark.parametrize(
    ("reason", "phase", "words"),
    [
        ("Resources", "pending", ""),
        ("JobArrayTaskLimit", "pending", ""),
        ("JobHeldUser", "held", "held in Slurm by its owner: scontrol release it"),
        ("JobHeldAdmin", "held", "held in Slurm by an administrator: ask for its release"),
        ("launch failed requeued held", "held", "its node could not start it"),
        ("DependencyNeverSatisfied", "blocked", "a job that must succeed first did not"),
        ("BadConstraints", "blocked", "no node has what it asks for"),
        ("PartitionTimeLimit", "blocked", "its partition allows less than it asks for"),
        ("AssocMaxWallDurationPerJobLimit", "blocked", "allows a job less than it asks for"),
        ("QOSMaxNodePerJobLimit", "blocked", "allows a job less than it asks for"),
        ("InvalidQOS", "blocked", "can never start with its account, QOS or reservation"),
        ("Dependency", "pending", "waits for the jobs that come before it"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "pending", "waits for nodes that are down, drained or reserved"),
        ("AssocGrpCpuLimit", "pending", "waits for a limit of its account or QOS"),
        ("SomethingNew", "pending", "SomethingNew"),
    ],
)
def test_why_a_job_waits_is_asked_of_squeue_and_said_in_words(monkeypatch, reason, phase, words):
    printed = {"sacct": "7_0|PENDING|None\n7_1|PENDING|None\n", "squeue": f"7_0|PENDING|{reason}\n"}
    monkeypatch.setattr(slurm_query, "ask", lambda *command, timeout_s: printed[command[0]])
    state = job_states(["7_0", "7_1"], accounting=True)
    assert state["7_0"].phase == phase
    assert words in state["7_0"].reason
    assert not words or reason in state["7_0"].reason
    assert state["7_1"].phase == "gone", "what squeue does not know never starts"


def test_a_job_that_was_requeued_and_is_held_is_held(monkeypatch):
    printed = {"sacct": "7|REQUEUED|None\n", "squeue": "7|PENDING|launch failed requeued held\n"}
    monkeypatch.setattr(slurm_query, "ask", lambda *command, timeout_s: printed[command[0]])
    assert job_states(["7"], accounting=True)["7"].phase == "held"


def test_a_job_that_ends_only_to_come_back_is_not_taken_for_one_that_leaves(monkeypatch):
    printed = {"sacct": "7|PENDING|None\n", "squeue": "7|COMPLETING|None\n"}
    monkeypatch.setattr(slurm_query, "ask", lambda *command, timeout_s: printed[command[0]])
    assert job_states(["7"], accounting=True)["7"] == JobState("pending", "its job was requeued")


def test_what_a_job_tells_its_processes_is_not_told_to_the_jobs_that_they_submit():
    inherited = {
        "SLURM_MEM_PER_CPU": "1000",
        "SLURM_JOB_ID": "7",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_QOS": "long",
    }
    assert outside_of_jobs(inherited) == {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_QOS": "long"}


def test_what_a_site_says_in_another_encoding_is_read_all_the_same():
    told = call("bash", "-c", r"printf 'M\374ller\n'; printf 'Grave \350\n' >&2")
    assert (told.stdout, told.stderr) == ("M\ufffdller\n", "Grave \ufffd\n")


SITE = {
    "SBATCH_ACCOUNT": "site",
    "SBATCH_PARTITION": "long",
    "SBATCH_QOS": "site",
    "SBATCH_WCKEY": "site",
    "HOME": "/root",
}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, set(SITE)),
        ({"account": "mine"}, set(SITE) - {"SBATCH_ACCOUNT"}),
        ({"partition": "low", "qos": "mine"}, {"SBATCH_ACCOUNT", "SBATCH_WCKEY", "HOME"}),
        ({"additional_parameters": {"wckey": "mine", "account": "mine"}}, {"SBATCH_PARTITION", "SBATCH_QOS", "HOME"}),
    ],
)
def test_what_the_cluster_states_is_not_overruled_by_the_environment_and_what_it_leaves_open_is(
    settings, kept, tmp_path
):
    cluster = validate(SlurmCluster, load_cluster("slurm", settings).model_dump())
    jobs = JobMaker(Setting(cluster, {}, accounting=False, code=str(tmp_path)), cluster, tmp_path)
    script = script_of(jobs.executor(jobs.resources(), "kv-align-test"))
    assert set(outside_of_jobs(SITE, script)) == kept
    assert outside_of_jobs(SITE) == SITE, "nothing is stated where nothing is submitted"


@pytest.mark.parametrize("gpus", [0, 1])
def test_what_every_job_states_is_never_overruled(gpus, tmp_path):
    cluster = validate(SlurmCluster, load_cluster("slurm", {"gpus_per_node": gpus}).model_dump())
    jobs = JobMaker(Setting(cluster, {}, accounting=False, code=str(tmp_path)), cluster, tmp_path)
    script = script_of(jobs.executor(jobs.resources(), "kv-align-test"))
    names = (
        "TIMELIMIT JOB_NAME MEM_PER_NODE MEM_PER_CPU GPUS GPUS_PER_NODE GPUS_PER_TASK CPUS_PER_GPU NO_REQUEUE REQUEUE"
    )
    names += " OUTPUT ERROR OPEN_MODE SIGNAL ARRAY_INX"
    site = {f"SBATCH_{name}": "1" for name in names.split()}
    assert outside_of_jobs({**site, "SBATCH_GRES": "gpu:4"}, script) == {}
    assert outside_of_jobs({**site, "SBATCH_GRES": "lscratch:10"}, script) == {"SBATCH_GRES": "lscratch:10"}


def test_jobs_that_name_no_partition_go_where_the_environment_says(monkeypatch):
    monkeypatch.setattr("launch.executors.slurm.site.ask", lambda *command: "low*\nhigh\n")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    assert default_partition() == "low"
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    assert default_partition() == "high"


def test_what_is_left_of_arrays_stands_in_the_order_in_which_they_were_queued(monkeypatch):
    monkeypatch.setattr(slurm_query, "ask", lambda *command: "100|100_0|RUNNING\n99|99_0|PENDING\n99|99_1|RUNNING\n")
    left = arrays_left({"100", "99", "98"})
    assert list(left.items()) == [("99", ArrayLeft(2, ("99_1",))), ("100", ArrayLeft(1, ("100_0",)))]
