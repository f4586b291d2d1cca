"""What the loss needs of the teacher, computed once: all arms and seeds of a sweep read the same files.

    FOLDER/<key>/about.json                    what the key stands for: teacher, texts, layers, keys setting, precision
    FOLDER/<key>/<name>-<shard>.safetensors    k, v, q or hidden of some consecutive examples, one after the other
    FOLDER/<key>/<name>-<shard>.json           its digest and shapes; written last, so that what has one is whole

The key is a hash of content, so another teacher, text or layer is another folder and nothing is ever out of date. Files are
mapped into memory, so the runs on a machine share them. Jobs that fill one folder at once share the work: a shard that
another writes is left to it. Logits are not kept: whole they are larger than the teacher, and the largest few would be
another loss.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kv_align.config import Config
from kv_align.data.batch import Batch, pad
from kv_align.data.encode import Encoded
from kv_align.data.prepared import PreparedSplit
from kv_align.devices import device_of
from kv_align.distill import Teacher, TeacherStates
from kv_align.errors import ConfigError
from kv_align.models import Reader, weights_digest
from kv_align.objectives.objective import Signal
from kv_align.progress import progress_bar
from kv_align.runs import file_digest, read_json, write_json
from kv_align.signals import signal_of

LOGGER = logging.getLogger(__name__)
SHARD = 256
"""Examples of one file."""
KEPT: dict[Signal, tuple[str, ...]] = {
    "keys_values": ("k", "v"),
    "keys_values_queries": ("k", "v", "q"),
    "relations": ("k", "v", "q"),
    "hidden_states": ("hidden",),
}
"""What is kept for each signal; one that is not here is not cached."""
_BATCH = 16
_POLL_S = 0.2


def open_cache(
    config: Config,
    teacher: Teacher,
    reader: Reader,
    train: PreparedSplit,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Teacher | CachedTeacher:
    """Return what training asks for the teacher's states: the teacher itself where `teacher_cache` is off."""
    if config.teacher_cache == "off":
        return teacher
    assert config.teacher_cache_dtype is not None
    folder = Path(config.teacher_cache)
    if config.teacher_cache == "auto":
        folder = Path(os.environ.get("KV_ALIGN_TEACHER_CACHE") or Path(HF_HOME) / "kv_align" / "teacher")
    key = {
        "teacher": weights_digest(teacher.model),
        "layers": teacher.layers,
        "rotated": teacher.rotated,
        "precision": config.trainer.mixed_precision,
    }
    dtype = getattr(torch, config.teacher_cache_dtype)
    signal = cast(Signal, signal_of(config.loss))
    return CachedTeacher(teacher, train.teacher, reader.pad_id, signal, folder, key, dtype, autocast)


