"""What a run is: its inputs by content, its choices by name, and what version 0.1.0 called it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_align.config.compose import compose_config
from kv_align.config.config import Config
from kv_align.config.identity import content_hash, continued_run, going_on
from kv_align.config.inputs import check_inputs, digest_inputs
from kv_align.config.model_card import EMBEDDED
from kv_align.config.targets import BASES, FORMER_PATHS, RESULTS, check_target, config_directory, own_choices
from kv_align.runs import digests
from kv_align.runs.digests import digest_of
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, write_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of digests of its own, and none in memory."""
    monkeypatch.setenv("KV_ALIGN_CACHE", str(tmp_path / "cache"))
    digests._remembered.cache_clear()
    yield tmp_path / "cache"
    digests._remembered.cache_clear()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Data, two models and an aligner of the user's own."""
    folder = tmp_path / "inputs"
    for role in ("teacher", "student"):
        shutil.copytree(EMBEDDED / role, folder / role)
    (folder / "data").mkdir()
    for split in ("train", "test"):
        row = json.dumps({"question": f"{split}?", "answer": "one\n#### 1"})
        (folder / "data" / f"{split}.jsonl").write_text(f"{row}\n" * 3)
    (folder / "own_aligner.py").write_text(
        "from kv_align.align.structured import StructuredMap\nfrom own_helper import SCALE\n\n\n"
        "class Own(StructuredMap):\n    uses_init = True\n"
        "    def __init__(self, shape, start, *, share_dim_proj: bool, share_layers: bool, elastic: bool) -> None: ...\n"
    )
    (folder / "own_helper.py").write_text("SCALE = 1\n")
    return folder


def commands(inputs: Path) -> list[str]:
    return [
        "model=pair",
        f"model.teacher={inputs}/teacher",
        f"model.student={inputs}/student",
        "data=gsm8k",
        f"data.path={inputs}/data",
        "data.validation_examples=2",
        "aligner._target_=own_aligner.Own",
    ]


