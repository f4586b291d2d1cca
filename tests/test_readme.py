"""What README names is there, and what it shows of an aligner and a loss of one's own runs."""

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object

from kv_align.config.compose import compose_config
from kv_align.experiment.experiment import run
from kv_align.runs.run_dir import RunDirectory, read_rows
from tests import readme
from tests.short_runs import SHORT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = README.split("\n## The code\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", re.findall(r"`((?:kv_align|launch|analysis)(?:\.\w+)+)`", CODE))
def test_the_way_of_a_batch_leads_through_what_exists(name: str) -> None:
    assert callable(get_object(name))


def test_the_map_names_every_folder_of_the_code() -> None:
    rows = [line.split("|")[1] for line in CODE.splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in re.findall(r"\w+", row)}
    folders = {
        folder.name
        for package in ("kv_align", "launch", "analysis")
        for folder in (ROOT / package).iterdir()
        if (folder / "__init__.py").is_file()
    }
    assert folders - {"compare"} <= named


FOLDERS = ("conf", "kv_align", "launch", "analysis")


def commands(folder: str) -> list[str]:
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", [each for folder in FOLDERS for each in commands(folder)])
def test_a_command_of_a_folders_readme_works(command: str, tmp_path: Path) -> None:
    name, *words = shlex.split(command)
    assert name == "kv-align"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, "-m", "kv_align", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_readme_names_every_folder_in_it(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    inside = {each.name for each in (ROOT / folder).iterdir() if each.is_dir() and each.name != "__pycache__"}
    named = " ".join(re.findall(r"`([^`]+)`", text))
    assert inside <= set(re.findall(r"\w+", named))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_a_run_with_the_aligner_and_the_loss_that_readme_shows(tmp_path: Path) -> None:
    overrides = [*SHORT, "aligner=mine", "aligner.rank=4", "loss=mine"]
    config, notes = compose_config(overrides, config_dir=str(readme.written() / "conf"))
    assert notes == ["init=uniform has no effect on aligner=mine: left out."]
    assert run(config, tmp_path) == "finished"
    rows = read_rows(RunDirectory(tmp_path).metrics_file)
    assert len(rows) == 6
    for row in rows:
        assert math.isclose(row["total_loss"], row["task_loss"] + 0.5 * row["values_loss"], rel_tol=1e-5)
        assert row["kv_grad_norm"] > 0
        assert row["aligner_grad_norm"] > 0
    assert rows[-1]["values_loss"] != rows[0]["values_loss"]
