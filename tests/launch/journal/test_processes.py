"""What a machine has, by what its environment says."""

import pytest

from launch.executors.local.schema import slots_of
from launch.executors.registry import load_cluster
from launch.journal.processes import visible_gpus


@pytest.mark.parametrize(
    ("declared", "gpus"),
    [
        ("0", ["0"]),
        ("3, 5", ["3", "5"]),
        ("0,1,", ["0", "1"]),
        ("GPU-8932f937-d72c,MIG-GPU-8932f937/1/0", ["GPU-8932f937-d72c", "MIG-GPU-8932f937/1/0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("none", []),
        ("0,-1,1", ["0"]),
        ("-1,0", []),
    ],
)
def test_gpus_that_cuda_shows(monkeypatch, declared, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", declared)
    assert visible_gpus() == gpus


def test_no_gpu_leaves_the_slots_to_the_cores(monkeypatch):
    monkeypatch.setattr("launch.executors.local.schema.cores", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    cluster = load_cluster("local", {"slots": None, "threads_per_run": 2})
    assert slots_of(cluster, len(visible_gpus())) == 3
