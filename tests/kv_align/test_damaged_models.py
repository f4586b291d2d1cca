"""A model folder that is not whole, or not what its files say: one sentence with the role, before anything is trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_align.config.compose import compose_config
from kv_align.config.model_card import EMBEDDED
from kv_align.models.load import load_student, load_teacher
from kv_align.runs.errors import ConfigError

Damage = Callable[[Path], object]


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def written(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def sharded(weight_map: dict[str, str] | None) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        if weight_map is not None:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


KNOWN_BEFORE: list[tuple[str, Damage, str]] = [
    ("an empty config", written("config.json", b""), "config.json cannot be read"),
    ("a list", written("config.json", b"[]"), "config.json cannot be read .it holds .. and no object"),
    ("null", written("config.json", b"null"), "config.json cannot be read .it holds null and no object"),
    ("utf-16", written("config.json", "{}".encode("utf-16")), "config.json cannot be read"),
    ("layers in words", config(num_hidden_layers="six"), 'its num_hidden_layers is "six" and no whole number'),
    ("no layers", config(num_hidden_layers=0), "its num_hidden_layers is 0 and no whole number above 0"),
    ("a vocabulary in words", config(vocab_size="many"), 'its vocab_size is "many" and no whole number'),
    ("a pickle", pickled, "holds no safetensors weights"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors weights"),
]
FOUND_IN_LOADING: list[tuple[str, Damage, str]] = [
    ("weights that are cut", written("model.safetensors", b"\x10"), "cannot be loaded"),
    ("no bytes", written("model.safetensors", b""), "cannot be loaded"),
    (
        "a pointer to weights",
        written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "cannot be",
    ),
    ("an unknown kind", config(model_type="zzz"), "cannot be loaded .*zzz"),
    ("an unknown activation", config(hidden_act="wow"), "cannot be loaded .*wow"),
    ("a width below 0", config(hidden_size=-4), "cannot be loaded"),
    ("more layers", config(num_hidden_layers=7), "its weights lack model.layers.6"),
    ("fewer layers", config(num_hidden_layers=1), "its weights hold model.layers.1"),
    ("another width", config(hidden_size=48), "its weights have other shapes of"),
    ("a shard that is missing", sharded({"model.norm.weight": "model-00002-of-00002.safetensors"}), "cannot be loaded"),
    ("shards without an index", sharded(None), "cannot be loaded"),
    ("a broken tokenizer", written("tokenizer.json", b"{"), "cannot be loaded"),
    ("a tokenizer that is a list", written("tokenizer.json", b"[]"), "cannot be loaded"),
]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    shutil.copytree(EMBEDDED, tmp_path / "pair")
    return tmp_path / "pair"


def asked(pair: Path) -> list[str]:
    names = [f"model.{role}={pair / role}" for role in ("teacher", "student")]
    return ["model=pair", *names, "model.student_start=pretrained"]


@pytest.mark.parametrize(
    ("damage", "says"), [each[1:] for each in KNOWN_BEFORE], ids=[each[0] for each in KNOWN_BEFORE]
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_what_can_be_known_before_anything_is_loaded(pair: Path, role: str, damage: Damage, says: str) -> None:
    damage(pair / role)
    with pytest.raises(ConfigError, match=f"model.{role}={pair / role} is not allowed: .*{says}") as refused:
        compose_config(asked(pair))
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("damage", "says"), [each[1:] for each in FOUND_IN_LOADING], ids=[each[0] for each in FOUND_IN_LOADING]
)
def test_what_is_found_in_loading(
    pair: Path, damage: Damage, says: str, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    role = "student" if len(request.node.name) % 2 else "teacher"
    damage(pair / role)
    model = compose_config(asked(pair))[0].model
    with pytest.raises(ConfigError, match=f"model.{role}=.*{says}") as refused:
        load_teacher(model, torch.device("cpu")) if role == "teacher" else load_student(model, 0, torch.device("cpu"))
    assert "\n" not in str(refused.value)
    assert [record for record in caplog.records if record.name.startswith("transformers")] == []


def test_an_architecture_that_cannot_be_drawn_is_one_sentence(pair: Path) -> None:
    config(hidden_act="wow")(pair / "student")
    model = compose_config([*asked(pair)[:-1], "model.student_start=scratch"])[0].model
    with pytest.raises(ConfigError, match=r"model.student=.* cannot be loaded .*wow"):
        load_student(model, 0, torch.device("cpu"))
