"""Tensors of many examples on disk, computed once by whoever needs them first: files, locks, digests, and the disk's room.

    FOLDER/<key>/about.json                    what the key stands for
    FOLDER/<key>/<name>-<shard>.safetensors    one tensor of some consecutive examples, one after the other
    FOLDER/<key>/<name>-<shard>.json           its digest and shapes; written last, so that what has one is whole

The key is a hash of content, so other content is another folder and nothing is ever out of date. Files are mapped into
memory, so the runs on a machine share them. Jobs that fill one folder at once share the work: a shard that another writes
is left to it. A shard is written while the next one is computed. Which texts are computed together is the same whoever does
it, so that a cache holds the same numbers to the last bit. Knows nothing of what the tensors are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kv_align.runs.errors import ConfigError
from kv_align.runs.progress import progress_bar
from kv_align.runs.run_dir import file_digest, read_json, write_json

LOGGER = logging.getLogger(__name__)
SHARD = 32
"""Examples of one file, which are computed even where one of them is wanted; two files of each tensor are in memory while
they are made."""
AT_ONCE = 16
"""Examples that are computed at once where nothing else is said."""
_POLL_S = 0.2


class _Opened(NamedTuple):
    """A mapped file: its numbers, the shape of one token's ([..., D]) and their type when they were computed."""

    flat: Tensor
    shape: list[int]
    native: torch.dtype


class _Made(NamedTuple):
    """What is to be written of one shard under one name."""

    flat: Tensor
    manifest: dict[str, object]


