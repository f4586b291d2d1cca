"""What is read from the cache is what the teacher would have given, whoever wrote it and however they were disturbed."""

import errno
import functools
import multiprocessing
import os
import shutil
import threading
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kv_align.align.aligner import Aligner
from kv_align.config.compose import compose_config
from kv_align.config.identity import content_hash
from kv_align.config.signals import (
    HIDDEN_STATES,
    KEYS_VALUES,
    KEYS_VALUES_QUERIES,
    LOGITS,
    RELATIONS,
    TOKEN_LOSSES,
    Signal,
    Signals,
    TopLogits,
)
from kv_align.data.arithmetic import Arithmetic
from kv_align.data.batch import Batch
from kv_align.data.example import Segment
from kv_align.data.prepared import PreparedSplit, prepare_split
from kv_align.experiment.assembly import Assembly, assemble
from kv_align.experiment.choices import make_source
from kv_align.experiment.distiller import make_distiller
from kv_align.experiment.experiment import run as do_run
from kv_align.models.load import LanguageModel, load_student, load_teacher
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_rows
from kv_align.teacher import shards
from kv_align.teacher.cache import CachedTeacher, TeacherCache
from kv_align.teacher.entries import StateEntry, kept_alike
from kv_align.teacher.teacher import Teacher
from tests.short_runs import results, short_config, without_timing

EXAMPLES = 20
MEASURED = 1  # a text that is read to know what the others take on disk
TOP = TopLogits(k=4, temperature=2.0, vocabulary=490)
EACH = {
    "keys_values": KEYS_VALUES,
    "keys_values_queries": KEYS_VALUES_QUERIES,
    "hidden_states": HIDDEN_STATES,
    "token_losses": TOKEN_LOSSES,
    "logits": LOGITS,
    "top": TOP,
}
SIGNAL = KEYS_VALUES_QUERIES
every_signal = pytest.mark.parametrize("signal", EACH.values(), ids=EACH)
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-8)]


@pytest.fixture(scope="module")
def reader() -> LanguageModel:
    return load_teacher(compose_config([])[0].model, torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 8)


@functools.cache
def split_of(reader: LanguageModel, *, shuffle: bool = False) -> PreparedSplit:
    source = Arithmetic(train_examples=EXAMPLES, validation_examples=2, test_examples=2)
    return prepare_split(source, "train", compose_config([])[0].data, reader, reader, shuffle=shuffle)


class Counted(Teacher):
    """A teacher that counts the texts that it reads."""

    read_texts = 0

    def _run(self, tokens, signals):  # type: ignore[no-untyped-def]
        self.read_texts += len(tokens.ids)
        return super()._run(tokens, signals)


def counted_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts the teacher reads in each of its forward passes from now on."""
    forwards: list[int] = []
    run = Teacher._run

    def counted(self, tokens, signals):  # type: ignore[no-untyped-def]
        forwards.append(len(tokens.ids))
        return run(self, tokens, signals)

    monkeypatch.setattr(Teacher, "_run", counted)
    return forwards


def cache(
    reader: LanguageModel,
    split: PreparedSplit,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    signals: Signals = (SIGNAL,),
    **key: object,
) -> tuple[CachedTeacher, Counted]:
    teacher = Counted(reader.model, [1, 3, 5], rotated=False)
    facts = {"layers": teacher.layers, **key}
    entries = [StateEntry(teacher, split.teacher, reader.pad_id, alike, nullcontext) for alike in kept_alike(signals)]
    return CachedTeacher(entries, signals, folder, facts, dtype), teacher


def folder_of(cached: CachedTeacher) -> Path:
    """Of one that keeps one thing."""
    (folder,) = cached.folders
    return folder


def kept_tokens(batch: Batch, signal: Signal) -> Tensor:
    """[B, R], the teacher's tokens of which something is kept: of logits, those before a scored token."""
    if not signal.predicting:
        return batch.teacher.mask
    return torch.cat((batch.scored[:, 1:], torch.zeros_like(batch.scored[:, :1])), dim=1)


