"""A run gives signs of life whatever it is busy with, and none once it has ended."""

import os
import time
from pathlib import Path

from kv_align.runs.heartbeat import heartbeat
from kv_align.runs.run_dir import RunDirectory


def test_the_last_sign_of_life_of_a_running_run_is_the_later_of_both(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    status = run.begin({"loss": {"name": "kv"}, "seed": 0}, arm="a", content_hash="h", total_steps=3)
    os.utime(run.status_file, (status.updated + 500, status.updated + 500))
    found = run.observed()
    assert found is not None
    assert found.updated == status.updated + 500
    os.utime(run.status_file, (1, 1))
    found = run.observed()
    assert found is not None
    assert found.updated == status.updated
    ended = run.update(status, state="failed", reason="it broke")
    os.utime(run.status_file, (ended.updated + 500, ended.updated + 500))
    assert run.observed() == ended


def test_it_beats_while_the_body_runs_and_not_after(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    with heartbeat(file, 0.01):
        time.sleep(0.05)  # there is no file yet: nothing is made, and nothing breaks
        assert not file.exists()
        file.write_text("{}")
        os.utime(file, (1, 1))
        end = time.monotonic() + 10
        while file.stat().st_mtime == 1:
            assert time.monotonic() < end
            time.sleep(0.01)
    os.utime(file, (1, 1))
    time.sleep(0.05)
    assert file.stat().st_mtime == 1
