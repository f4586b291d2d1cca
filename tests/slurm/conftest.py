"""One real Slurm for the whole session; left out, with a line that says so, where its packages are missing."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch.sweeps import STANDIN, Sweep, _composed_once  # noqa: F401 - a fixture for all tests
from tests.slurm.real_slurm import RealSlurm, missing

_ADVICE = "make slurm installs what is missing; KV_ALIGN_REQUIRE_SLURM=1 makes this an error"
SMALL = (
    "cluster=slurm",
    "cluster.mem_gb=0.4",
    "cluster.cpus_per_task=1",
    "cluster.time_min=10",
    "cluster.throttle=4",
    "cluster.stale_after_s=5",
    "cluster.require_gpu=false",
    "cluster.retry.backoff_s=1",
    "cluster.retry.pause_s=2",
)


def _required() -> bool:
    return os.environ.get("KV_ALIGN_REQUIRE_SLURM", "") == "1"


def pytest_collection_modifyitems(items):
    if not missing() or _required():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no Slurm here"))


def pytest_terminal_summary(terminalreporter):
    left_out = [each for each in terminalreporter.stats.get("skipped", ()) if "no Slurm here" in str(each.longrepr)]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} tests left out: {', '.join(missing())} not found; {_ADVICE}")


@pytest.fixture(scope="session")
def slurm():
    """A running cluster of two nodes; its clients work in this process."""
    absent = missing()
    assert not absent, f"KV_ALIGN_REQUIRE_SLURM=1, but {', '.join(absent)} not found: {_ADVICE}"
    cluster = RealSlurm(max_array=25)
    before = dict(os.environ)
    try:
        cluster.start()
        os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        yield cluster
    finally:
        os.environ.clear()
        os.environ.update(before)
        cluster.stop()


@pytest.fixture(autouse=True)
def _empty_afterwards(slurm):
    """Every test finds an empty cluster: what the one before it left in Slurm is cancelled and waited for."""
    yield
    slurm.call("scancel", "--user=root", "--full")
    slurm.settle()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 GB; None where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3g", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def sweep_on(tmp_path, monkeypatch):
    """Make a sweep on the cluster: `sweep_on("seeds=1", behaviour={...})`; without behaviour the trainer does it."""

    def make(*settings, behaviour=None, small=True, **options):
        if behaviour is not None:
            monkeypatch.setenv("PYTHONPATH", str(STANDIN))
        own = SMALL if small else ()
        return Sweep("sweep=tiny", f"output_dir={tmp_path}", *own, *settings, behaviour=behaviour, **options)

    return make
