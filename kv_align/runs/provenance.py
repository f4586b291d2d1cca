"""Where a run's numbers come from: code, packages, machine, seeds, and hashes of what it started from. No torch.

What is recorded of the code is its commit and the uncommitted diff, since either alone would not give the numbers back. A
line of the diff that looks like a secret is not recorded, and KV_ALIGN_GIT_DIFF=off leaves the whole diff out but for its
digest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from kv_align.runs.files import file_digest

LOGGER = logging.getLogger(__name__)
# Tokens of well-known services, private keys, and long values that are assigned to what is called a secret.
_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?i:token|secret|password|passwd|api_?key)\w*[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+_-]{16,}"
)
PACKAGES = ("kv-align", "torch", "transformers", "tokenizers", "accelerate", "datasets", "hydra-core", "numpy")


def attempt_provenance() -> dict[str, Any]:
    """Return what may differ from one attempt of a run to the next."""
    commit, diff = git_state()
    return {
        "started": time.time(),
        "git_commit": commit,
        "git_diff": diff,
        "code_sha256": code_digest(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
    }


def code_digest() -> str:
    """Return one SHA-256 of all source files of this package: copies and installations have no commit to tell them apart."""
    package = Path(__file__).parents[1]
    lines = [f"{file.relative_to(package).as_posix()} {file_digest(file)}" for file in sorted(package.rglob("*.py"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a number."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_state(root: Path | None = None) -> tuple[str, str]:
    """Return commit and uncommitted diff of a checkout; of the one that this package runs from, where none is named.

    Both are empty of a folder that is none.
    """
    root = root or Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "", ""
    diff = _git(root, "diff", "HEAD")
    if diff and os.environ.get("KV_ALIGN_GIT_DIFF") == "off":
        diff = f"left out by KV_ALIGN_GIT_DIFF=off; its SHA-256 is {hashlib.sha256(diff.encode()).hexdigest()}"
    return _git(root, "rev-parse", "HEAD").strip(), without_secrets(diff)


def without_secrets(diff: str) -> str:
    """Return a diff with a mark in the place of each line that looks like a secret, and say where such a line was."""
    lines, file = [], ""
    for line in diff.splitlines(keepends=True):
        if line.startswith("+++ "):
            file = line[4:].strip().removeprefix("b/")
        if _SECRET.search(line):
            LOGGER.warning(
                "a line of the uncommitted change to %s looks like a token: it is left out of what provenance.json records; "
                "KV_ALIGN_GIT_DIFF=off leaves out all of the change",
                file,
            )
            line = f"{line[:1]}[a line that looks like a token]\n"
        lines.append(line)
    return "".join(lines)


def _git(root: Path, *arguments: str) -> str:
    # A line of a file in another encoding is kept as the bytes that it has.
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "capture_output": True}
    try:
        done = subprocess.run(["git", *arguments], cwd=root, timeout=20, check=False, **options)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
