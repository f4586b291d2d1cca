"""How files of a run are written, so that a kill at any moment leaves the old content or the new one. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

_TAIL_BYTES = 4096  # a row and a half, with lists by layer in it


def append_row(file: Path, row: dict[str, Any], *, durable: bool = False) -> None:
    """Append one JSON line; numbers that are no numbers are written as null, since JSON has none.

    Parameters
    ----------
    file
        It need not exist; its folder must.
    row
        What is appended. If the last writer was killed within its line, only that line is lost.
    durable
        Whether to return only when the row has reached the disk.
    """
    with file.open("ab+") as stream:
        torn = stream.seek(0, os.SEEK_END) > 0 and _last_byte(stream) != b"\n"
        stream.write(b"\n" * torn + _line(row).encode())
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def _last_byte(stream: IO[bytes]) -> bytes:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1)


def read_rows(file: Path, key: str = "step") -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file that have this key, without lines that a kill left incomplete."""
    return rows_of(file.read_bytes(), key)


def rows_of(content: bytes, key: str) -> list[dict[str, Any]]:
    """Return the rows that `read_rows` would, of what was read of a file already."""
    lines = content.decode("utf-8", errors="replace").splitlines()
    return [row for row in (_row(line, key) for line in lines) if row is not None]


def read_last_row(file: Path) -> dict[str, Any] | None:
    """Return the last of the rows that `read_rows` would, reading no more of the file than that; None without one."""
    size, tail = file.stat().st_size, _TAIL_BYTES
    with file.open("rb") as stream:
        while True:
            stream.seek(max(0, size - tail))
            # The first line of a tail may be the end of one, which is no row: more is read where there is no other.
            lines = stream.read(tail).decode("utf-8", errors="replace").splitlines()
            row = next((row for row in (_row(line, "step") for line in reversed(lines)) if row is not None), None)
            if row is not None or tail >= size:
                return row
            tail *= 4


def _row(line: str, key: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    return row if isinstance(row, dict) and key in row else None


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file atomically."""
    write_atomically(file, "".join(_line(row) for row in rows))


def read_json(file: Path) -> dict[str, Any] | None:
    """Return a JSON object; None where the file is missing or broken."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_atomically(file, json.dumps(_finite(content), indent=2) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader, or a kill at any moment, finds the old content or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(file)
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def temporary_beside(file: Path) -> Path:
    """Return a name for what will be renamed to `file`, which no other process writes."""
    # Process ids are not enough: containers that share a disk have the same.
    return file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def give_usual_mode(*files: Path) -> None:
    """Give files the mode that new ones get; safetensors, for one, keeps its own from everybody but their owner."""
    mask = os.umask(0o022)  # the only way to ask for it is to set it
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)


def file_digest(file: Path) -> str:
    """SHA-256 (hex) of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row)) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
