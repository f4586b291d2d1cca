"""Which folders of a sweep are runs, and whether they changed since they were last read.

A run is a folder with any of the contract's files in it, so that one that lost its status is found and named too.
Nothing below a run is looked into. Knows nothing of what the files hold.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kv_align.runs.errors import ConfigError
from kv_align.runs.program import program
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
    _CONTRACT.record_file.name,
)
# Hydra writes a config.yaml of its own into its hidden folder; in a run's folder any of these is enough.
_TELLING = set(FILES)
MOST_FOLDERS = 5_000
"""Folders that are looked into without a single run among them."""
QUIET_S = 2.0
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
        Modification time (ns) and size of each file that is there: as long as it stays the same, so do the files; of a
        folder that cannot be listed, that it cannot.
    """

    run: str
    path: str
    signature: str

    def files(self) -> dict[str, tuple[int, int]]:
        """Return (modification time in ns, size) of each file that was there, by name."""
        parts = (part.rsplit(":", 2) for part in self.signature.split(" ") if part.count(":") == 2)
        return {name: (int(modified), int(size)) for name, modified, size in parts}


def runs_of_sweep(sweep: SweepDirectory) -> list[FoundRun]:
    """Return the run folders of a sweep, with a plan or without.

    Raises
    ------
    ConfigError
        If it is no folder, is one run, or holds neither a plan nor a run.
    """
    if not sweep.path.is_dir():
        raise ConfigError(f"{sweep.path} is no folder: name the folder of a sweep or of a Hydra multirun.")
    if sweep.plan_file.exists():
        return find_runs(sweep.path)
    if RunDirectory(sweep.path).status_file.exists():
        raise ConfigError(
            f"{sweep.path} is one run, not a sweep: name the folder above it, or compare it with another run "
            f"({program('analysis')} compare RUN_A RUN_B)."
        )
    runs = find_runs(sweep.path)
    if not runs:
        raise ConfigError(
            f"{sweep.path} is no sweep: it holds neither a {sweep.plan_file.name} nor a run folder; name a folder that "
            f"{program('launch')} submit or a Hydra --multirun has written."
        )
    return runs


def find_runs(sweep: Path) -> list[FoundRun]:
    """Return the run folders below a sweep, in the order of their keys; hidden folders and the report are left out.

    A folder that cannot be listed is among them: it may be a run.

    Raises
    ------
    ConfigError
        If many folders hold not one run: whoever names a wrong folder does not wait until all of it was searched.
    """
    runs: list[FoundRun] = []
    visited, progress_said, began = 0, False, time.monotonic()
    linked: set[tuple[int, int]] = set()
    pending = [(str(sweep), "")]
    while pending:
        folder, key = pending.pop()
        listed = _entries(folder)
        if listed is None:
            if key:
                runs.append(FoundRun(key, folder, "cannot be listed"))
            continue
        files, folders = listed
        if key and not _TELLING.isdisjoint(files):
            runs.append(FoundRun(key, folder, _signature(files)))
            continue
        visited += 1
        if visited > MOST_FOLDERS and not runs:
            raise ConfigError(
                f"{sweep} holds no run in the first {MOST_FOLDERS:,} folders below it: name the folder of a sweep or "
                "of a Hydra multirun itself."
            )
        if not progress_said and time.monotonic() - began > QUIET_S:
            progress_said = True
            print(f"searching {sweep} and the folders below it for runs ...", file=sys.stderr, flush=True)
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
    return sorted(runs, key=lambda run: run.run)


def _entries(folder: str) -> tuple[dict[str, os.DirEntry[str]], list[os.DirEntry[str]]] | None:
    """Files by name and folders of a folder; None where it cannot be listed."""
    files, folders = {}, []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name in _TELLING:
                    files[entry.name] = entry
                elif entry.is_dir():
                    folders.append(entry)
    except OSError:
        return None
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
