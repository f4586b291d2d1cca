"""The code that jobs import: where it lies, a copy of it in the sweep where one is wanted, and that nobody changes it.

launch/code.json    the SHA-256 of each source file of `kv_align` when the sweep was submitted, and the commit
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import kv_align
from kv_align.runs.errors import ConfigError
from kv_align.runs.files import file_digest, read_json, write_json
from kv_align.runs.provenance import git_state
from launch.journal.journal import Journal

_PACKAGES = ("kv_align", "launch", "analysis", "conf")


def code_root() -> Path:
    """Return the folder that this process imports the packages from."""
    return Path(kv_align.__file__).resolve().parents[1]


def with_code_first(code: Path) -> dict[str, str]:
    """Return this process's environment with the packages of a folder before all others."""
    before = os.environ.get("PYTHONPATH", "")
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(code), before] if before else [str(code)]))


def take_snapshot(journal: Journal) -> Path:
    """Copy the packages into the sweep, instead of a copy that is there; returns the folder that holds it."""
    root, target, temporary = code_root(), journal.sweep.path / "code", journal.sweep.path / ".code"
    shutil.rmtree(temporary, ignore_errors=True)
    for name in _PACKAGES:
        if (root / name).is_dir():
            shutil.copytree(root / name, temporary / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return target


def freeze_code(journal: Journal, root: Path, origin: Path | None = None) -> None:
    """Note what the code of the trainer in a folder is now; a copy has the commit of the checkout that is its origin."""
    commit, diff = git_state(origin or root)
    content = {"root": str(root), "commit": commit, "uncommitted": bool(diff), "files": _digests(root)}
    write_json(journal.folder / "code.json", content)


def changed_code(journal: Journal, root: Path) -> list[str]:
    """Return the source files of the trainer in a folder that are not what they were when the sweep was submitted.

    None are where nothing was noted, as by version 0.1.0.
    """
    frozen = read_json(journal.folder / "code.json")
    if frozen is None:
        return []
    before, now = frozen["files"], _digests(root)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def refuse_changed_code(journal: Journal) -> None:
    """Refuse to go on with other code than the sweep's earlier runs had.

    Raises
    ------
    ConfigError
        Naming what changed.
    """
    changed = changed_code(journal, code_root())
    if changed:
        raise ConfigError(
            f"{in_words(changed)} of {code_root()} changed since the sweep was submitted, so its runs would not be alike: "
            "restore it, or run resume, which takes the code as it is then; cluster.snapshot_code=true gives a sweep a copy."
        )


def in_words(files: list[str]) -> str:
    """Return `kv_align/losses/kv.py and 2 more`."""
    return files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _digests(root: Path) -> dict[str, str]:
    files = (root / "kv_align").rglob("*.py")
    return {file.relative_to(root).as_posix(): file_digest(file) for file in sorted(files)}
