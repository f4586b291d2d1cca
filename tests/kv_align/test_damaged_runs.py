"""A run folder that is damaged is one sentence, wherever it is read, and hides no other run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_align.config.identity import going_on
from kv_align.experiment.experiment import run as do_run
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_json, write_json
from kv_align.summary import collect
from tests.short_runs import results, short_config

CONFIG = short_config("experiment=none", "trainer.max_steps=4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "sound"
    assert do_run(CONFIG, path) == "finished"
    return path


@pytest.fixture
def two(finished: Path, tmp_path: Path) -> tuple[Path, RunDirectory]:
    """A folder of a sound run and of one to be damaged."""
    shutil.copytree(finished, tmp_path / "sound")
    shutil.copytree(finished, tmp_path / "other")
    return tmp_path, RunDirectory(tmp_path / "other")


def changed(file: Path, **values: object) -> None:
    write_json(file, (read_json(file) or {}) | values)


CONFIG_DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "cut": lambda file: file.write_text("a: [1,"),
    "deep": lambda file: file.write_text("a: " + "[" * 5000),
    "empty": lambda file: file.write_text(""),
    "list": lambda file: file.write_text("[1, 2]"),
    "binary": lambda file: file.write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES.values(), ids=CONFIG_DAMAGES)
def test_a_configuration_that_cannot_be_read_is_named(two, damage):
    folder, run = two
    damage(run.config_file)
    cells, others = collect(folder)
    assert [len(runs) for runs in cells.values()] == [1]
    assert others == [f"{run.config_file} cannot be read: restore it, or choose another run_name."]
    if run.config_file.exists():
        with pytest.raises(ConfigError, match=r"config\.yaml cannot be read: restore it"):
            going_on(run, short_config("experiment=none", "trainer.max_steps=4", "seed=9"))


@pytest.mark.parametrize("values", [{"arm": 3}, {"content_hash": None}, {"loss": ["kv"]}], ids=str)
def test_a_summary_of_other_kinds_is_left_out_by_name(two, values):
    folder, run = two
    changed(run.summary_file, **values)
    cells, others = collect(folder)
    assert [len(runs) for runs in cells.values()] == [1]
    assert others == [f"{run.summary_file} is damaged: restore it, or take its run out of the folder."]


@pytest.mark.parametrize(
    "values",
    [{"content_hash": None}, {"content_hash": 7}, {"attempt": "x"}, {"updated": "now"}, {"step": 1.5}],
    ids=str,
)
def test_a_status_of_other_kinds_is_none(two, values):
    _, run = two
    assert run.status() is not None
    changed(run.status_file, **values)
    assert run.status() is None
    with pytest.raises(ConfigError, match=r"holds a run whose status\.json cannot be read: nothing was overwritten"):
        run.earlier_attempt("a" * 64)


def test_a_number_of_seconds_may_be_whole_and_memory_unknown(two):
    _, run = two
    changed(run.status_file, updated=5, peak_memory_gb=3, gpu_memory_gb=None)
    status = run.status()
    assert status is not None
    assert (status.updated, status.peak_memory_gb) == (5, 3)


@pytest.mark.parametrize("artefacts", [7, ["student"], None])
def test_artefacts_of_another_kind_are_not_there(two, artefacts):
    _, run = two
    assert run.is_complete()
    changed(run.summary_file, artefacts=artefacts)
    assert not run.is_complete()


def test_a_finished_run_without_its_metrics_is_not_begun_again_by_the_command_line(two):
    _, run = two
    (run.checkpoints / "step_00000004").mkdir(parents=True, exist_ok=True)
    run.metrics_file.unlink()
    with pytest.raises(ConfigError, match="but its student or metrics are gone"):
        run.refuse_to_redo()


def test_a_checkpoint_without_the_rows_of_its_steps_is_not_gone_on_from(tmp_path, finished):
    config = short_config("experiment=none", "trainer.max_steps=4", "trainer.checkpoint_interval=2")
    run = RunDirectory(tmp_path / "run")
    assert do_run(config, run.path) == "finished"
    whole = results(run)
    run.metrics_file.unlink()
    assert do_run(config, run.path) == "finished"  # as a launcher does who was told to
    assert results(run) == whole
    assert json.loads(run.status_file.read_text())["attempt"] == 2
