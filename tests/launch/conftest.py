"""A maker of sweeps whose runs the stand-in does, and which leaves no process behind."""

import importlib.util
import os
import sys

import pytest

from tests.launch.fake_slurm import FakeSlurm
from tests.launch.sweeps import STANDIN, Sweep, _composed_once  # noqa: F401 - a fixture for all tests


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """Make a sweep on this machine: `standin("seeds=1", behaviour={...})`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STANDIN), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = []

    def make(*settings, behaviour=None, **options):
        own = [] if any(each.startswith("cluster=") for each in settings) else ["cluster=local", "cluster.slots=2"]
        words = ["sweep=tiny", f"output_dir={tmp_path}", *own, *settings]
        sweep = Sweep(*words, behaviour={} if behaviour is None else behaviour, **options)
        made.append(sweep)
        return sweep

    yield make
    for sweep in made:
        sweep.end()


@pytest.fixture
def standin_here(monkeypatch):
    """Have the stand-in do the runs that are done in this process."""
    specification = importlib.util.spec_from_file_location("standin_experiment", STANDIN / "standin_experiment.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "kv_align.experiment.experiment", module)


@pytest.fixture
def done(standin, standin_here):
    """Make a sweep whose runs the stand-in did in this process: `done("seeds=1")`."""

    def make(*settings, behaviour=None):
        sweep = standin("cluster=debug", *settings, behaviour=behaviour)
        sweep.submit()
        return sweep

    return make


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Slurm's commands as scripts that answer what the test tells them."""
    slurm = FakeSlurm(tmp_path / "fake_slurm")
    monkeypatch.setenv("PATH", f"{slurm.folder}:{os.environ['PATH']}")
    # Importing the packages after cluster.setup takes a second, and is tested on a real Slurm.
    monkeypatch.setattr("launch.executors.slurm.executor.SlurmExecutor._check_interpreter", lambda executor: None)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return slurm


@pytest.fixture
def queued(fake_slurm, standin):
    """Make a sweep of three runs that is submitted as array 77 of a Slurm that only answers what it is told."""

    def make(*settings, behaviour=None):
        own = ("cluster=slurm", "cluster.require_gpu=false", "cluster.stale_after_s=5", "seeds=1")
        sweep = standin(*own, *settings, behaviour=behaviour)
        sweep.submit()
        return sweep

    return make