class CachedTeacher:
    """A teacher that reads its states of one split from disk, and computes what is not there yet.

    Parameters
    ----------
    teacher
        The teacher itself.
    texts
        The split as it reads it.
    pad_id
        To pad them with.
    signal
        What the objective asks for; one of `KEPT`.
    folder
        Shared by all runs.
    key
        What the states depend on beside the texts and the precision: `{"teacher": digest, "layers": [...], ...}`.
    dtype
        Precision on disk; states come back in the one that the teacher gave them in.
    autocast
        Makes the context in which models run in training.
    """

    def __init__(
        self,
        teacher: Teacher,
        texts: Sequence[Encoded],
        pad_id: int,
        signal: Signal,
        folder: Path,
        key: dict[str, object],
        dtype: torch.dtype,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._teacher, self._texts, self._pad_id, self._signal = teacher, texts, pad_id, signal
        self._dtype, self._autocast = dtype, autocast
        about = {**key, "texts": _digest_of(texts), "dtype": str(dtype), "examples": len(texts), "shard": SHARD}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.folder = folder / name[:32]
        self._about = about
        self._open: dict[tuple[str, int], tuple[Tensor, list[int], torch.dtype]] = {}

    def fill(self, examples: Iterable[int]) -> None:
        """Compute the shards of these examples that are not on disk; wait for those that other processes compute.

        Raises
        ------
        ConfigError
            If the folder cannot be written or the disk is too small.
        """
        wanted = sorted({example // SHARD for example in examples})
        missing = [shard for shard in wanted if not self._is_there(shard)]
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
        checked = False
        with progress_bar("teacher cache", len(missing)) as advance:
            while missing:
                for shard in list(missing):
                    with _try_lock(self.folder / f"{shard:06d}.lock") as held:
                        if not held:
                            continue
                        if not self._is_there(shard):
                            states = self._compute(shard)
                            if not checked:
                                self._check_space(states, shard, missing)
                                checked = True
                            self._write(shard, states)
                    missing.remove(shard)
                    advance(1)
                if missing:
                    time.sleep(_POLL_S)

    def read(self, batch: Batch, signal: Signal) -> TeacherStates:
        """Return the states of a batch, as the teacher itself would; padding is zero."""
        assert signal == self._signal
        length = batch.teacher.ids.shape[1]
        states = {name: self._padded(name, batch.read_by_teacher or batch.indices, length) for name in KEPT[signal]}
        device = batch.teacher.ids.device
        return TeacherStates(**{name: tensor.to(device, non_blocking=True) for name, tensor in states.items()})

    def _padded(self, name: str, examples: Sequence[int], length: int) -> Tensor:
        padded = None
        for row, example in enumerate(examples):
            block = self._block(name, example)
            if padded is None:
                *outer, _, width = block.shape
                native = self._open[name, example // SHARD][2]
                padded = torch.empty(len(examples), *outer, length, width, dtype=native)
            tokens = block.shape[-2]
            padded[row, ..., :tokens, :] = block
            padded[row, ..., tokens:, :] = 0
        assert padded is not None
        return padded

    def _block(self, name: str, example: int) -> Tensor:
        """One example's states, [..., T, D], where they stand in the file."""
        shard = example // SHARD
        if (name, shard) not in self._open:
            self._open[name, shard] = self._load(name, shard)
        flat, shape, _ = self._open[name, shard]
        per_token = _product(shape)
        first = shard * SHARD
        before = sum(len(text.ids) for text in self._texts[first:example]) * per_token
        tokens = len(self._texts[example].ids)
        return flat[before : before + tokens * per_token].reshape(*shape[:-1], tokens, shape[-1])

    def _load(self, name: str, shard: int) -> tuple[Tensor, list[int], torch.dtype]:
        file, manifest = self._files(name, shard)
        told = read_json(manifest)
        if told is None or not file.is_file() or file_digest(file) != told["sha256"]:
            LOGGER.warning("%s is damaged: computing it again", file)
            manifest.unlink(missing_ok=True)
            self.fill([shard * SHARD])
            told = read_json(manifest)
            assert told is not None
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor("states"), told["shape"], getattr(torch, told["native"])

    def _is_there(self, shard: int) -> bool:
        return all(self._files(name, shard)[1].is_file() for name in KEPT[self._signal])

    def _files(self, name: str, shard: int) -> tuple[Path, Path]:
        return self.folder / f"{name}-{shard:06d}.safetensors", self.folder / f"{name}-{shard:06d}.json"

    def _compute(self, shard: int) -> dict[str, list[Tensor]]:
        """States of each example of a shard, [..., T, D], by name."""
        examples = range(shard * SHARD, min((shard + 1) * SHARD, len(self._texts)))
        blocks: dict[str, dict[int, Tensor]] = {name: {} for name in KEPT[self._signal]}
        # Texts of like length together: little padding.
        by_length = sorted(examples, key=lambda example: len(self._texts[example].ids))
        device = device_of(self._teacher.model)
        for start in range(0, len(by_length), _BATCH):
            some = by_length[start : start + _BATCH]
            tokens = pad([self._texts[example] for example in some], self._pad_id).to(device)
            with self._autocast():
                states = self._teacher.read_tokens(tokens, self._signal)
            for name, found in blocks.items():
                each = getattr(states, name).cpu()
                for row, example in enumerate(some):
                    found[example] = each[row, ..., : len(self._texts[example].ids), :]
        return {name: [found[example] for example in examples] for name, found in blocks.items()}

    def _write(self, shard: int, states: dict[str, list[Tensor]]) -> None:
        for name, blocks in states.items():
            file, manifest = self._files(name, shard)
            if manifest.is_file():
                continue  # another signal has it already
            flat = torch.cat([block.to(self._dtype).flatten() for block in blocks])
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            save_file({"states": flat}, temporary)
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            digest = file_digest(temporary)
            temporary.replace(file)
            shape = [*blocks[0].shape[:-2], blocks[0].shape[-1]]
            native = str(blocks[0].dtype).removeprefix("torch.")
            write_json(manifest, {"sha256": digest, "shape": shape, "native": native})

    def _check_space(self, states: dict[str, list[Tensor]], shard: int, missing: list[int]) -> None:
        """Refuse a disk that cannot hold all of it, by what the first shard takes for its tokens."""
        width = torch.empty(0, dtype=self._dtype).element_size()
        taken = sum(block.numel() for blocks in states.values() for block in blocks) * width
        tokens = [sum(len(text.ids) for text in self._texts[each * SHARD : (each + 1) * SHARD]) for each in missing]
        needed = taken / max(1, tokens[missing.index(shard)]) * sum(tokens)
        free = shutil.disk_usage(self.folder).free
        LOGGER.info("teacher cache: about %.2g GB in %s", needed / 1e9, self.folder)
        if needed > free:
            raise ConfigError(
                f"teacher_cache={self.folder.parent} is not allowed: it needs about {needed / 1e9:.1f} GB and the disk has "
                f"{free / 1e9:.1f} GB free; choose another disk, or teacher_cache=off."
            )


def _digest_of(texts: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text.ids).encode())
    return digest.hexdigest()


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


@contextmanager
def _try_lock(file: Path) -> Iterator[bool]:
    """Hold a lock file that the operating system releases with its process; False if another holds it."""
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
