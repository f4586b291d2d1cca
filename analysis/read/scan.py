"""Which folders of a sweep are runs, and whether they changed since they were last read.

A run is a folder with any of the contract's files in it, so that one that lost its status is found and named too.
Nothing below a run is looked into. Knows nothing of what the files hold.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import SweepDirectory

_CONTRACT = RunDirectory("run")
FILES = (
    _CONTRACT.status_file.name,
    _CONTRACT.summary_file.name,
    _CONTRACT.provenance_file.name,
    _CONTRACT.config_file.name,
    _CONTRACT.metrics_file.name,
    _CONTRACT.evaluations_file.name,
    _CONTRACT.outcomes_file.name,
)
# Hydra writes a config.yaml of its own into its hidden folder; in a run's folder any of these is enough.
_TELLING = set(FILES)
_NOT_LOOKED_INTO = {SweepDirectory("sweep").report.name}


@dataclass(frozen=True)
class FoundRun:
    """A run folder.

    Attributes
    ----------
    run
        Path below the sweep with `/` between its parts: the key of the run in every table.
    path
        The folder.
    signature
        Modification time (ns) and size of each file that is there: as long as it stays the same, so do the files.
    """

    run: str
    path: str
    signature: str


def find_runs(sweep: Path) -> list[FoundRun]:
    """Return the run folders below a sweep, in the order of their keys; hidden folders and the report are left out."""
    found: list[FoundRun] = []
    linked: set[tuple[int, int]] = set()
    pending = [(str(sweep), "")]
    while pending:
        folder, key = pending.pop()
        files, folders = _entries(folder)
        if key and not _TELLING.isdisjoint(files):
            found.append(FoundRun(key, folder, _signature(files)))
            continue
        for entry in folders:
            if entry.name.startswith(".") or (not key and entry.name in _NOT_LOOKED_INTO):
                continue
            if entry.is_symlink():
                place = entry.stat()
                if (place.st_dev, place.st_ino) in linked:
                    continue
                linked.add((place.st_dev, place.st_ino))
            name = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            pending.append((entry.path, f"{key}/{name}" if key else name))
    return sorted(found, key=lambda each: each.run)


def _entries(folder: str) -> tuple[dict[str, os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Files by name and folders of a folder; nothing where it cannot be read."""
    files, folders = {}, []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in _TELLING:
                    files[entry.name] = entry
                elif entry.is_dir():
                    folders.append(entry)
    except OSError:
        return {}, []
    return files, folders


def _signature(files: dict[str, os.DirEntry[str]]) -> str:
    parts = []
    for name in FILES:
        if name in files:
            try:
                state = files[name].stat()
            except OSError:  # gone since it was listed, or a link into nowhere
                continue
            parts.append(f"{name}:{state.st_mtime_ns}:{state.st_size}")
    return " ".join(parts)
