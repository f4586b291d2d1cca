"""Short runs one after the other in the two processes of one job: starting them costs more than all that they do.

`python -m tests.two_processes FOLDER RUNS` is called in each; RUNS is JSON, the overrides of each run by the name of its
folder below FOLDER. The run "disturbed" is asked to leave by a signal to the second process alone, and then done again.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from kv_align.experiment.experiment import run
from kv_align.runs.run_dir import RunDirectory, read_last_row
from tests.short_runs import short_config

DISTURBED = "disturbed"


def by_two(folder: Path, runs: Mapping[str, tuple[str, ...]]) -> str:
    """Do runs by two processes, as the tasks of a job would; returns what they wrote to standard error."""
    command = [sys.executable, "-m", "tests.two_processes", str(folder), json.dumps(runs)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command, env={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=1200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-4000:] for text in said)
    return "".join(said)


def _disturb(directory: RunDirectory, step: int) -> None:
    """Ask this process to leave when a step of the run has been logged."""
    row = None
    while row is None or row["step"] < step:
        time.sleep(0.01)
        row = read_last_row(directory.metrics_file) if directory.metrics_file.exists() else None
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    for name, overrides in json.loads(sys.argv[2]).items():
        path = Path(sys.argv[1]) / name
        expected = ["finished"]
        if Path(name).name == DISTURBED:
            expected = ["interrupted", "finished"]
            if os.environ["RANK"] == "1":
                threading.Thread(target=_disturb, args=(RunDirectory(path), 2), daemon=True).start()
        for each in expected:
            state = run(short_config(*overrides), path)
            if state != each:
                sys.exit(f"{name}: {state}")