@every_signal
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
def test_it_is_what_the_teacher_gives(
    reader: LanguageModel, tmp_path: Path, signal: Signal, dtype: torch.dtype, tolerance: float
) -> None:
    for shuffle in (False, True) if not signal.predicting else (False,):
        split = split_of(reader, shuffle=shuffle)
        cached, teacher = cache(reader, split, tmp_path / str(shuffle), dtype, (signal,))
        cached.fill(range(EXAMPLES))
        assert teacher.read_texts == EXAMPLES + MEASURED
        for places in ([0, 1, 2], [19, 7, 8, 3], [12]) if not shuffle else ([0, 1, 2], [19, 7, 8, 3]):
            batch = split.collate(places)
            kept = kept_tokens(batch, signal)
            assert kept.any(dim=1).all()
            ours, theirs = cached.read(batch, (signal,)), teacher.read_tokens(batch.teacher, (signal,))
            assert set(ours.tensors) == set(theirs.tensors) == set(signal.fields)
            for name in signal.fields:
                found, expected = ours[name], theirs[name]
                assert found.shape == expected.shape
                assert found.dtype == expected.dtype
                valid = kept.view(len(places), *[1] * (found.dim() - 3), -1, 1)
                if name == "top_indices":
                    assert torch.equal(found * valid, expected * valid)
                else:
                    assert torch.allclose(found * valid, expected * valid, rtol=tolerance, atol=1e-4), name
                assert found.masked_fill(valid, 0).abs().max() == 0


@every_signal
def test_in_float32_and_in_the_same_batch_it_is_what_the_teacher_gives_bit_for_bit(
    reader: LanguageModel, tmp_path: Path, signal: Signal
) -> None:
    split = split_of(reader)
    cached, teacher = cache(reader, split, tmp_path, signals=(signal,))
    cached.fill(range(8))
    # A shard is read in one batch here, its texts by their length.
    batch = split.collate(sorted(range(8), key=lambda example: len(split.teacher[example].ids)))
    ours, theirs = cached.read(batch, (signal,)), teacher.read_tokens(batch.teacher, (signal,))
    assert set(ours.tensors) == set(theirs.tensors) == set(signal.fields)
    for name in signal.fields:
        found, expected = ours[name], theirs[name]
        valid = kept_tokens(batch, signal).view(8, *[1] * (found.dim() - 3), -1, 1)
        assert torch.equal(found, expected.masked_fill(~valid, 0)), name


def test_of_logits_only_those_that_predict_a_scored_token_are_on_disk(reader: LanguageModel, tmp_path: Path) -> None:
    split = split_of(reader)
    scored = int(split.collate(list(range(8))).scored.sum())
    assert 0 < scored < 0.9 * sum(len(text.ids) for text in split.teacher[:8])
    for signal, numbers in ((LOGITS, {"logits": 497}), (TOP, {"top_log_probabilities": 5, "top_indices": 4})):
        cached, _ = cache(reader, split, tmp_path, torch.bfloat16, (signal,))
        cached.fill([0])
        for name, number in numbers.items():
            with safe_open(folder_of(cached) / f"{name}-000000.safetensors", framework="pt") as file:
                stored = file.get_tensor("states")
            assert stored.dtype == (torch.int32 if name == "top_indices" else torch.bfloat16)
            assert stored.numel() == scored * number


def test_it_is_computed_once_and_only_as_far_as_needed(reader: LanguageModel, tmp_path: Path) -> None:
    split = split_of(reader)
    first, teacher = cache(reader, split, tmp_path)
    first.fill([17])
    assert teacher.read_texts == 4 + MEASURED  # the last shard: 16 to 19
    second, another = cache(reader, split, tmp_path)
    second.fill([17, 0])
    assert another.read_texts == 8 + MEASURED
    third, idle = cache(reader, split, tmp_path)
    third.fill([1, 18])
    batch = split.collate([1, 18])
    third.read(batch, (SIGNAL,))
    assert idle.read_texts == 0
    assert folder_of(third) == folder_of(first)


