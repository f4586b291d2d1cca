"""Which code runs is frozen: another checkout, an edit, or code that is gone changes nothing without a word."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.status.overview import overview
from tests.launch.sweeps import STANDIN, launch, undisturbed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A second checkout of the packages."""
    for name in ("kv_align", "launch", "analysis", "conf"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "checkout"


@pytest.fixture
def closed(slurm):
    """Nothing starts until it is opened."""
    slurm.call("scontrol", "update", "partition=low", "state=down")

    def reopen():
        slurm.call("scontrol", "update", "partition=low", "state=up")

    yield reopen
    reopen()


def launch_from(checkout, *words):
    path = os.pathsep.join([str(STANDIN), str(checkout)])
    environment = dict(os.environ, PYTHONPATH=path)
    command = [sys.executable, "-P", "-m", "launch", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def done_as_undisturbed(sweep):
    sweep.wait_done(120)
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}


def test_submitting_from_another_checkout_changes_nothing_without_a_word(slurm, sweep_on, checkout):
    sweep = sweep_on("seeds=1", behaviour={})
    sweep.submit()
    frozen = (sweep.path / "launch" / "cluster.json").read_text()
    told = launch_from(checkout, *sweep.words, "cluster.mem_gb=0.5")
    assert told.returncode == 0, told.stderr
    assert f"note: its jobs run the code in {ROOT}, as it was submitted, and not that in {checkout}" in told.stdout
    assert "note: cluster.mem_gb stays 0.4, as it was when the sweep was submitted" in told.stdout
    assert (sweep.path / "launch" / "cluster.json").read_text() == frozen
    told = launch_from(checkout, "resume", str(sweep.path))
    assert json.loads((sweep.path / "launch" / "cluster.json").read_text())["code"] == str(ROOT)
    assert f"not that in {checkout}" in told.stdout
    done_as_undisturbed(sweep)


def test_a_worker_refuses_code_that_changed_until_somebody_resumes_with_it(slurm, sweep_on, checkout, closed):
    sweep = sweep_on("seeds=1", behaviour={})
    assert launch_from(checkout, *sweep.words).returncode == 0
    edited = checkout / "kv_align" / "losses" / "functional.py"
    edited.write_text(edited.read_text() + "# edited\n")
    closed()
    sweep.wait(lambda counts: counts == {"failed": 3}, 60)
    said = f"kv_align/losses/functional.py of {checkout} changed since the sweep was submitted"
    slurm.until("its log says why", lambda: sweep.state("none").reason.startswith(said))
    reason = sweep.state("none").reason
    assert "run resume, which takes the code as it is then" in reason
    told = launch_from(checkout, "resume", str(sweep.path))
    assert "note: kv_align/losses/functional.py changed since the sweep was submitted" in told.stdout, told.stderr
    done_as_undisturbed(sweep)


def test_a_checkout_that_is_gone_is_named_and_resume_takes_another(slurm, sweep_on, checkout, closed):
    sweep = sweep_on("seeds=1", behaviour={})
    assert launch_from(checkout, *sweep.words).returncode == 0
    shutil.rmtree(checkout)
    closed()
    sweep.wait(lambda counts: counts == {"failed": 3}, 60)
    said = f"its job ended before it could start: the code in {checkout} is gone"
    # Slurm may know of the end a moment before the job's log is there.
    slurm.until("its log says why", lambda: sweep.state("none").reason == said)
    assert f"the code that its jobs run is not in {checkout} any more" in overview(sweep.directory).notes[0]
    assert launch("logs", str(sweep.path), "none").out.endswith(f"the code in {checkout} is gone\n")
    told = launch("resume", str(sweep.path))
    assert f"note: the code in {checkout} is gone: jobs run that in {ROOT} from now on" in told.out, told.err
    done_as_undisturbed(sweep)


def test_an_interpreter_that_is_gone_is_named(slurm, sweep_on, tmp_path, closed):
    link = tmp_path / "python"
    link.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would lose the environment's packages
    link.chmod(0o755)
    sweep = sweep_on("seeds=1", f"cluster.python={link}", behaviour={})
    sweep.submit()
    link.unlink()
    closed()
    sweep.wait(lambda counts: counts == {"failed": 3}, 60)
    slurm.until("its log says why", lambda: str(link) in sweep.state("none").reason)
    assert str(link) in launch("logs", str(sweep.path), "none").out
    told = launch("resume", str(sweep.path))
    assert told.code == 2, "nothing is queued that could not start"
    assert launch("resume", str(sweep.path), "cluster.python=null").code == 0
    done_as_undisturbed(sweep)


def test_a_sweep_that_was_moved_says_so_and_is_queued_anew_where_it_is(slurm, sweep_on, tmp_path, closed):
    sweep = sweep_on("seeds=1", behaviour={})
    sweep.submit()
    moved = tmp_path / "moved"
    shutil.move(sweep.path, moved)
    closed()
    slurm.settle()
    shown = json.loads(launch("status", str(moved), "--json").out)
    assert shown["notes"][0].startswith(
        f"the sweep was moved from {sweep.path}, where the jobs that were queued before"
    )
    assert not {"done", "pending", "running"} & set(shown["counts"])
    assert launch("resume", str(moved)).code == 0
    sweep.directory = type(sweep.directory)(moved)
    sweep.path = moved
    done_as_undisturbed(sweep)
    assert overview(sweep.directory).notes == ()
