"""What Slurm prints, read."""

import pytest

from launch.executors.slurm_query import as_job_state, expand, minutes


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
