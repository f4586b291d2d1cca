"""Where a run's numbers come from: code, packages, machine, seeds, and hashes of what it started from. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("kv-align", "torch", "transformers", "tokenizers", "accelerate", "datasets", "hydra-core", "numpy")


def attempt_provenance() -> dict[str, Any]:
    """Return what may differ from one attempt of a run to the next."""
    commit, diff = git_state()
    return {
        "started": time.time(),
        "git_commit": commit,
        "git_diff": diff,
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
    }


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a number."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_state() -> tuple[str, str]:
    """Return commit and uncommitted diff of the checkout that this package runs from; empty outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "", ""
    return _git(root, "rev-parse", "HEAD").strip(), _git(root, "diff", "HEAD")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
