"""What the loss needs of the teacher, computed once: all arms and seeds of a sweep read the same files.

Kept are the teacher's states of the layers that are read, or its logits at the tokens that predict a scored one: whole (a
vocabulary of numbers for each, seldom worth its disk) or, with `loss.top_k`, of the likeliest tokens alone
(`kv_align.losses.predictions.top_k`). The latter is all that this loss looks at: with and without a cache it is the same.

`teacher_cache_keeps=targets` keeps, for an aligner that never learns, what it makes of the states: steps then need no
aligner, and read as much less as the student's states are smaller than the teacher's. It is a setting, and not what every
frozen run does, since targets are of one aligner: each seed draws another, so each runs the teacher and writes files of its
own, where raw states are written once and are mostly there already, for the arms that learn. It pays for one aligner
whose runs pass over their texts many times, or that differ in the student's rates or weights alone. On the embedded pair
(batches of 8, one thread, processor time of a step without cache, with states, with targets):

    structured, kv+struct   429, 254, 238 ms   2304 and 768 bytes per token on disk
    structured, kv          401, 210, 189 ms   1152 and 384
    flat, kv+struct         555, 350, 258 ms   2304 and 768

so for eight seeds targets take 2.7 times the disk of states, and save a structured arm a tenth of its step. Where
`data.shuffle_teacher` pairs texts anew in every batch, no example has a target of its own: states are kept.

What training reads, calibration included, is kept in `teacher_cache_dtype`. What is measured is kept as it was computed:
states of the validation texts (of the probe as well) and the teacher's own losses on them. So of the teacher's forward passes
a run that finds the files there makes none, and arms whose loss asks nothing of the teacher are measured by the same files.

From a float32 cache comes, bit for bit, what the teacher gives of a text in the batch in which it was read for the cache. In
another batch, with another number and length of texts, matrix products sum in another order, so that two batches of a run
without cache do not agree in the last bits either: results agree to about 1e-5.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn

from kv_align.config.config import Config
from kv_align.config.signals import Signals
from kv_align.data.batch import Batch
from kv_align.data.prepared import PreparedSplit
from kv_align.models.load import LanguageModel, weights_digest
from kv_align.teacher.entries import CacheEntry, StateEntry, TargetEntry, kept_alike
from kv_align.teacher.shards import AT_ONCE, Shards
from kv_align.teacher.teacher import Autocast, Teacher, TeacherStates

_NO_MATTER = ("_name_or_path", "transformers_version")
"""What a model's config says of where it came from."""


class TeacherCache:
    """Opens what is kept of a run's teacher on disk; where `teacher_cache` is off, the teacher itself is what is asked.

    Parameters
    ----------
    config
        Of the run.
    reader
        The teacher.
    autocast
        Makes the context in which models run in training.
    """

    def __init__(self, config: Config, reader: LanguageModel, autocast: Autocast) -> None:
        self._config, self._reader, self._autocast = config, reader, autocast

    def states(
        self, teacher: Teacher, split: PreparedSplit, signals: Signals, *, rounded: bool
    ) -> Teacher | CachedTeacher:
        """Return whom to ask for what the teacher gives of a split.

        Parameters
        ----------
        teacher
            Of the layers that are read.
        split
            What it reads.
        signals
            What is asked of it.
        rounded
            Whether `teacher_cache_dtype` says in which precision it is kept; else it is kept as it was computed.
        """
        if self._config.teacher_cache == "off" or not signals:
            return teacher
        return self._open(teacher, self._entries(teacher, split, signals), signals, rounded=rounded)

    def training(
        self, teacher: Teacher, split: PreparedSplit, signals: Signals, aligner: nn.Module | None, layers: list[int]
    ) -> Teacher | CachedTeacher:
        """Return whom training asks: as `states`, or for targets where `teacher_cache_keeps` says so.

        Parameters
        ----------
        teacher
            Of the layers that are read.
        split
            What training reads.
        signals
            What the loss asks for.
        aligner
            As it starts.
        layers
            The teacher layer of each student layer.
        """
        config = self._config
        if config.teacher_cache_keeps != "targets":
            return self.states(teacher, split, signals, rounded=True)
        assert aligner is not None
        assert config.time_warp is not None
        about = {
            "maps": config.aligner.model_dump(by_alias=True, exclude={"name"}),
            "layers": layers,
            "time_warp": config.time_warp.model_dump(by_alias=True, exclude={"name"}),
        }
        projected = tuple(signal for signal in signals if signal.through_aligner)
        others = tuple(signal for signal in signals if not signal.through_aligner)
        # A copy: whatever wraps it in training may take its parameters apart.
        targets = TargetEntry(teacher, copy.deepcopy(aligner), split, projected, self._autocast, about)
        return self._open(teacher, [targets, *self._entries(teacher, split, others)], signals, rounded=True)

    def _entries(self, teacher: Teacher, split: PreparedSplit, signals: Signals) -> list[CacheEntry]:
        return [
            StateEntry(teacher, split.teacher, self._reader.pad_id, alike, self._autocast)
            for alike in kept_alike(signals)
        ]

    def _open(
        self, teacher: Teacher, entries: Sequence[CacheEntry], signals: Signals, *, rounded: bool
    ) -> CachedTeacher:
        config, folder = self._config, Path(self._config.teacher_cache)
        if config.teacher_cache == "auto":
            folder = Path(os.environ.get("KV_ALIGN_TEACHER_CACHE") or Path(HF_HOME) / "kv_align" / "teacher")
        key = {
            **self._about_teacher,
            "layers": teacher.layers,
            "rotated": teacher.rotated,
            "precision": config.trainer.mixed_precision,
        }
        dtype = None
        if rounded:
            assert config.teacher_cache_dtype is not None
            dtype = getattr(torch, config.teacher_cache_dtype)
        # Who lowers it has no memory for more.
        at_once = min(AT_ONCE, config.evaluation.batch_size)
        return CachedTeacher(entries, signals, folder, key, dtype, at_once)

    @cached_property
    def _about_teacher(self) -> dict[str, object]:
        """Its weights, and what it does with them: rotary base, scale of norms and the like are told by its config alone."""
        model = self._reader.model
        settings = {key: value for key, value in model.config.to_dict().items() if key not in _NO_MATTER}
        serialized = json.dumps(settings, sort_keys=True, default=str)
        return {"teacher": weights_digest(model), "settings": hashlib.sha256(serialized.encode()).hexdigest()}


