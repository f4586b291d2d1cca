"""The stand-in trainer counts what was done twice, so what it counts must be that."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from kv_align.config.compose import compose_config
from kv_align.runs.run_dir import RunDirectory
from tests.launch.standin import standin_experiment

CONFIG = compose_config(["experiment=none", "trainer.max_steps=3", "trainer.warmup_steps=0"])[0]


def done(path: Path, killed_before: str | None = None) -> None:
    """Do the run in a process of its own; killed as the artefact `killed_before` is about to be written."""
    if killed_before is not None:
        write = standin_experiment.write_json
        standin_experiment.write_json = lambda file, content: (
            os._exit(9) if file.name == killed_before else write(file, content)
        )
    standin_experiment.run(CONFIG, path)


@pytest.mark.parametrize("killed_before", [None, "summary.json"])
def test_a_run_that_is_killed_in_its_last_moment_and_goes_on_is_not_done_twice(tmp_path, killed_before):
    path = tmp_path / "runs" / "one"
    (tmp_path / "standin.json").write_text(json.dumps({}))
    for each in (killed_before, None, None):
        process = multiprocessing.get_context("fork").Process(target=done, args=(path, each))
        process.start()
        process.join(60)
        assert process.exitcode == (9 if each else 0)
    assert RunDirectory(path).is_complete()
    assert len((path / "finished.txt").read_text().splitlines()) == 1
