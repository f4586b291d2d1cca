"""A maker of sweeps whose runs the stand-in does, and which leaves no process behind."""

import os

import pytest

from tests.launch.sweeps import STANDIN, Sweep


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
