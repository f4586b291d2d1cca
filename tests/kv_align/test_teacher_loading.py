"""A teacher that is spread over memory and disk gives the plain one's numbers; a quantised one is a teacher like others."""

import gc
import importlib.util
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from kv_align.config.compose import compose_config
from kv_align.config.config import Config, ModelConfig
from kv_align.config.identity import content_hash
from kv_align.config.model_card import EMBEDDED
from kv_align.config.schema import validate
from kv_align.config.signals import HIDDEN_STATES, KEYS_VALUES, KEYS_VALUES_QUERIES, LOGITS
from kv_align.data.batch import Tokens
from kv_align.experiment.experiment import run as do_run
from kv_align.models.capture.prepare import record
from kv_align.models.devices import device_of
from kv_align.models.load import LanguageModel, load_teacher, weights_digest
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_rows
from kv_align.teacher.teacher import Teacher
from tests.short_runs import results, short_config

CPU = torch.device("cpu")
EVERY_SECOND = {
    **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
    **{f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(6)},
}
OF_THREE = {name: device for name, device in EVERY_SECOND.items() if name[-1] not in "345"}
IDS = torch.arange(1, 41).reshape(2, 20)
TOKENS = Tokens(IDS, torch.ones_like(IDS, dtype=torch.bool), torch.arange(20).expand(2, -1), torch.ones_like(IDS))
SHORTER = (
    "trainer.max_steps=2",
    "trainer.warmup_steps=1",
    "loss=kv+struct",
    "evaluation.exact_match_examples=1",
    "evaluation.max_new_tokens=1",
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    for name in ("accelerate.big_modeling", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)


def model_config(**changes: Any) -> ModelConfig:
    return short_config().model.model_copy(update=changes)


def teacher(**changes: Any) -> LanguageModel:
    return load_teacher(model_config(**changes), CPU)


def with_model(**changes: Any) -> Config:
    config = short_config(*SHORTER)
    return config.model_copy(update={"model": config.model.model_copy(update=changes), "inputs": None})


def on_meta(reader: LanguageModel) -> set[str]:
    return {name for name, each in reader.model.named_parameters() if each.is_meta}


@pytest.fixture(scope="module")
def plain() -> LanguageModel:
    return teacher()


def save(folder: Path, model: Any) -> str:
    shutil.copytree(EMBEDDED / "teacher", folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return str(folder)


SMALL: dict[str, Any] = {"vocab_size": 497, "bos_token_id": 1, "eos_token_id": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher whose widths bitsandbytes packs into 4 bits on every processor."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **shape, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return save(tmp_path_factory.mktemp("wide") / "teacher", model)


@pytest.fixture(scope="module")
def plain_run(wide: str, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = RunDirectory(tmp_path_factory.mktemp("plain") / "run")
    assert do_run(with_model(teacher=wide), directory.path) == "finished"
    return directory


# Spread


@pytest.fixture(params=[EVERY_SECOND, {"": "disk"}], ids=["every second layer on the disk", "all on the disk"])
def spread(request: pytest.FixtureRequest) -> LanguageModel:
    return teacher(teacher_device_map=request.param)


def test_a_spread_teacher_gives_the_states_of_the_plain_one(plain: LanguageModel, spread: LanguageModel) -> None:
    away = on_meta(spread)
    assert len(away) >= 27
    assert spread.geometry == plain.geometry
    assert device_of(spread.model) == CPU
    for layers in ([0, 1], [2, 5], [4]):  # the forward pass ends early, in a layer on the disk and in one that is not
        ours, theirs = (Teacher(each.model, layers, rotated=False) for each in (spread, plain))
        for signal in (KEYS_VALUES_QUERIES, HIDDEN_STATES, LOGITS):
            found, expected = (each.read_tokens(TOKENS, (signal,)).tensors for each in (ours, theirs))
            assert tuple(found) == tuple(expected) == signal.fields
            for name, state in expected.items():
                assert torch.equal(found[name], state), name
            assert on_meta(spread) == away


def test_where_it_is_changes_nothing_of_its_digest(plain: LanguageModel, spread: LanguageModel) -> None:
    assert weights_digest(spread.model) == weights_digest(plain.model)


def test_in_half_precision_its_digest_is_another_one_wherever_it_is(plain: LanguageModel) -> None:
    half = {"teacher_dtype": "bfloat16"}
    digest = weights_digest(teacher(**half, teacher_device_map={"": "disk"}).model)
    assert digest == weights_digest(teacher(**half).model)
    assert digest != weights_digest(plain.model)


def test_a_run_with_a_spread_teacher_has_the_same_numbers(plain_run: RunDirectory, wide: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert do_run(with_model(teacher=wide, teacher_device_map=OF_THREE), run.path) == "finished"
    assert results(run) == results(plain_run)


def test_a_cache_is_filled_by_a_spread_teacher_and_read_by_a_plain_one(wide: str, tmp_path: Path) -> None:
    found, folders = {}, []
    for name, changes in (("spread", {"teacher_device_map": {"": "disk"}}), ("plain", {})):
        config = with_model(teacher=wide, **changes)
        cached = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_dtype": "float32"}
        assert do_run(config.model_copy(update=cached), tmp_path / name) == "finished"
        found[name] = results(RunDirectory(tmp_path / name))
        folders.append({each.parent.name for each in (tmp_path / "cache").glob("*/about.json")})
    assert found["spread"] == found["plain"]
    assert folders[0] == folders[1]


def test_its_folder_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reader = [teacher(teacher_device_map={"": "disk"})]
    assert len(list(tmp_path.iterdir())) == 1
    reader.clear()
    gc.collect()
    assert list(tmp_path.iterdir()) == []


SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "sinks beside its layers": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, **SHAPE, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
    "experts that are stacked when loaded": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, **SHAPE, num_key_value_heads=2, num_local_experts=4)
    ),
    "without an attention function": lambda: GPTJForCausalLM(
        GPTJConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_spread_too(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = save(tmp_path / "teacher", FAMILIES[family]())
    ours, theirs = teacher(teacher=name, teacher_device_map={"": "disk"}), teacher(teacher=name)
    away = on_meta(ours)
    assert ours.geometry == theirs.geometry
    assert weights_digest(ours.model) == weights_digest(theirs.model)
    found, expected = (
        Teacher(each.model, [0, 1], rotated=False).read_tokens(TOKENS, (KEYS_VALUES,)) for each in (ours, theirs)
    )
    assert torch.equal(found["k"], expected["k"])
    assert on_meta(ours) == away  # also what the layer that ended the forward pass had brought for itself
    with torch.no_grad():
        assert torch.equal(ours.model(IDS).logits, theirs.model(IDS).logits)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_teacher_on_one_device_is_the_plain_one(device_map: Any, plain: LanguageModel) -> None:
    reader = load_teacher(model_config(teacher_device_map=device_map), CPU, processes=2)
    assert on_meta(reader) == set()
    with torch.no_grad():
        assert torch.equal(reader.model(IDS).logits, plain.model(IDS).logits)


# Quantised


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantised(request: pytest.FixtureRequest, wide: str) -> tuple[str, LanguageModel]:
    return request.param, teacher(teacher=wide, teacher_quantization=request.param)


def test_a_quantised_teacher_is_recorded_as_it_is(quantised: tuple[str, LanguageModel], wide: str) -> None:
    (kind, reader), plain = quantised, teacher(teacher=wide)
    assert reader.geometry == plain.geometry
    assert reader.model.num_parameters() == plain.model.num_parameters()
    cache = DynamicCache()
    with torch.no_grad():
        with record() as recorder:
            logits = reader.model(IDS, use_cache=False).logits
        reader.model(IDS, past_key_values=cache)
        expected = plain.model(IDS).logits
    assert 0 < (logits - expected).norm() / expected.norm() < {"int8": 0.05, "nf4": 0.4}[kind]
    for number, layer in enumerate(recorder.ordered()):
        assert torch.equal(layer.k, cache.layers[number].keys)
        assert torch.equal(layer.v, cache.layers[number].values)


def test_the_digest_of_a_quantised_teacher_is_of_its_content_and_changes_nothing(
    quantised: tuple[str, LanguageModel], wide: str
) -> None:
    kind, reader = quantised
    digest = weights_digest(reader.model)
    assert weights_digest(teacher(teacher=wide, teacher_quantization=kind).model) == digest
    with torch.no_grad():
        before = reader.model(IDS).logits
        assert weights_digest(reader.model) == digest
        assert torch.equal(reader.model(IDS).logits, before)
    assert digest != weights_digest(teacher(teacher=wide).model)


def test_a_teacher_that_was_saved_quantised_is_loaded_as_it_is(wide: str, tmp_path: Path) -> None:
    reader = teacher(teacher=wide, teacher_quantization="nf4")
    name = save(tmp_path / "teacher", reader.model)
    again = teacher(teacher=name)
    assert weights_digest(again.model) == weights_digest(reader.model)
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, reader.model(IDS).logits)


def test_a_teacher_in_4_bits_computes_what_its_weights_say(wide: str) -> None:
    reader, plain = teacher(teacher=wide, teacher_quantization="nf4"), teacher(teacher=wide)
    projections = {name: each for name, each in reader.model.named_modules() if name.endswith("down_proj")}
    assert len(projections) == 3
    for name, projection in projections.items():
        state = projection.weight.quant_state
        number_of_each = torch.stack((projection.weight >> 4, projection.weight & 15), dim=-1).flatten().int()
        weight = (state.code[number_of_each].unflatten(0, (-1, 64)) * state.absmax[:, None]).reshape(state.shape)
        inputs = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(projection(inputs), inputs @ weight.T, atol=1e-4, rtol=1e-4)
        exact = plain.model.get_submodule(name).weight
        assert (weight - exact).norm() < 0.12 * exact.norm()


@pytest.mark.parametrize("saved", [False, True], ids=["asked for", "saved so"])
def test_widths_that_some_processors_misread_in_4_bits_are_refused_before_loading(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's inputs of 64 numbers are whole blocks, its MLP's of 96 are none."""
    folder = tmp_path / "teacher"
    shutil.copytree(EMBEDDED / "teacher", folder)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**SMALL, **shape)
    if saved:
        config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    config.save_pretrained(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError) as refused:
        teacher(teacher=str(folder), teacher_quantization=None if saved else "nf4")
    key = (
        f"model.teacher={folder}, which is in 4 bits,"
        if saved
        else f"model.teacher_quantization=nf4 with model.teacher={folder}"
    )
    assert str(refused.value) == (
        f"{key} is not allowed on a CPU: bitsandbytes reads 4-bit weights there in rows of whole blocks of 64, and a row of "
        f"model.layers.0.mlp.down_proj has 96; use {'' if saved else 'model.teacher_quantization=int8 or null, '}a teacher "
        "whose widths are multiples of 64, or a GPU."
    )


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_with_a_quantised_teacher_is_a_run(kind: str, wide: str, plain_run: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert do_run(with_model(teacher=wide, teacher_quantization=kind), run.path) == "finished"
    rows, expected = read_rows(run.metrics_file), read_rows(plain_run.metrics_file)
    assert rows[0]["task_loss"] == expected[0]["task_loss"]
    for row, other in zip(rows, expected, strict=True):
        assert row["kv_grad_norm"] > 0
        assert row["kv_loss"] != other["kv_loss"]
        assert row["kv_loss"] == pytest.approx(other["kv_loss"], rel=0.1)


def test_large_columns_under_int8_are_no_looking_ahead(tmp_path: Path) -> None:
    """LLM.int8 makes these tokens' keys by up to 2 % other ones if a later token is another."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher", dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.roll(11, 0))
    name = save(tmp_path / "teacher", model)
    assert teacher(teacher=name, teacher_quantization="int8").geometry.num_layers == 6


# Configuration


def test_the_device_map_is_not_part_of_a_runs_identity_and_a_quantisation_is() -> None:
    raw = short_config().model_dump(by_alias=True)

    def hashed(**changes: Any) -> str:
        return content_hash(validate(Config, raw | {"model": raw["model"] | changes}))

    before = hashed()
    assert hashed(teacher_device_map="auto") == before
    assert hashed(teacher_device_map={"lm_head": "cpu", "model": "disk"}) == before
    assert len({before, *(hashed(teacher_quantization=kind) for kind in ("int8", "nf4"))}) == 3
    for key in ("teacher_device_map", "teacher_quantization"):  # as a configuration of before there were any
        del raw["model"][key]
    assert hashed() == before


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["model.teacher_device_map={model:nowhere-0}"],
            "model.teacher_device_map['model']=nowhere-0 is not allowed: set",
        ),
        (["model.teacher_device_map=somehow"], "model.teacher_device_map=somehow is not allowed: set"),
        (["model.teacher_quantization=int4"], "model.teacher_quantization=int4 is not allowed: set"),
        (
            ["model.teacher_device_map={model:0,lm_head:cpu}", "model.teacher_quantization=nf4"],
            "model.teacher_quantization=nf4 is not allowed with a model.teacher_device_map that names cpu or disk: ",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_config(overrides)
    assert str(refused.value).startswith(sentence)


def test_missing_bitsandbytes_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(ConfigError) as refused:
        compose_config(["model.teacher_quantization=nf4"])
    assert str(refused.value) == (
        "model.teacher_quantization=nf4 is not allowed: the package bitsandbytes is not installed; install "
        "kv-align[quantized] or use model.teacher_quantization=null."
    )


@pytest.mark.parametrize(
    ("changes", "processes", "sentence"),
    [
        (
            {"teacher_device_map": {"": "disk"}},
            2,
            "is not allowed with 2 processes: it spreads each one's teacher over disk",
        ),
        (
            {"teacher_device_map": {"model": "cpu", "head": "cpu"}},
            1,
            r"\[head\] is not allowed: LlamaForCausalLM has no such",
        ),
        (
            {"teacher_device_map": {"": "nowhere"}},
            1,
            r"the teacher cannot be loaded so on this machine \(Expected one of",
        ),
        ({"teacher_device_map": "auto", "teacher": "no/model"}, 1, r"model.teacher=no/model cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    changes: dict[str, Any], processes: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_teacher(model_config(**changes), CPU, processes)
    assert "\n" not in str(refused.value)
    was_loaded = processes == 2 or "has no such" in sentence  # and is not thrown away yet
    assert was_loaded or list(tmp_path.iterdir()) == []
