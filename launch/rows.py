"""Append-only files of JSON lines, one event each, which survive whatever kills their writer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append(file: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and see that it reaches the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    with file.open("ab") as stream:
        if stream.tell() and not _ends_line(file):
            line = b"\n" + line  # a writer was killed within its line; only that line is lost
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file, without a line that a kill left incomplete."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "event" in row:
            rows.append(row)
    return rows


def _ends_line(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
