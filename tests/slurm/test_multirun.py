"""The plain Hydra way on a real Slurm: its launcher preset, and its outputs as status and logs read them."""

import json
import os
import subprocess
import sys

import yaml

from tests.launch.sweeps import CONF, launch


def test_a_plain_multirun_is_read_by_status_and_logs(slurm, tmp_path):
    small = yaml.safe_load((CONF / "sweep" / "tiny.yaml").read_text())["overrides"]
    resources = [f"hydra.launcher.{each}" for each in ("mem_gb=2", "cpus_per_task=1", "gpus_per_node=1")]
    words = ["experiment=baseline,v4_0_2", "loss=kv", "seed=0", "hydra/launcher=slurm", *resources, *small]
    command = [sys.executable, "-m", "kv_align.train", "--multirun", *words, f"hydra.sweep.dir={tmp_path / 'plain'}"]
    told = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    shown = json.loads(launch("status", str(tmp_path / "plain"), "--json").out)
    assert (shown["planned"], shown["counts"]) == (False, {"done": 2})
    assert {run["arm"] for run in shown["runs"]} == {"baseline", "v4_0_2"}
    assert all(run["job"] for run in shown["runs"])
    assert launch("logs", str(tmp_path / "plain"), "0").code == 0
    assert "has no frozen plan" in launch("resume", str(tmp_path / "plain")).err