class CachedTeacher:
    """A teacher of which what is needed on one split is read from disk, and computed where it is not there yet.

    Parameters
    ----------
    entries
        What of it, and how each is computed.
    signals
        What the loss asks for.
    folder
        Shared by all runs.
    key
        What the teacher gives depends on, beside what each entry says: `{"teacher": digest, "layers": [...], ...}`.
    dtype
        Precision on disk, None for the one in which it was computed; what is read comes back in that.
    at_once
        Examples that are computed at once.
    """

    def __init__(
        self,
        entries: Sequence[CacheEntry],
        signals: Signals,
        folder: Path,
        key: dict[str, object],
        dtype: torch.dtype | None,
        at_once: int = AT_ONCE,
    ) -> None:
        self._signals = signals
        self._thread = ThreadPoolExecutor(1, "teacher cache")
        self._ahead: dict[object, Future[list[dict[str, torch.Tensor]]]] = {}
        self._opened = [
            (entry, Shards(folder, {**key, **entry.about}, entry.names, entry.spans, dtype, entry.compute, at_once))
            for entry in entries
        ]

    @property
    def folders(self) -> list[Path]:
        """Where the files of this content are, one folder for each entry."""
        return [shards.folder for _, shards in self._opened]

    def fill(self, examples: Iterable[int]) -> None:
        """Compute what is not on disk of these examples; wait for what other processes compute.

        Raises
        ------
        ConfigError
            If a folder cannot be written or the disk is too small.
        """
        wanted = list(examples)
        for _, shards in self._opened:
            shards.fill(wanted)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Begin to read batches while others are computed with: hashing, reading and padding need no device."""
        for batch in batches:
            self._ahead[self._places(batch)] = self._thread.submit(self._load, batch)

    def read(self, batch: Batch, signals: Signals) -> TeacherStates:
        """Return what the teacher itself would have given of a batch, or targets; padding is zero."""
        assert signals == self._signals
        expected = self._ahead.pop(self._places(batch), None)
        if expected is None:
            wait(self._ahead.values())  # the files are opened by one at a time
        loaded = self._load(batch) if expected is None else expected.result()
        device, states = batch.student.ids.device, TeacherStates()
        for (entry, _), tensors in zip(self._opened, loaded, strict=True):
            states |= entry.given({name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
        return states

    def _places(self, batch: Batch) -> object:
        return tuple((*examples, length) for examples, length in (entry.rows(batch) for entry, _ in self._opened))

    def _load(self, batch: Batch) -> list[dict[str, torch.Tensor]]:
        """Return the tensors of each entry, on the CPU; where there is a GPU, in memory that it can copy by itself."""
        loaded = []
        for entry, shards in self._opened:
            examples, length = entry.rows(batch)
            tensors = {name: shards.padded(name, examples, length) for name in entry.names}
            pinned = torch.cuda.is_available()
            loaded.append({name: tensor.pin_memory() if pinned else tensor for name, tensor in tensors.items()})
        return loaded
