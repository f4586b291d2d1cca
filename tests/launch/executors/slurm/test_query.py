"""What Slurm prints, read."""

import pytest

from launch.executors.base import JobState
from launch.executors.slurm import query as slurm_query
from launch.executors.slurm.query import as_job_state, expand, job_states, minutes


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
        ("PENDING", "QOSMaxCpuPerUserLimit", "pending", "QOSMaxCpuPerUserLimit"),
        ("PENDING", "JobHeldUser", "held", "held in Slurm: JobHeldUser"),
        ("PENDING", "DependencyNeverSatisfied", "held", "held in Slurm: DependencyNeverSatisfied"),
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
    monkeypatch.setattr(slurm_query, "ask", lambda *command: printed[command[0]])
    assert job_states(["7_0", "7_1"], accounting=True) == {
        "7_0": JobState("running", ""),
        "7_1": JobState(phase, said),
        "7_2": JobState("pending", "its job was requeued"),  # of which nothing was asked
    }
