"""What is read from the cache is what the teacher would have given, whoever wrote it and however they were disturbed."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kv_align import teacher_cache
from kv_align.compose import compose_config
from kv_align.data.arithmetic import Arithmetic
from kv_align.data.prepared import PreparedSplit, prepare_split
from kv_align.distill import Teacher
from kv_align.errors import ConfigError
from kv_align.experiment import run as do_run
from kv_align.models import Reader, load_teacher
from kv_align.runs import RunDirectory, read_rows
from kv_align.teacher_cache import CachedTeacher
from tests.short_runs import short_config

EXAMPLES = 20
SIGNAL = "keys_values_queries"


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_teacher(compose_config([])[0].model, torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD", 8)


def split_of(reader: Reader, *, shuffle: bool = False) -> PreparedSplit:
    source = Arithmetic(train_examples=EXAMPLES, validation_examples=2, test_examples=2)
    return prepare_split(source, "train", compose_config([])[0].data, reader, reader, shuffle=shuffle)


class Counted(Teacher):
    """A teacher that counts the texts that it reads."""

    read_texts = 0

    def read_tokens(self, tokens, signal):  # type: ignore[no-untyped-def]
        self.read_texts += len(tokens.ids)
        return super().read_tokens(tokens, signal)


def cache(reader: Reader, split: PreparedSplit, folder: Path, dtype: torch.dtype = torch.float32, **key: object):  # type: ignore[no-untyped-def]
    teacher = Counted(reader.model, [1, 3, 5], rotated=False)
    facts = {"layers": teacher.layers, **key}
    return CachedTeacher(teacher, split.teacher, reader.pad_id, SIGNAL, folder, facts, dtype, nullcontext), teacher


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-8)])
def test_it_is_what_the_teacher_gives(
    reader: Reader, tmp_path: Path, shuffle: bool, dtype: torch.dtype, tolerance: float
) -> None:
    split = split_of(reader, shuffle=shuffle)
    cached, teacher = cache(reader, split, tmp_path, dtype)
    cached.fill(range(EXAMPLES))
    assert teacher.read_texts == EXAMPLES
    for places in ([0, 1, 2], [19, 7, 8, 3], [12]):
        batch = split.collate(places)
        ours, theirs = cached.read(batch, SIGNAL), Teacher.read(teacher, batch, SIGNAL)
        for name in ("k", "v", "q"):
            found, expected = getattr(ours, name), getattr(theirs, name)
            assert found.shape == expected.shape
            assert found.dtype == expected.dtype
            valid = batch.teacher.mask[:, None, None, :, None]
            assert torch.allclose(found * valid, expected * valid, rtol=tolerance, atol=1e-5), name
            assert (found * ~valid).abs().max() == 0


def test_it_is_computed_once_and_only_as_far_as_needed(reader: Reader, tmp_path: Path) -> None:
    split = split_of(reader)
    first, teacher = cache(reader, split, tmp_path)
    first.fill([17])
    assert teacher.read_texts == 4  # the last shard: 16 to 19
    second, another = cache(reader, split, tmp_path)
    second.fill([17, 0])
    assert another.read_texts == 8
    third, idle = cache(reader, split, tmp_path)
    third.fill([1, 18])
    batch = split.collate([1, 18])
    third.read(batch, SIGNAL)
    assert idle.read_texts == 0
    assert third.folder == first.folder


def test_other_content_is_another_folder(reader: Reader, tmp_path: Path) -> None:
    split = split_of(reader)
    other_texts = PreparedSplit(split.examples[1:], split.student[1:], split.teacher[1:], split.collate, 0, 0)
    folders = {
        cache(reader, split, tmp_path)[0].folder,
        cache(reader, other_texts, tmp_path)[0].folder,
        cache(reader, split, tmp_path, torch.bfloat16)[0].folder,
        cache(reader, split, tmp_path, teacher="another")[0].folder,
        cache(reader, split, tmp_path, layers=[0])[0].folder,
    }
    assert len(folders) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_what_is_damaged_is_computed_again(
    reader: Reader, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    split = split_of(reader)
    cached, _ = cache(reader, split, tmp_path)
    cached.fill(range(8))
    batch = split.collate([2, 3])
    expected = cached.read(batch, SIGNAL)
    file = cached.folder / "v-000000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 0xFF
    file.unlink()
    if damage != "gone":
        file.write_bytes(content if damage == "flip" else content[:-1000])
    again, _ = cache(reader, split, tmp_path)
    again.fill(range(8))
    found = again.read(batch, SIGNAL)
    assert "is damaged: computing it again" in caplog.text
    assert torch.equal(found.v, expected.v)
    assert torch.equal(found.k, expected.k)


FILLER = """
import sys
from pathlib import Path
from kv_align import teacher_cache
teacher_cache.SHARD = 8
from tests.kv_align.test_teacher_cache import EXAMPLES, cache, split_of
from kv_align.compose import compose_config
from kv_align.models import load_teacher
import torch
reader = load_teacher(compose_config([])[0].model, torch.device("cpu"))
cached, teacher = cache(reader, split_of(reader), Path(sys.argv[1]))
cached.fill(range(EXAMPLES))
print(teacher.read_texts)
"""


def test_processes_that_fill_it_at_once_share_the_work(reader: Reader, tmp_path: Path) -> None:
    jobs = [
        subprocess.Popen([sys.executable, "-c", FILLER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    read = [int(job.communicate(timeout=300)[0]) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert sum(read) == EXAMPLES
    late, idle = cache(reader, split_of(reader), tmp_path)
    late.fill(range(EXAMPLES))
    assert idle.read_texts == 0


def test_a_writer_that_was_killed_leaves_nothing_that_counts(reader: Reader, tmp_path: Path) -> None:
    split = split_of(reader)
    cached, _ = cache(reader, split, tmp_path)
    cached.fill(range(16))
    for name in ("k", "v", "q"):
        shutil.copy(cached.folder / f"{name}-000000.safetensors", cached.folder / f"{name}-000001.123.tmp")
    (cached.folder / "q-000001.json").unlink()  # killed before its last file had its manifest
    again, teacher = cache(reader, split, tmp_path)
    again.fill(range(16))
    assert teacher.read_texts == 8


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    cached, _ = cache(reader, split_of(reader), tmp_path)
    with pytest.raises(ConfigError, match=r"it needs about 0\.0 GB and the disk has 0\.0 GB free; choose another disk"):
        cached.fill(range(EXAMPLES))
    assert not list(cached.folder.glob("*.safetensors"))


def test_runs_with_and_without_it_agree_to_its_rounding(tmp_path: Path) -> None:
    rows, hashes = {}, {}
    kinds = {
        "off": (),
        "float32": (f"teacher_cache={tmp_path / 'cache'}", "teacher_cache_dtype=float32"),
        "bfloat16": (f"teacher_cache={tmp_path / 'cache'}",),
    }
    for kind, overrides in kinds.items():
        run = RunDirectory(tmp_path / kind)
        config = short_config("loss=kv+struct", *overrides)
        assert do_run(config, run.path) == "finished"
        rows[kind] = [row["total_loss"] for row in read_rows(run.metrics_file)]
        hashes[kind] = json.loads(run.summary_file.read_text())["content_hash"]
    assert rows["float32"] == pytest.approx(rows["off"], rel=1e-5)
    assert rows["bfloat16"] == pytest.approx(rows["off"], rel=3e-3)
    assert rows["bfloat16"] != rows["off"]
    assert len(set(hashes.values())) == 3
    elsewhere = short_config("loss=kv+struct", f"teacher_cache={tmp_path / 'moved'}")
    assert teacher_cache.Path(elsewhere.teacher_cache) == tmp_path / "moved"
    from kv_align.config import content_hash

    assert content_hash(elsewhere) == hashes["bfloat16"], "where it is changes no number"


def test_a_loss_that_cannot_use_it_is_the_same_run_with_and_without() -> None:
    with_cache, notes = compose_config(["loss=logit_kd", "teacher_cache=auto"])
    assert with_cache == compose_config(["loss=logit_kd"])[0]
    assert any("teacher_cache=auto has no effect on loss=logit_kd" in note for note in notes)
