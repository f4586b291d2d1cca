"""Short runs one after the other in the processes of one job: `python -m tests.kv_align.sharded_runs FOLDER RUNS` in each.

RUNS is JSON, the overrides of each run by the name of its folder below FOLDER. The run "disturbed" is asked to leave by a
signal to the second process alone, and then done again.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from kv_align.experiment import run
from kv_align.runs import RunDirectory, read_last_row
from tests.short_runs import short_config


def disturb(directory: RunDirectory, step: int) -> None:
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
        if name == "disturbed":
            expected = ["interrupted", "finished"]
            if os.environ["RANK"] == "1":
                threading.Thread(target=disturb, args=(RunDirectory(path), 2), daemon=True).start()
        for each in expected:
            state = run(short_config(*overrides), path)
            if state != each:
                sys.exit(f"{name}: {state}")
