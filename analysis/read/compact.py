"""Which finished runs can be read from their compact record, and what their record says of the files beside it.

A record is believed where the readable files have the size that it holds and are no younger than it is; a few of these are
checked by digest all the same, all of them on `--verify`. Where a file is younger, as in a copy, or has another size, the
digests decide: a file that is not what it was when the run finished is named, and the files are read instead.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

from analysis.read.scan import FoundRun
from kv_align.runs.files import file_digest
from kv_align.runs.record import Record, read_record_file
from kv_align.runs.run_dir import RunDirectory

SAMPLE = 64
"""One run in so many is checked by digest though nothing speaks for it."""


@dataclass(frozen=True, eq=False)
class Compact:
    """What was found of a run's record.

    Attributes
    ----------
    record
        To be read instead of the files; None where there is none that can be believed.
    changed
        Sentences on files that are not what they were when the run finished.
    """

    record: Record | None
    changed: tuple[str, ...] = ()


def read_compact(folder: FoundRun, *, verify: bool = False) -> Compact:
    """Read a run's compact record, if it has one that holds what its files hold."""
    record_name = RunDirectory(folder.path).record_file.name
    files = folder.files()
    if record_name not in files:
        return Compact(None)
    record = read_record_file(Path(folder.path) / record_name)
    if record is None:
        return Compact(None)
    sizes_kept = all(files.get(name, (0, -1))[1] == size for name, (size, _) in record.files.items())
    younger = any(files[name][0] > files[record_name][0] for name in record.files if name in files)
    sampled = zlib.crc32(folder.run.encode()) % SAMPLE == 0
    if sizes_kept and not (verify or younger or sampled):
        return Compact(record)
    changed = tuple(
        f"{name} is not what it was when the run finished"
        for name, (_, sha256) in record.files.items()
        if _digest(Path(folder.path) / name) != sha256
    )
    return Compact(None if changed else record, changed)


def _digest(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError:
        return "missing"
