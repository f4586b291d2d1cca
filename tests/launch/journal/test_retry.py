"""What ended an attempt, by exit code and status file, and whether another one follows."""

import pytest

from kv_align.runs.run_dir import Status
from launch.cluster.schema import RetryPolicy
from launch.journal.retry import DISK_FULL, NODE_FAILURE, cause_of, delay_s, given_up, may_retry, vanished

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
        (NODE_FAILURE, None, "node_failure"),
        (1, failed("OSError: [Errno 28] No space left on device: 'metrics.jsonl'"), "disk_full"),
        (1, failed("OSError: [Errno 122] Disk quota exceeded"), "disk_full"),
        (DISK_FULL, None, "disk_full"),
        (1, failed("OSError: [Errno 5] Input/output error"), "node_failure"),
        (1, failed("OSError: [Errno 116] Stale file handle"), "node_failure"),
        (1, failed("SafetensorError: I/O error: No space left on device (os error 28)"), "disk_full"),
        (1, failed("AcceleratorError: CUDA error: uncorrectable ECC error encountered"), "node_failure"),
        (1, failed("DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3384"), "node_failure"),
        (1, failed("RuntimeError: No CUDA GPUs are available"), "node_failure"),
        (1, failed("OSError: [Errno 30] Read-only file system: 'status.json'"), "node_failure"),
        (1, failed("OSError: [Errno 107] Transport endpoint is not connected"), "node_failure"),
        (1, failed("TimeoutError: [Errno 110] Connection timed out"), "node_failure"),
        (
            1,
            failed("RuntimeError: The server socket has failed to listen (errno: 98 - Address already in use)."),
            "node_failure",
        ),
        (1, failed("DistNetworkError: failed to recv, got 0 bytes: connection was closed by peer"), "node_failure"),
        (1, failed("RuntimeError: [Gloo] Connection closed by peer [127.0.0.1]:4321"), "node_failure"),
        (1, failed("ConnectionResetError: [Errno 104] Connection reset by peer"), "node_failure"),
        (1, failed("FileNotFoundError: [Errno 2] No such file or directory: 'x'"), "code_error"),
        (1, failed("RuntimeError: CUDA error: device-side assert triggered"), "code_error"),
        (1, failed("OSError: [Errno 22] Invalid argument"), "code_error"),
    ],
)
def test_causes(code, status, cause):
    assert cause_of(code, status) == cause


def test_the_policy_is_spent_by_cause():
    ends = [{"event": "end", "time": 9, "cause": "killed", "retry": True} for _ in range(2)]
    assert may_retry("killed", ends, POLICY) is False
    assert may_retry("killed", ends[1:], POLICY) is True
    assert may_retry("interrupted", ends, POLICY) is True
    assert may_retry("out_of_memory", ends, POLICY) is True
    assert may_retry("code_error", [], POLICY) is False
    assert may_retry("bad_input", [], POLICY) is False


def test_a_run_that_gets_on_has_not_spent_its_node_failures():
    ends = [{"event": "end", "cause": "node_failure", "retry": True, "step": step} for step in (10, 10, 10)]
    assert may_retry("node_failure", ends, POLICY, step=10) is False
    assert may_retry("node_failure", ends, POLICY, step=20) is True
    kills = [{**each, "cause": "killed"} for each in ends]
    assert may_retry("killed", kills, POLICY, step=20) is False


def test_a_full_disk_spends_nothing_and_broken_nodes_are_given_longer_each_time():
    ends = [{"event": "end", "cause": "node_failure", "retry": True, "step": 3} for _ in range(2)]
    policy = POLICY.model_copy(update={"backoff_s": 10.0, "pause_s": 7.0})
    assert may_retry("disk_full", [{**end, "cause": "disk_full"} for end in ends * 99], policy)
    assert [delay_s("node_failure", ends[:number], policy) for number in range(3)] == [10.0, 20.0, 40.0]
    assert delay_s("node_failure", ends * 20, policy) == 1800.0
    assert (delay_s("disk_full", ends, policy), delay_s("interrupted", ends, policy)) == (7.0, 0.0)


def test_given_up_and_vanished():
    start, end = {"event": "start", "time": 3}, {"event": "end", "time": 4, "cause": "killed", "retry": False}
    assert given_up([start, end])
    assert not given_up([start])
    assert not given_up([start, {**end, "cause": "finished"}])
    assert not given_up([start, {**end, "retry": True}])
    assert vanished([end, {**start, "time": 1}]), "the order of the rows counts, and no clock"
    assert not vanished([start, {"event": "note", "time": 3.5}, end])
    assert not vanished([])
