"""Whether criteria of the user's own are such, before a sweep is frozen with them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kv_align.config.targets import config_directory
from kv_align.runs.errors import ConfigError
from kv_align.runs.values import read_values
from launch.worker.code import code_root, with_code_first


def check_criteria(criteria: dict[str, Any], name: str) -> None:
    """Have the analysis look at criteria that are not the project's own.

    In a process of its own, since launch knows nothing of the analysis.

    Raises
    ------
    ConfigError
        For what it finds to be wrong.
    """
    if json.dumps(criteria, sort_keys=True) in _shipped():
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "criteria.yaml"
        file.write_text(yaml.safe_dump(criteria), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "analysis.design.criteria", str(file)]
        environment = with_code_first(code_root())
        checked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if checked.returncode:
        said = (checked.stderr.strip().splitlines() or ["it cannot be read"])[-1]
        raise ConfigError(said.replace(f"--criteria={file}", f"criteria={name}").replace(str(file), f"criteria={name}"))


@cache
def _shipped() -> frozenset[str]:
    files = (config_directory() / "criteria").glob("*.yaml")
    return frozenset(json.dumps(read_values(file.read_text(encoding="utf-8")), sort_keys=True) for file in files)
