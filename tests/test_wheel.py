"""What is installed is what was tested: the wheel carries `conf/` and the embedded pair, and works without a checkout."""

import email
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import kv_align
from kv_align.config.compose import compose_raw

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    if importlib.util.find_spec("hatchling") is not None:
        command.append("--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode != 0 and "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("hatchling, which builds the wheel, is neither installed nor can it be fetched")
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(*arguments: str, installed: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("source", "inside"), [("conf", "kv_align/conf"), ("kv_align/models/embedded", "kv_align/models/embedded")]
)
def test_the_wheel_carries_every_file_of_conf_and_of_the_embedded_pair(
    unpacked: Path, source: str, inside: str
) -> None:
    expected = {
        file.relative_to(ROOT / source): file.read_bytes() for file in (ROOT / source).rglob("*") if file.is_file()
    }
    found = {
        file.relative_to(unpacked / inside): file.read_bytes()
        for file in (unpacked / inside).rglob("*")
        if file.is_file()
    }
    assert len(expected) >= 10
    assert found == expected


def test_the_wheel_carries_the_packages_and_nothing_else(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {
        "kv_align",
        "launch",
        "analysis",
    }
    assert list(unpacked.rglob("tests")) == []
    for package in ("kv_align", "launch", "analysis"):
        inside = {file.relative_to(unpacked) for file in (unpacked / package).rglob("*.py")}
        assert inside == {file.relative_to(ROOT) for file in (ROOT / package).rglob("*.py")}


def test_the_wheel_says_what_it_is(unpacked: Path) -> None:
    (folder,) = unpacked.glob("*.dist-info")
    metadata = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Name"] == "kv-align"
    assert metadata["Version"] == kv_align.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (folder / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_composes_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    overrides = ["aligner=structured", "init=random", "loss=kv+struct", "seed=3"]
    done = python("-m", "kv_align.train", *overrides, "--cfg", "job", installed=unpacked, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout) == compose_raw(overrides)
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_finds_its_own_conf_and_its_own_models(unpacked: Path, tmp_path: Path) -> None:
    script = (
        "from kv_align.config.targets import config_directory\n"
        "from kv_align.config.model_card import EMBEDDED, model_card\n"
        "print(config_directory(), EMBEDDED, model_card(str(EMBEDDED / 'teacher')).has_weights, sep='\\n')"
    )
    done = python("-c", script, installed=unpacked, folder=tmp_path)
    assert done.stdout.splitlines() == [
        str(unpacked / "kv_align" / "conf"),
        str(unpacked / "kv_align" / "models" / "embedded"),
        "True",
    ]


def test_the_wheel_refuses_bad_input_as_the_checkout_does(unpacked: Path, tmp_path: Path) -> None:
    done = python("-m", "kv_align.train", "aligner=flatt", installed=unpacked, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "kv-align: aligner=flatt is not allowed: aligner must be one of flat, none, orthogonal, structured; "
        "choose one of these.\n"
    )