def config_of(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.syspath_prepend(str(inputs))
    return compose_config(commands(inputs))[0]


CHANGES: dict[str, tuple[str, str]] = {
    "data": ("data/train.jsonl", "data.path="),
    "teacher weights": ("teacher/model.safetensors", "the weights of model.teacher="),
    "student weights": ("student/model.safetensors", "the weights of model.student="),
    "teacher config": ("teacher/config.json", "the config of model.teacher="),
    "student tokenizer": ("student/tokenizer.json", "the tokenizer of model.student="),
    "source aligner": ("own_aligner.py", "aligner._target_=own_aligner.Own"),
}


def edit_keeping_size_and_time(file: Path) -> None:
    """Replace a file by one of the same size and modification time, as `cp -p` and `rsync -t` do."""
    stat = file.stat()
    content = bytearray(file.read_bytes())
    place = content.rindex(b"1") if b"1" in content else len(content) // 2
    content[place] ^= 1
    beside = file.with_suffix(".new")
    beside.write_bytes(bytes(content))
    os.utime(beside, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    beside.replace(file)


@pytest.mark.parametrize("name", CHANGES)
def test_a_frozen_run_whose_input_changed_is_refused_by_the_inputs_name(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    frozen = config_of(inputs, monkeypatch)
    check_inputs(frozen)
    file, said = CHANGES[name]
    edit_keeping_size_and_time(inputs / file)
    with pytest.raises(ConfigError, match=r"^[^\n]+ has changed since this was frozen: [^\n]+\.$") as error:
        check_inputs(frozen)
    assert str(error.value).startswith(said)
    assert frozen.inputs is not None
    now = digest_inputs(frozen)
    assert {each for each in now if now[each] != frozen.inputs[each]} == {name}
    assert content_hash(frozen.model_copy(update={"inputs": now})) != content_hash(frozen)


@pytest.mark.parametrize(
    "file", ["spiece.model", "vocab.txt", "cl100k.tiktoken", "additional_chat_templates/tools.jinja"]
)
def test_whatever_a_tokenizer_may_be_read_from_is_an_input(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    frozen = config_of(inputs, monkeypatch)
    (inputs / "student" / file).parent.mkdir(exist_ok=True)
    (inputs / "student" / file).write_text("another")
    with pytest.raises(ConfigError, match=r"^the tokenizer of model\.student=.* has changed"):
        check_inputs(frozen)


def test_code_that_an_own_aligner_imports_is_an_input_too(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = config_of(inputs, monkeypatch)
    (inputs / "own_helper.py").write_text("SCALE = 2\n")
    with pytest.raises(ConfigError, match=r"^aligner\._target_=own_aligner\.Own has changed"):
        check_inputs(frozen)


def test_a_run_is_the_same_wherever_its_files_lie(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = config_of(inputs, monkeypatch)
    moved = inputs.rename(inputs.with_name("moved"))
    assert content_hash(config_of(moved, monkeypatch)) == content_hash(first)


def test_the_weights_of_a_student_that_is_drawn_anew_are_no_input(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(inputs))
    config, _ = compose_config([*commands(inputs), "model.student_start=scratch"])
    assert config.inputs is not None
    assert "student weights" not in config.inputs
    assert {"student config", "student tokenizer", "teacher weights"} <= set(config.inputs)


def test_a_run_folder_begun_with_other_data_is_not_gone_on_with(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(inputs, monkeypatch)
    directory = begun(tmp_path / "run", config)
    assert going_on(directory, config) == config
    edit_keeping_size_and_time(inputs / "data" / "train.jsonl")
    edited = config_of(inputs, monkeypatch)
    with pytest.raises(ConfigError, match=r"^data.path=\S+ has changed since \S+ was begun with it: nothing was overw"):
        going_on(directory, edited)


def test_a_longer_run_is_a_new_run_that_says_what_it_continues(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(inputs))
    short, _ = compose_config([*commands(inputs), "trainer.warmup_steps=0", "trainer.max_steps=20"])
    longer, _ = compose_config([*commands(inputs), "trainer.warmup_steps=0", "trainer.max_steps=40"])
    directory = begun(tmp_path / "run", short)
    with pytest.raises(
        ConfigError, match=r"holds this run with trainer.max_steps=20: .*choose another run_name"
    ) as error:
        going_on(directory, longer)
    assert f"model.student={directory.student} model.student_start=pretrained" in str(error.value)
    shutil.copytree(inputs / "student", directory.student)
    words = [*commands(inputs), f"model.student={directory.student}", "model.student_start=pretrained"]
    assert continued_run(compose_config(words)[0]) == {
        "path": str(directory.path),
        "content_hash": content_hash(short),
        "steps": 0,
    }
    assert continued_run(short) is None


def begun(path: Path, config: Config) -> RunDirectory:
    directory = RunDirectory(path)
    raw = config.model_dump(by_alias=True)
    directory.begin(raw, arm="a", content_hash=content_hash(config), total_steps=20)
    write_json(directory.provenance_file, {})
    return directory


# Digests


def test_a_large_file_is_read_once_and_again_only_when_it_changed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_WORTH_REMEMBERING_BYTES", 10)
    monkeypatch.setattr(digests, "_SETTLED_S", -1.0)
    readings: list[Path] = []
    digest = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda file: (readings.append(file), digest(file))[1])
    file = tmp_path / "weights"
    file.write_bytes(b"0123456789" * 3)
    first = digest_of(file)
    digests._remembered.cache_clear()  # another process
    assert digest_of(file) == first
    assert len(readings) == 1
    edit_keeping_size_and_time(file)
    assert digest_of(file) == digest(file) != first
    assert len(readings) == 2
    (record,) = (cache / "digests").glob("*.json")
    record.write_text("{")
    digests._remembered.cache_clear()
    assert digest_of(file) == digest(file)


def test_a_file_that_was_changed_just_now_is_not_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_WORTH_REMEMBERING_BYTES", 10)
    (tmp_path / "weights").write_bytes(b"0123456789" * 3)
    digest_of(tmp_path / "weights")
    assert not (cache / "digests").exists()


# Targets


def test_own_choices_are_known_by_their_names_and_are_of_their_groups_kind() -> None:
    groups = [*BASES, *RESULTS]
    assert own_choices("loss")["kv_align.losses.kv.KeyValue"] == "kv"
    assert own_choices("data")["kv_align.data.arithmetic.Arithmetic"] == "arithmetic"
    for group in groups:
        assert own_choices(group), group
        for target, name in own_choices(group).items():
            check_target(group, name, target)
    folders = {
        folder.name for folder in config_directory().iterdir() if any(_has_target(f) for f in folder.glob("*.yaml"))
    }
    assert folders == set(groups)


def _has_target(file: Path) -> bool:
    return "\n_target_:" in file.read_text()


def test_a_target_of_another_kind_is_refused_before_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_wrong.py").write_text(
        "raise SystemError('imported')\nclass Own: ...\ndef start(given) -> int: ...\ndef bare(given): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for group, target in [
        ("data", "code.interact"),
        ("data", "own_wrong.Own"),
        ("aligner", "kv_align.losses.kv.KeyValue"),
        ("init", "own_wrong.start"),
        ("layer_map", "own_wrong.bare"),
        ("init", "own_wrong.Own"),
    ]:
        with pytest.raises(ConfigError, match=rf"^{group}._target_={target} is not allowed: {group}=mine must name a "):
            check_target(group, "mine", target)


def test_a_former_path_is_of_what_is_a_choice_now() -> None:
    choices: set[Any] = {target for group in (*BASES, *RESULTS) for target in own_choices(group)}
    assert set(FORMER_PATHS.values()) <= choices
    assert not set(FORMER_PATHS) & choices
