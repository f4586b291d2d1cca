"""Figures of launch on a real Slurm: `python -m tests.benchmarks.bench_launch [RUNS]`, 1000 by default.

Prints one JSON object: seconds until the last sbatch returned, for launch and for the Hydra submitit plugin with the same
runs on the same Slurm, where all jobs are held so that none of them takes part; seconds of status; seconds of --help.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.real_slurm import RealSlurm

LAUNCH = [sys.executable, "-m", "launch"]
ARMS = "baseline,v4_0_1,v4_0_2,v4_0_3"


def seconds(command: list[str]) -> tuple[float, str]:
    began = time.perf_counter()
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return time.perf_counter() - began, told.stdout


def by_launch(runs: int, folder: Path) -> tuple[float, str]:
    """Plan, check and submit; returns the seconds and the sweep's folder."""
    (folder / "conf" / "sweep").mkdir(parents=True)
    arms = "".join(f"  {arm}: {{experiment: {arm}}}\n" for arm in ARMS.split(","))
    head = f"name: bench\nbaseline: baseline\ncriteria: default\nlosses: [kv, kv+struct]\nseeds: {runs // 8}\n"
    (folder / "conf" / "sweep" / "bench.yaml").write_text(f"{head}arms:\n{arms}")
    small = ("cluster.mem_gb=0.5", "cluster.cpus_per_task=1", "cluster.additional_parameters={hold: true}")
    words = ["sweep=bench", "cluster=slurm", *small, f"output_dir={folder}", "--config-dir", str(folder / "conf")]
    took, printed = seconds([*LAUNCH, "submit", *words])
    found = re.search(r"^in (.*)$", printed, re.MULTILINE)
    assert found is not None
    return took, found[1]


def by_plugin(runs: int, folder: Path, slurm: RealSlurm) -> float:
    """The same runs by Hydra's submitit plugin; its driver waits for the jobs, so it is ended once they are queued."""
    words = [f"experiment={ARMS}", "loss=kv,kv+struct", f"seed=range({runs // 8})", "hydra/launcher=slurm"]
    words += ["hydra.launcher.mem_gb=1", "hydra.launcher.cpus_per_task=1", "hydra.launcher.name=plugin"]
    words += ["+hydra.launcher.additional_parameters.hold=true", f"hydra.sweep.dir={folder / 'plugin'}"]
    began = time.perf_counter()
    with (folder / "plugin.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "kv_align.train", "--multirun", *words], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while not slurm.out("squeue", "-h", "--name=plugin"):
                assert driver.poll() is None, (folder / "plugin.log").read_text()[-2000:]
                time.sleep(0.2)
            return time.perf_counter() - began
        finally:
            driver.kill()
            driver.wait()


def main(runs: int) -> None:
    slurm = RealSlurm()
    try:
        slurm.start()
        os.environ["SLURM_CONF"] = slurm.environment["SLURM_CONF"]
        with tempfile.TemporaryDirectory() as folder:
            launch_s, sweep = by_launch(runs, Path(folder))
            status_s = [seconds([*LAUNCH, "status", sweep])[0] for _ in range(5)]
            slurm.call("scancel", "--user=root")
            plugin_s = by_plugin(runs, Path(folder), slurm)
        help_s = [seconds([*LAUNCH, "--help"])[0] for _ in range(5)]
    finally:
        slurm.stop()
    figures = {
        "runs": runs // 8 * 8,
        "launch_submit_s": round(launch_s, 2),
        "plugin_submit_s": round(plugin_s, 2),
        "ratio": round(launch_s / plugin_s, 3),
        "status_s_median": round(statistics.median(status_s), 2),
        "help_s_median": round(statistics.median(help_s), 2),
        "load_average": round(os.getloadavg()[0], 1),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