def test_what_another_loss_has_kept_is_shared(reader: LanguageModel, tmp_path: Path) -> None:
    split = split_of(reader)
    keys_values, _ = cache(reader, split, tmp_path, signals=(KEYS_VALUES,))
    keys_values.fill(range(8))
    before = {file.name: file.stat().st_mtime_ns for file in folder_of(keys_values).glob("*.safetensors")}
    queries, _ = cache(reader, split, tmp_path)
    queries.fill(range(8))
    assert folder_of(queries) == folder_of(keys_values)
    after = {file.name: file.stat().st_mtime_ns for file in folder_of(queries).glob("*.safetensors")}
    assert set(after) - set(before) == {"q-000000.safetensors"}
    assert {name: after[name] for name in before} == before


def test_what_is_kept_alike_is_in_one_folder_and_all_of_it_is_read_at_once(
    reader: LanguageModel, tmp_path: Path
) -> None:
    split, signals = split_of(reader), (KEYS_VALUES, RELATIONS, HIDDEN_STATES, TOP)
    assert kept_alike(signals) == [(KEYS_VALUES, RELATIONS, HIDDEN_STATES), (TOP,)]
    cached, teacher = cache(reader, split, tmp_path, signals=signals)
    cached.fill(range(8))
    assert teacher.read_texts == 2 * (8 + MEASURED)
    assert len(cached.folders) == 2
    alone, idle = cache(reader, split, tmp_path, signals=(KEYS_VALUES,))
    alone.fill(range(8))
    assert (folder_of(alone), idle.read_texts) == (cached.folders[0], 0)
    batch = split.collate(sorted(range(8), key=lambda example: len(split.teacher[example].ids)))
    ours, theirs = cached.read(batch, signals), Teacher.read(teacher, batch, signals)
    assert set(ours.tensors) == set(theirs.tensors) == {"k", "v", "q", "hidden", *TOP.fields}
    valid = batch.teacher.mask[:, None, None, :, None]
    for name in ("k", "v", "q"):
        assert torch.equal(ours[name], theirs[name].masked_fill(~valid, 0)), name


def test_other_content_is_another_folder(reader: LanguageModel, tmp_path: Path) -> None:
    split = split_of(reader)
    other_texts = replace(split, examples=split.examples[1:], student=split.student[1:], teacher=split.teacher[1:])
    folders = {
        folder_of(cache(reader, split, tmp_path)[0]),
        folder_of(cache(reader, other_texts, tmp_path)[0]),
        folder_of(cache(reader, split, tmp_path, torch.bfloat16)[0]),
        folder_of(cache(reader, split, tmp_path, teacher="another")[0]),
        folder_of(cache(reader, split, tmp_path, layers=[0])[0]),
        *(
            folder_of(cache(reader, split, tmp_path, signals=(signal,))[0])
            for signal in (TOP, replace(TOP, k=5), replace(TOP, temperature=1.0), replace(TOP, vocabulary=480))
        ),
    }
    assert len(folders) == 9


def test_what_is_scored_otherwise_is_another_folder(reader: LanguageModel, tmp_path: Path) -> None:
    split = split_of(reader)
    texts = [replace(text, segments=[Segment.REASONING, *text.segments[1:]]) for text in split.teacher]
    otherwise = replace(split, teacher=texts)
    for signal, folders in ((TOKEN_LOSSES, 2), (KEYS_VALUES, 1)):
        found = {folder_of(cache(reader, each, tmp_path, signals=(signal,))[0]) for each in (split, otherwise)}
        assert len(found) == folders, signal


@pytest.mark.parametrize(("setting", "value"), [("rms_norm_eps", 1e-3), ("_name_or_path", "moved")])
def test_what_the_teacher_does_with_its_weights_is_of_the_key(
    reader: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: object
) -> None:
    config = compose_config([f"teacher_cache={tmp_path}"])[0]

    def folder() -> Path:
        states = TeacherCache(config, reader, nullcontext).states(
            Teacher(reader.model, [0], rotated=False), split_of(reader), (KEYS_VALUES,), rounded=True
        )
        assert isinstance(states, CachedTeacher)
        return folder_of(states)

    before = folder()
    monkeypatch.setattr(reader.model.config, setting, value)
    assert (folder() == before) == (setting == "_name_or_path")


