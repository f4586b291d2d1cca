"""Tokenised texts on disk, named by the content that they were made of: the same texts are tokenised once.

A file that is missing, damaged or cannot be written costs its time and nothing else. Files are in `KV_ALIGN_DATA_CACHE`
(`off`: none are kept), else where all is that can be computed again (`kv_align.runs.digests.cache_folder`).
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from kv_align.data.encode import Encoded, Written, tokenise
from kv_align.runs.digests import cache_folder

LOGGER = logging.getLogger(__name__)

WORTH_KEEPING = 500_000
"""Characters from which on texts are kept; fewer are tokenised in a moment."""
_FORMAT = "1"
_DIGEST = 32  # bytes of the check sum that a file begins with


def tokenised(
    written: Sequence[Written],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Encoded]:
    """Return what `tokenise` returns, from the disk where it is there already."""
    folder = _folder()
    if folder is None or sum(len(text) for each in written for _, text in each.segments) < WORTH_KEEPING:
        return tokenise(written, tokenizer, max_length, progress)
    file = folder / f"{_key(written, tokenizer, max_length)}.npz"
    encoded = _load(file)
    if encoded is None:
        encoded = tokenise(written, tokenizer, max_length, progress)
        _save(file, encoded)
    return encoded


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) over all of a tokenizer that decides how it cuts a text."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    whole = f"{tokenizers.__version__} {special} {tokenizer.backend_tokenizer.to_str()}"
    return hashlib.sha256(whole.encode()).hexdigest()


def _folder() -> Path | None:
    named = os.environ.get("KV_ALIGN_DATA_CACHE")
    return None if named == "off" else Path(named) if named else cache_folder("tokens")


def _key(written: Sequence[Written], tokenizer: PreTrainedTokenizerFast, max_length: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {max_length} {tokenizer_digest(tokenizer)}\n".encode())
    for each in written:
        head = [each.whole, *((int(segment), len(text)) for segment, text in each.segments)]
        digest.update(f"{head}\n".encode())
        digest.update("".join(text for _, text in each.segments).encode())
    return digest.hexdigest()


def _load(file: Path) -> list[Encoded] | None:
    """Return what a file holds; None where it is not there, or not what was written."""
    try:
        whole = file.read_bytes()
        if hashlib.sha256(whole[_DIGEST:]).digest() != whole[:_DIGEST]:
            raise ValueError("its check sum is another")
        with np.load(io.BytesIO(whole[_DIGEST:]), allow_pickle=False) as kept:
            ids, segments, cut, lengths = (kept[name] for name in ("ids", "segments", "cut", "lengths"))
            spans = kept["spans"].cumsum(axis=0, dtype=np.int32)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        LOGGER.warning("%s is damaged (%s): it is made again", file, error)
        return None
    ends = lengths.cumsum()
    return [
        Encoded(
            ids[end - length : end].tolist(),
            segments[end - length : end].tolist(),
            bool(was_cut),
            spans[end - length : end],
        )
        for end, length, was_cut in zip(ends, lengths, cut, strict=True)
    ]


def _save(file: Path, encoded: list[Encoded]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    content = io.BytesIO()
    np.savez_compressed(
        content,
        ids=np.array([i for each in encoded for i in each.ids], dtype=np.int32),
        segments=np.array([i for each in encoded for i in each.segments], dtype=np.uint8),
        cut=np.array([each.cut for each in encoded], dtype=bool),
        lengths=np.array([len(each.ids) for each in encoded], dtype=np.int64),
        # Differences are small numbers, which take little room.
        spans=np.diff(np.concatenate([each.spans for each in encoded]), axis=0, prepend=np.int32(0)),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(hashlib.sha256(content.getbuffer()).digest())
            stream.write(content.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        LOGGER.warning("%s cannot be kept (%s): these texts are tokenised anew by the next run", file, error)
