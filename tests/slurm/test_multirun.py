"""The plain Hydra way on a real Slurm: its launcher preset, and its outputs as status and logs read them."""

import json
import os
import subprocess
import sys
import time

import yaml

from tests.launch.sweeps import CONF, PATIENCE, launch


def _multirun(sweep, *words, after=()):
    small = yaml.safe_load((CONF / "sweep" / "tiny.yaml").read_text())["overrides"]
    resources = [f"hydra.launcher.{each}" for each in ("mem_gb=2", "cpus_per_task=1", "gpus_per_node=1")]
    more = ["loss=kv", "seed=0", "hydra/launcher=slurm", *resources, *small, f"hydra.sweep.dir={sweep}", *after]
    return [sys.executable, "-m", "kv_align.train", "--multirun", *words, *more]


def test_a_plain_multirun_is_read_by_status_and_logs(slurm, tmp_path):
    command = _multirun(tmp_path / "plain", "experiment=baseline,v4_0_2")
    told = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    shown = json.loads(launch("status", str(tmp_path / "plain"), "--json").out)
    assert (shown["planned"], shown["counts"]) == (False, {"done": 2})
    assert {run["arm"] for run in shown["runs"]} == {"baseline", "v4_0_2"}
    assert all(run["job"] for run in shown["runs"])
    assert launch("logs", str(tmp_path / "plain"), "0").code == 0
    assert "has no frozen plan" in launch("resume", str(tmp_path / "plain")).err


def test_a_plain_run_before_its_time_limit_is_put_back_in_line_and_goes_on(slurm, tmp_path):
    # The driver waits for its jobs, so it is left alone until they are done.
    longer = ("trainer.max_steps=60", "trainer.checkpoint_interval=5")
    command = _multirun(tmp_path / "plain", "experiment=baseline,v4_0_2", after=longer)
    driver = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    status = tmp_path / "plain" / "0" / "status.json"
    deadline = time.monotonic() + 240 * PATIENCE
    while not status.exists() or json.loads(status.read_text())["step"] < 12:
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.stdout.read()[-2000:]
        time.sleep(0.05)
    job = json.loads(launch("status", str(tmp_path / "plain"), "--json").out)["runs"][0]["job"]
    slurm.ask_to_leave(job)
    printed, _ = driver.communicate(timeout=400 * PATIENCE)
    assert driver.returncode == 0, printed[-2000:]
    ended = json.loads(status.read_text())
    assert (ended["state"], ended["attempt"], ended["step"]) == ("finished", 2, 60)
