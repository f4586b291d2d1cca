"""What the tests of the analysis share."""

import shutil
from pathlib import Path

import pytest

from analysis.report.render.document import Figure
from kv_align.runs.sweep_dir import SweepDirectory
from tests.analysis.synthetic import SMALL, write_sweep


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are written without drawing their figures, which takes most of their time."""
    blank = '<svg viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr(
        "analysis.report.report.drawing_into", lambda folder: lambda name, caption, make: Figure(name, caption, blank)
    )


@pytest.fixture(scope="session")
def written_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("small") / "small", SMALL).path


@pytest.fixture
def small(written_small: Path, tmp_path: Path) -> SweepDirectory:
    """A sweep of its own: the smallest in which everything that is declared can be computed."""
    shutil.copytree(written_small, tmp_path / "small")
    return SweepDirectory(tmp_path / "small")
