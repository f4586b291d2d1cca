"""SHA-256 of files, of large ones once a machine: remembered by all that changes when a file does. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from kv_align.runs.files import file_digest, read_json, write_json

_WORTH_REMEMBERING_BYTES = 4_000_000
_SETTLED_S = 2.0  # a file that was changed just now may change again within the resolution of its times


def cache_folder(name: str) -> Path:
    """Return the folder of what can be computed again at any time: below KV_ALIGN_CACHE, else Hugging Face's cache folder."""
    root = os.environ.get("KV_ALIGN_CACHE")
    if root is None:
        root = str(Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "kv_align")
    return Path(root).expanduser() / name


def digest_of(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes.

    A file is taken for the one that was read before only where its path, size, modification time, change time and inode are
    the same: a file that was replaced with its modification time kept is read again.
    """
    stat = file.stat()
    return _remembered(
        str(file.resolve()), (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
    )


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 (hex) over files by name, in the order of the names."""
    digest = hashlib.sha256()
    for name, file in sorted(files):
        digest.update(f"{name}\0{digest_of(file)}\n".encode())
    return digest.hexdigest()


@cache
def _remembered(path: str, state: tuple[int, ...]) -> str:
    if state[0] < _WORTH_REMEMBERING_BYTES:
        return file_digest(Path(path))
    record = cache_folder("digests") / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"
    known = read_json(record)
    if known is not None and known.get("state") == list(state):
        return str(known["sha256"])
    result = file_digest(Path(path))
    if time.time() - max(state[1], state[2]) / 1e9 > _SETTLED_S:
        with suppress(OSError):  # a disk that is full or read-only costs the next start a second reading
            write_json(record, {"path": path, "state": list(state), "sha256": result})
    return result


def digest_of_json(content: object) -> str:
    """SHA-256 (hex) over a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
