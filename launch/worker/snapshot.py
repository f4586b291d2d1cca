"""The code that jobs import: that of this process, or a copy of it that is kept in the sweep."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import kv_align
from kv_align.runs.sweep_dir import SweepDirectory
from launch.cluster.setting import Setting


def code_root() -> Path:
    """Return the folder that this process imports the packages from."""
    return Path(kv_align.__file__).resolve().parents[1]


def with_code_first(code: Path) -> dict[str, str]:
    """Return this process's environment with the packages of a folder before all others."""
    before = os.environ.get("PYTHONPATH", "")
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(code), before] if before else [str(code)]))


def take_snapshot(sweep: SweepDirectory) -> None:
    """Copy the packages into the sweep."""
    root = code_root()
    for name in ("kv_align", "launch", "analysis", "conf"):
        if (root / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(root / name, sweep.path / "code" / name, ignore=ignored, dirs_exist_ok=True)


def with_code(sweep: SweepDirectory, setting: Setting) -> Setting:
    """Return the setting with the copy, where one is wanted and there."""
    if not setting.cluster.snapshot_code or not (sweep.path / "code").is_dir():
        return setting
    return replace(setting, code=str(sweep.path / "code"))