class Shards:
    """Tensors [..., T, D] of examples, by name.

    Parameters
    ----------
    folder
        Shared by all runs.
    about
        What the tensors depend on, beside what is added here (`dtype` and numbers).
    names
        Of the tensors of each example.
    spans
        The tokens of each example that are kept.
    dtype
        On disk, of what is not whole numbers; these are kept in 32 bits. Tensors come back as they were computed; None keeps
        them so as well.
    compute
        Gives some examples' padded tensors [B, ..., T, D], by name.
    at_once
        It is asked for so many examples at most.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, object],
        names: Sequence[str],
        spans: Sequence[range],
        dtype: torch.dtype | None,
        compute: Callable[[list[int]], Mapping[str, Tensor]],
        at_once: int = AT_ONCE,
    ) -> None:
        self._at_once = at_once
        self._names, self._spans, self._dtype, self._compute = names, spans, dtype, compute
        self._about = {**about, "dtype": str(dtype), "examples": len(spans), "shard": SHARD}
        key = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()
        self.folder = folder / key[:32]
        self._open: dict[tuple[str, int], _Opened] = {}

    def fill(self, examples: Iterable[int]) -> None:
        """Compute the shards of these examples that are not on disk; wait for those that other processes compute.

        Raises
        ------
        ConfigError
            If the folder cannot be written or the disk is too small.
        """
        missing = [shard for shard in sorted({example // SHARD for example in examples}) if self._lacks(shard)]
        if not missing:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "about.json", self._about)
        except OSError as error:
            raise ConfigError(
                f"teacher_cache={self.folder.parent} is not allowed: it cannot be written ({error.strerror}); choose another "
                "folder, or teacher_cache=off."
            ) from None
        self._check_space(missing)
        writing: Future[None] | None = None
        with progress_bar("teacher cache", len(missing)) as advance, ThreadPoolExecutor(1) as writer:
            while missing:
                for shard in list(missing):
                    with ExitStack() as stack:
                        if not stack.enter_context(self._lock(shard, wait=False)):
                            continue
                        if self._lacks(shard):
                            made = self._make(shard)
                            if writing is not None:
                                writing.result()
                            writing = writer.submit(self._write, shard, made, stack.pop_all())
                    missing.remove(shard)
                    advance(1)
                if missing:
                    time.sleep(_POLL_S)
            if writing is not None:
                writing.result()

    def padded(self, name: str, examples: Sequence[int], length: int) -> Tensor:
        """Return examples' tensors [B, ..., length, D], each token at its place; zeros where there is none, or none kept."""
        opened = [self._opened(name, example // SHARD) for example in examples]
        *outer, width = opened[0].shape
        padded = torch.empty(len(examples), *outer, length, width, dtype=opened[0].native)
        for row, example, each in zip(padded, examples, opened, strict=True):
            span, per_token = self._spans[example], math.prod(each.shape)
            before = self._tokens(range(example // SHARD * SHARD, example)) * per_token
            block = each.flat[before : before + len(span) * per_token]
            row[..., : span.start, :] = 0
            row[..., span.start : span.stop, :] = block.view(*outer, len(span), width)
            row[..., span.stop :, :] = 0
        return padded

    def _opened(self, name: str, shard: int) -> _Opened:
        if (name, shard) not in self._open:
            if self._lacks(shard):
                self.fill([shard * SHARD])
            if not self._is_sound(name, shard):
                self._replace(name, shard)
            manifest = read_json(self._files(name, shard)[1])
            assert manifest is not None
            with safe_open(self._files(name, shard)[0], framework="pt") as file:
                opened = _Opened(file.get_tensor("states"), manifest["shape"], getattr(torch, manifest["native"]))
            self._open[name, shard] = opened
        return self._open[name, shard]

    def _is_sound(self, name: str, shard: int) -> bool:
        file, manifest = self._files(name, shard)
        content = read_json(manifest)
        return content is not None and file.is_file() and file_digest(file) == content["sha256"]

    def _replace(self, name: str, shard: int) -> None:
        """Compute a damaged file again, unless another process has just done so."""
        file, manifest = self._files(name, shard)
        with self._lock(shard, wait=True):
            if not self._is_sound(name, shard):
                LOGGER.warning("%s is damaged: computing it again", file)
                manifest.unlink(missing_ok=True)
                self._write(shard, self._make(shard), ExitStack())

    def _lacks(self, shard: int) -> bool:
        return not all(self._files(name, shard)[1].is_file() for name in self._names)

    def _files(self, name: str, shard: int) -> tuple[Path, Path]:
        return self.folder / f"{name}-{shard:06d}.safetensors", self.folder / f"{name}-{shard:06d}.json"

    def _examples(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, len(self._spans)))

    def _tokens(self, examples: Iterable[int]) -> int:
        return sum(len(self._spans[example]) for example in examples)

    def _blocks(self, examples: list[int]) -> Iterator[tuple[str, int, Tensor]]:
        """What is kept of each example, [..., T, D], with its name and example."""
        for name, padded in self._compute(examples).items():
            for row, example in zip(padded.cpu(), examples, strict=True):
                span = self._spans[example]
                yield name, example, row[..., span.start : span.stop, :]

    def _make(self, shard: int) -> dict[str, _Made]:
        """Compute a shard, by name."""
        examples = self._examples(shard)
        starts = list(accumulate((len(self._spans[example]) for example in examples), initial=0))
        made: dict[str, _Made] = {}
        # Texts of like length together: little padding.
        by_length = sorted(examples, key=lambda example: self._spans[example].stop)
        for start in range(0, len(by_length), self._at_once):
            for name, example, block in self._blocks(by_length[start : start + self._at_once]):
                shape = _shape_of_token(block)
                per_token = math.prod(shape)
                if name not in made:
                    flat = torch.empty(self._tokens(examples) * per_token, dtype=self._stored(block.dtype))
                    made[name] = _Made(flat, {"shape": shape, "native": str(block.dtype).removeprefix("torch.")})
                made[name].flat[starts[example - examples.start] * per_token :][: block.numel()] = block.flatten()
        return made

    def _write(self, shard: int, made: dict[str, _Made], held: ExitStack) -> None:
        """Write a shard, then let go of its lock."""
        with held:
            for name, each in made.items():
                file, manifest = self._files(name, shard)
                if manifest.is_file():
                    continue  # of another set of names that shares the folder, or sound beside a damaged one
                content = save({"states": each.flat})
                temporary = file.with_suffix(f".{os.getpid()}.tmp")
                with temporary.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(file)
                write_json(manifest, {"sha256": hashlib.sha256(content).hexdigest(), **each.manifest})

    def _stored(self, native: torch.dtype) -> torch.dtype:
        return self._dtype or native if native.is_floating_point else torch.int32

    def _check_space(self, missing: list[int]) -> None:
        """Refuse a disk that cannot hold all of it, by what one token of the shortest example takes."""
        examples = [example for shard in missing for example in self._examples(shard)]
        shortest = min(examples, key=lambda example: self._spans[example].stop)
        needed = 0
        for name, _, block in self._blocks([shortest]):
            per_token = math.prod(_shape_of_token(block)) * self._stored(block.dtype).itemsize
            absent = [shard for shard in missing if not self._files(name, shard)[1].is_file()]
            needed += per_token * self._tokens(example for shard in absent for example in self._examples(shard))
        free = shutil.disk_usage(self.folder).free
        LOGGER.info("teacher cache: %.2g GB in %s", needed / 1e9, self.folder)
        if needed > free:
            raise ConfigError(
                f"teacher_cache={self.folder.parent} is not allowed: it needs about {needed / 1e9:.1f} GB and the disk has "
                f"{free / 1e9:.1f} GB free; choose another disk, or teacher_cache=off."
            )

    @contextmanager
    def _lock(self, shard: int, *, wait: bool) -> Iterator[bool]:
        """Hold a lock file that the operating system releases with its process; False if another holds it."""
        with (self.folder / f"{shard:06d}.lock").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                raise ConfigError(
                    f"teacher_cache={self.folder.parent} is not allowed: files there cannot be locked ({error.strerror}); "
                    "choose another folder, or teacher_cache=off."
                ) from None
            yield True


def _shape_of_token(block: Tensor) -> list[int]:
    return [*block.shape[:-2], block.shape[-1]]
