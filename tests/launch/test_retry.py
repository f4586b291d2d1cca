"""What ended an attempt, by exit code and status file, and whether another one follows."""

import pytest

from kv_align.runs import Status
from launch.cluster import RetryPolicy
from launch.retry import cause_of, given_up, may_retry, vanished

POLICY = RetryPolicy(interrupted=9, node_failure=3, killed=2, out_of_memory=1, code_error=0, diverged=0)


def failed(reason):
    return Status("failed", reason, "a", "kv", 0, "h", 1, 6, 1, 0.0, 0.0, "host", 1, "")


@pytest.mark.parametrize(
    ("code", "status", "cause"),
    [
        (0, None, "finished"),
        (75, None, "interrupted"),
        (3, None, "diverged"),
        (2, None, "bad_input"),
        (1, failed("out of memory: CUDA"), "out_of_memory"),
        (1, failed("ValueError: out of memory: no"), "code_error"),
        (1, None, "code_error"),
        (-9, None, "killed"),
        (137, None, "killed"),
        (143, None, "interrupted"),
        (140, None, "interrupted"),
        (-11, None, "code_error"),
        (139, failed("out of memory: old"), "out_of_memory"),
    ],
)
def test_causes(code, status, cause):
    assert cause_of(code, status) == cause


def test_the_policy_is_spent_by_cause_and_since_the_submission():
    ends = [
        {"event": "end", "time": time, "cause": cause, "retry": True} for time, cause in ((1, "killed"), (5, "killed"))
    ]
    assert may_retry("killed", ends, since=0.0, policy=POLICY) is False
    assert may_retry("killed", ends, since=2.0, policy=POLICY) is True
    assert may_retry("interrupted", ends, since=0.0, policy=POLICY) is True
    assert may_retry("out_of_memory", ends, since=0.0, policy=POLICY) is True
    assert may_retry("code_error", [], since=0.0, policy=POLICY) is False
    assert may_retry("bad_input", [], since=0.0, policy=POLICY) is False


def test_given_up_and_vanished():
    start, end = {"event": "start", "time": 3}, {"event": "end", "time": 4, "cause": "killed", "retry": False}
    assert given_up([start, end], 0.0)
    assert not given_up([start, end], 4.5), "a submission after it starts anew"
    assert not given_up([start, {**end, "cause": "finished"}], 0.0)
    assert not given_up([start, {**end, "retry": True}], 0.0)
    assert vanished([end, {**start, "time": 5}], 0.0)
    assert not vanished([start, {"event": "note", "time": 3.5}, end], 0.0)
    assert not vanished([start], 3.5)