def test_no_more_texts_are_read_at_once_than_are_evaluated_at_once(
    reader: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config([f"teacher_cache={tmp_path}", "evaluation.batch_size=3"])[0]
    teacher, sizes = Teacher(reader.model, [0], rotated=False), counted_forwards(monkeypatch)
    TeacherCache(config, reader, nullcontext).states(teacher, split_of(reader), (TOKEN_LOSSES,), rounded=False).fill(
        [0]
    )
    assert sizes == [MEASURED, 3, 3, 2]


@pytest.mark.parametrize("ahead", [False, True], ids=["asked", "expected"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_what_is_damaged_is_computed_again(
    reader: LanguageModel, tmp_path: Path, damage: str, ahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    split = split_of(reader)
    cached, _ = cache(reader, split, tmp_path)
    cached.fill(range(8))
    batch = split.collate([2, 3])
    expected = cached.read(batch, (SIGNAL,))
    file = folder_of(cached) / "v-000000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 0xFF
    file.unlink()
    if damage != "gone":
        file.write_bytes(content if damage == "flip" else content[:-1000])
    again, _ = cache(reader, split, tmp_path)
    again.fill(range(8))
    if ahead:
        again.expect([batch])
    found = again.read(batch, (SIGNAL,))
    assert not found["v"].requires_grad
    assert caplog.text.count("is damaged: computing it again") == 1
    assert torch.equal(found["v"], expected["v"])
    assert torch.equal(found["k"], expected["k"])


def test_what_is_expected_is_read_meanwhile_and_nothing_else(
    reader: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(reader)
    cached, _ = cache(reader, split, tmp_path)
    cached.fill(range(EXAMPLES))
    batches = [split.collate(places) for places in ([0, 1], [8, 3], [2, 9], [1, 0])]
    asked = [cached.read(batch, (SIGNAL,)) for batch in batches]
    readers: list[str] = []
    padded = shards.Shards.padded

    def seen(self: object, *given: Any) -> Tensor:
        readers.append("another thread" if threading.current_thread() is not threading.main_thread() else "this one")
        return padded(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(shards.Shards, "padded", seen)
    names = len(SIGNAL.fields)
    cached.expect(batches[:2])
    for place in (3, 1, 0, 0, 2):  # 1 and 0 are expected once
        found = cached.read(batches[place], (SIGNAL,))
        for name, tensor in asked[place].tensors.items():
            assert torch.equal(found[name], tensor)
    assert readers == ["another thread"] * 2 * names + ["this one"] * 3 * names
    monkeypatch.setattr(shards.Shards, "padded", lambda *given: 1 / 0)
    cached.expect([batches[0]])
    with pytest.raises(ZeroDivisionError):
        cached.read(batches[0], (SIGNAL,))


def test_a_run_of_a_billion_steps_is_not_counted_through(tmp_path: Path) -> None:
    loop = assembled(tmp_path, f"teacher_cache={tmp_path / 'cache'}", "data.train_examples=16").loop
    assert loop._places_to_come() == {place for step in range(2) for place in loop._order[step]}
    assert len(loop._places_to_come()) < 16
    loop._num_steps = 10**12
    assert loop._places_to_come() == set(range(16))


def test_all_but_the_first_step_find_their_targets_read_and_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("loss=kv+struct", f"teacher_cache={tmp_path / 'cache'}", "trainer.micro_batch_size=2")
    ahead = rows_of(tmp_path / "ahead", *overrides)
    expected: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(CachedTeacher, "expect", lambda self, batches: expected.append(len(batches)))
        assert rows_of(tmp_path / "asked", *overrides) == ahead
    assert expected == [assembled(tmp_path / "more", *overrides).loop._config.trainer.batch_size // 2, 0]


def fill(reader: LanguageModel, folder: Path, told: Any) -> None:
    """In a process of its own: fill all, and tell how many texts it read for that."""
    cached, teacher = cache(reader, split_of(reader), folder)
    cached.fill(range(EXAMPLES))
    told.put(teacher.read_texts)


def test_processes_that_fill_it_at_once_share_the_work(reader: LanguageModel, tmp_path: Path) -> None:
    # Forked, so that neither imports or loads anything: both are at the first shard at once.
    forked = multiprocessing.get_context("fork")
    told = forked.SimpleQueue()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process", DeprecationWarning)  # of threads, which do nothing here
        jobs = [forked.Process(target=fill, args=(reader, tmp_path, told)) for _ in range(2)]
        for job in jobs:
            job.start()
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in jobs] == [0, 0]
    read = [told.get() for _ in jobs]
    assert sum(read) - EXAMPLES in (MEASURED, 2 * MEASURED)  # the second may come when all is there
    late, idle = cache(reader, split_of(reader), tmp_path)
    late.fill(range(EXAMPLES))
    assert idle.read_texts == 0


def test_a_writer_that_was_killed_leaves_nothing_that_counts(reader: LanguageModel, tmp_path: Path) -> None:
    split = split_of(reader)
    cached, _ = cache(reader, split, tmp_path)
    cached.fill(range(16))
    for name in ("k", "v", "q"):
        shutil.copy(folder_of(cached) / f"{name}-000000.safetensors", folder_of(cached) / f"{name}-000001.123.tmp")
    (folder_of(cached) / "q-000001.json").unlink()  # killed before its last file had its manifest
    again, teacher = cache(reader, split, tmp_path)
    again.fill(range(16))
    assert teacher.read_texts == 8 + MEASURED


@pytest.mark.parametrize("signal", [SIGNAL, LOGITS, TOP], ids=["states", "logits", "top"])
def test_a_disk_is_large_enough_to_the_byte_or_refused_before_anything_is_written(
    reader: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: Signal
) -> None:
    split = split_of(reader)
    tokens = sum(len(text.ids) for text in split.teacher)
    scored = int(split.collate(list(range(EXAMPLES))).scored.sum())
    # Three layers, 4 heads of keys and of values and 8 of queries, width 24; half precision, and places in 32 bits.
    needed = {SIGNAL: 2 * tokens * 3 * 16 * 24, LOGITS: 2 * scored * 497, TOP: scored * (2 * 5 + 4 * 4)}[signal]
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    cached, teacher = cache(reader, split, tmp_path, torch.bfloat16, (signal,))
    with pytest.raises(ConfigError) as caught:
        cached.fill(range(EXAMPLES))
    assert str(caught.value) == (
        f"teacher_cache={tmp_path} is not allowed: it needs about 0.0 GB and the disk has 0.0 GB free; choose another disk, "
        "or teacher_cache=off."
    )
    assert teacher.read_texts == MEASURED
    assert not list(folder_of(cached).glob("*.safetensors"))
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    cached.fill(range(EXAMPLES))
    written = sum(file.stat().st_size for file in folder_of(cached).glob("*.safetensors"))
    assert needed < written < needed + 6 * 200  # and a header for each file


def test_a_file_system_without_locks_is_refused_before_anything_is_written(
    reader: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(stream: object, operation: int) -> None:  # as NFS and Lustre answer where they are mounted without locks
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(shards.fcntl, "flock", flock)
    cached, _ = cache(reader, split_of(reader), tmp_path)
    with pytest.raises(ConfigError) as caught:
        cached.fill(range(EXAMPLES))
    assert str(caught.value) == (
        f"teacher_cache={tmp_path} is not allowed: files there cannot be locked (No locks available); choose another folder, "
        "or teacher_cache=off."
    )
    assert not list(folder_of(cached).glob("*.safetensors"))


# Runs, as short as may be: what is read from the cache has no size

BRIEF = (
    "trainer.max_steps=2",
    "trainer.warmup_steps=1",
    "evaluation.interval=2",
    "evaluation.exact_match_examples=0",
    "evaluation.validation_examples=4",
    "evaluation.probe_examples=4",
    "evaluation.calibration_examples=4",
    "data.train_examples=8",
)


def assembled(folder: Path, *overrides: str) -> Assembly:
    built = assemble(short_config(*BRIEF, *overrides), RunDirectory(folder), folder)
    built.loop.resume()
    return built


def rows_of(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The optimizer steps of a brief run, with their diagnostics."""
    loop, rows = assembled(folder, *overrides).loop, []
    for micro_batches in loop.batches(0):
        row = loop.step(micro_batches, logged=True)[1]
        assert row is not None
        loop.progress.step += 1
        rows.append(row)
    return rows


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    """All columns, diagnostics included."""
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours) == list(theirs)
        for column, value in theirs.items():
            expected_value = None if value is None else pytest.approx(value, rel=tolerance, abs=tolerance)
            assert ours[column] == expected_value, column


FROZEN = ("loss=kv+struct", "align.fit=frozen")
RUNS = {
    "states": ("loss=kv+struct",),
    "logits": ("loss=logit_kd",),
    "top": ("loss=logit_kd", "loss.top_k=6", "loss.temperature=2.0"),
    "hidden": ("loss=hidden",),
    "summed": ("loss=kv+struct+logit", "loss.parts.logit.top_k=6"),
    "targets": (*FROZEN, "teacher_cache_keeps=targets"),
    "targets of a flat map": ("aligner=flat", "align.fit=frozen", "keys=rotated", "teacher_cache_keeps=targets"),
    "targets through the time warp": (
        *FROZEN,
        "data.rationale=short",
        "time_warp.smoothness=0.5",
        "layer_map=reverse",
        "teacher_cache_keeps=targets",
    ),
    "targets paired anew": ("align.fit=frozen", "data.shuffle_teacher=true", "teacher_cache_keeps=targets"),
}


# Of those that differ in what is kept alone, the others are done by the exhaustive tests.
MORE = ("logits", "hidden", "targets of a flat map", "targets paired anew")


def brief(kinds: Iterable[str]) -> list[Any]:
    return [pytest.param(kind, marks=[pytest.mark.slow] if kind in MORE else []) for kind in kinds]


@pytest.mark.parametrize("kind", brief(RUNS))
def test_runs_with_and_without_it_agree_to_its_rounding(kind: str, tmp_path: Path) -> None:
    folder = f"teacher_cache={tmp_path / 'cache'}"
    off = rows_of(tmp_path / "off", *RUNS[kind])
    single = rows_of(tmp_path / "float32", *RUNS[kind], folder, "teacher_cache_dtype=float32")
    half = rows_of(tmp_path / "bfloat16", *RUNS[kind], folder)
    assert_alike(single, off, 2e-4)
    losses = {name: [row["total_loss"] for row in rows] for name, rows in (("off", off), ("1", single), ("2", half))}
    assert losses["1"] == pytest.approx(losses["off"], rel=1e-5)
    assert losses["2"] == pytest.approx(losses["off"], rel=3e-3)
    assert losses["2"] != losses["off"]


def test_a_whole_run_with_it_ends_where_one_without_does(tmp_path: Path) -> None:
    overrides = {"off": (), "cached": (f"teacher_cache={tmp_path / 'cache'}", "teacher_cache_dtype=float32")}
    ends = {}
    for kind, choices in overrides.items():
        run = RunDirectory(tmp_path / kind)
        assert do_run(short_config(*BRIEF, "loss=kv+struct", *choices), run.path) == "finished"
        rows = read_rows(run.metrics_file) + read_rows(run.evaluations_file)
        ends[kind] = [without_timing(row) for row in rows]
    assert_alike(ends["cached"], ends["off"], 1e-3)


WITHOUT_A_TEACHER = {
    **{kind: RUNS[kind] for kind in ("states", "logits", "top", "hidden", "summed", "targets")},
    "an informed start": ("loss=kv+struct", "init=procrustes", "layer_map=cka", "model.student_start=pretrained"),
    "relations": ("loss=relations", "aligner=none"),
    "paired anew": ("data.shuffle_teacher=true",),
}


@pytest.mark.parametrize("kind", brief(WITHOUT_A_TEACHER))
def test_a_run_that_finds_it_filled_never_runs_the_teacher(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*WITHOUT_A_TEACHER[kind], f"teacher_cache={tmp_path / 'cache'}")
    forwards = counted_forwards(monkeypatch)
    found = []
    for number in range(2):
        run = RunDirectory(tmp_path / str(number))
        forwards.clear()
        assert do_run(short_config(*BRIEF, *overrides), run.path) == "finished"
        found.append(results(run))
    assert forwards == []
    assert found[0] == found[1]


def test_what_is_evaluated_is_not_rounded(tmp_path: Path) -> None:
    built = assemble(short_config(f"teacher_cache={tmp_path / 'cache'}"), RunDirectory(tmp_path), tmp_path)
    rounded = {}
    for kind, split, source in (
        ("train", built.splits.train, built.loop._teacher),
        ("validation", built.splits.validation, built.validation_teacher),
    ):
        # A shard is read in one batch here, its texts by their length.
        by_length = sorted(range(8), key=lambda example: len(split.teacher[example].ids))
        batch = split.collate(by_length)
        found, expected = (each.read(batch, (KEYS_VALUES,))["k"] for each in (source, built.teacher))
        rounded[kind] = not torch.equal(found, expected.masked_fill(~batch.teacher.mask[:, None, None, :, None], 0))
    assert rounded == {"train": True, "validation": False}


def test_in_bfloat16_starts_are_fitted_to_what_training_reads_with_and_without_it(tmp_path: Path) -> None:
    overrides = ("trainer.mixed_precision=bf16", "init=procrustes", "model.student_start=pretrained")
    cached = (f"teacher_cache={tmp_path / 'cache'}", "teacher_cache_dtype=float32")
    off, on = (
        assemble(short_config(*overrides, *each), RunDirectory(tmp_path), tmp_path).loop._distiller
        for each in ((), cached)
    )
    # Half precision sums in another order in another batch, but nothing is measured in another precision.
    torch.testing.assert_close(on.key_variance, off.key_variance, rtol=2e-5, atol=0)
    torch.testing.assert_close(on.value_variance, off.value_variance, rtol=2e-5, atol=0)


def test_whether_there_is_a_cache_is_of_a_runs_identity_and_where_it_is_is_not(tmp_path: Path) -> None:
    here, there = f"teacher_cache={tmp_path}", f"teacher_cache={tmp_path / 'moved'}"
    targets = ("align.fit=frozen", "teacher_cache_keeps=targets")
    commands = [(), (here,), (here, "teacher_cache_dtype=float32"), ("align.fit=frozen", here), (*targets, here)]
    assert len({content_hash(short_config(*command)) for command in commands}) == len(commands)
    for command in ((), targets):
        assert content_hash(short_config(*command, here)) == content_hash(short_config(*command, there))
    # Kept targets were written down by no run without a cache, nor of an aligner that learns.
    assert content_hash(short_config(*targets)) == content_hash(short_config("align.fit=frozen"))
    assert content_hash(short_config("teacher_cache_keeps=targets", here)) == content_hash(short_config(here))


def test_with_kept_targets_a_step_runs_neither_teacher_nor_aligner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*FROZEN, "teacher_cache_keeps=targets", f"teacher_cache={tmp_path / 'cache'}")
    first = rows_of(tmp_path / "first", *overrides)
    calls = {"teacher": 0, "aligner": 0}
    run, forward = Teacher._run, Aligner.forward

    def counted(self, *given):  # type: ignore[no-untyped-def]
        calls["teacher"] += 1
        return run(self, *given)

    def align(self, *given):  # type: ignore[no-untyped-def]
        calls["aligner"] += 1
        return forward(self, *given)

    monkeypatch.setattr(Teacher, "_run", counted)
    monkeypatch.setattr(Aligner, "forward", align)
    with_files = assembled(tmp_path / "again", *overrides)
    calls |= {"teacher": 0, "aligner": 0}
    micro_batches = next(with_files.loop.batches(0))
    losses, _ = with_files.loop.step(micro_batches, logged=True)
    assert calls == {"teacher": 0, "aligner": 0}
    assert losses["total_loss"] == first[0]["total_loss"]
    states = assembled(tmp_path / "raw", *FROZEN, overrides[-1])
    calls |= {"teacher": 0, "aligner": 0}
    states.loop.step(micro_batches, logged=True)
    assert calls == {"teacher": 0, "aligner": 1}


def test_targets_of_another_aligner_layer_map_or_reading_are_other_files(reader: LanguageModel, tmp_path: Path) -> None:
    base = (*FROZEN, "teacher_cache_keeps=targets", f"teacher_cache={tmp_path / 'cache'}")
    others = [
        ("seed=1",),
        ("aligner=flat",),
        ("init=random",),
        ("aligner.elastic=true",),
        ("keys=rotated",),
        ("layer_map=last",),
        ("layer_map=reverse",),
        ("time_warp.smoothness=0.5",),
        ("data.rationale=short",),
        ("loss=kv",),
        ("teacher_cache_keeps=states",),
    ]
    folders = []
    student = load_student(short_config().model, 0, torch.device("cpu"))
    splits = {}
    # The loss's weights and rates change nothing of it.
    for other in [(), ("loss.lambda_kv=0.25", "trainer.lr=1e-4"), *others]:
        config = short_config(*BRIEF, *base, *other)
        rationale = config.data.rationale
        if rationale not in splits:
            splits[rationale] = prepare_split(make_source(config), "train", config.data, student, reader, shuffle=False)
        train = splits[rationale]
        distiller, teacher, layers = make_distiller(
            config, reader, student, train, nullcontext, lambda teacher, signals: teacher
        )
        kept = TeacherCache(config, reader, nullcontext)
        cached = kept.training(teacher, train, distiller.loss.requests, distiller.aligner, layers)
        assert isinstance(cached, CachedTeacher)
        folders.append(folder_of(cached))
    assert folders[0] == folders[1]
    assert len(set(folders)) == 1 + len(others)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "an aligner that learns, or none"),
        (("loss=relations", "aligner=none"), "an aligner that learns, or none"),
        (
            ("align.fit=frozen", "data.shuffle_teacher=true"),
            "data.shuffle_teacher=true, where they depend on the batch",
        ),
    ],
)
def test_where_targets_cannot_be_kept_states_are(overrides: tuple[str, ...], says: str) -> None:
    config, notes = compose_config([*overrides, "teacher_cache=auto", "teacher_cache_keeps=targets"])
    assert config == compose_config([*overrides, "teacher_cache=auto"])[0]
    assert f"teacher_cache_keeps=targets has no effect with {says}: states are kept." in notes


def test_a_loss_that_asks_nothing_of_the_teacher_is_the_same_run_with_and_without() -> None:
    with_cache, without = (compose_config(["loss=ce", f"teacher_cache={each}"])[0] for each in ("auto", "off"))
    assert with_cache.teacher_cache == "auto"
    assert content_hash(with_cache) == content_hash(without)
    assert with_cache.model_copy(update={"teacher_cache": "off"}) == without


def test_it_is_measured_by_the_files_of_the_other_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, forwards = f"teacher_cache={tmp_path / 'cache'}", counted_forwards(monkeypatch)
    ends = {}
    for name, choices in {"kv": (cached,), "ce": ("loss=ce", cached), "alone": ("loss=ce",)}.items():
        forwards.clear()
        run = RunDirectory(tmp_path / name)
        assert do_run(short_config(*BRIEF, *choices), run.path) == "finished"
        ends[name] = read_rows(run.evaluations_file)
        assert (forwards == []) == (name == "ce")
    assert_alike(ends["ce"], ends["alone"], 1e-5)


@pytest.mark.parametrize("key", ["dtype", "keeps"])
def test_a_cache_must_be_told_what_it_is(key: str) -> None:
    with pytest.raises(ConfigError, match=f"teacher_cache_{key}=null is not allowed: set teacher_cache_{key} to"):
        compose_config(["teacher_cache=auto", f"teacher_cache_{key}=null"])
