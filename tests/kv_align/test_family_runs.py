"""Pairs of different families: a student taught by itself has nothing to learn, others learn in whole runs."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, DynamicCache, NanoChatConfig, NanoChatForCausalLM, T5Config
from transformers.models.gptj.modeling_gptj import GPTJAttention

from kv_align.align.aligner import Aligner
from kv_align.align.schedule import Phase
from kv_align.config.config import ModelConfig
from kv_align.config.model_card import EMBEDDED
from kv_align.config.signals import KEYS_VALUES_QUERIES
from kv_align.data.batch import Batch, Tokens
from kv_align.data.correspondence import Correspondence
from kv_align.experiment.experiment import run as do_run
from kv_align.losses.kv import KeyValueStruct
from kv_align.models.capture.prepare import prepare, record
from kv_align.models.load import LanguageModel, check_queries, load_student, load_teacher
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_rows
from kv_align.teacher.teacher import Teacher
from kv_align.training.step import Counts, Distiller
from tests.families import FAMILIES, SHAPE
from tests.short_runs import short_config

IDS = torch.tensor([[5, 9, 60, 3, 3, 17, 41, 8, 33, 12, 7], [4, 62, 44, 18, 7, 7, 29, 50, 11, 6, 21]])
MASK = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
KNOWN = [name for name, family in FAMILIES.items() if family.known]
OBJECTIVE = KeyValueStruct(
    metric="mse",
    lambda_kv=0.5,
    lambda_kv_decay="constant",
    lambda_kv_warmup_steps=0,
    lambda_struct=0.1,
    lambda_struct_decay="constant",
    lambda_struct_warmup_steps=0,
    alpha_k=1.0,
    alpha_v=1.0,
    alpha_attn=0.5,
    temperature=1.0,
)


class AsItIs(Aligner):
    """Gives the teacher's states to a student of the same shape."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.placement = None

    def forward(self, states, correspondence):
        return states


@pytest.mark.parametrize("name", KNOWN)
def test_a_student_taught_by_itself_has_nothing_to_learn_and_by_another_has(name):
    student = FAMILIES[name].make()
    teacher = copy.deepcopy(student).requires_grad_(False)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for model in (student, teacher, other):
        prepare(model, "student")
    mask = MASK.bool()
    tokens = Tokens(IDS, mask, (MASK.cumsum(1) - 1).clamp(min=0), 2 * MASK)
    batch = Batch(tokens, tokens, mask, Correspondence(tokens.segments, tokens.segments, True), (0, 1))
    distiller = Distiller(
        student, AsItIs(), OBJECTIVE, rotated=False, key_variance=torch.ones(3), value_variance=torch.ones(3)
    )
    weights = OBJECTIVE.weights(0, 1)

    def step(model):
        states = Teacher(model, [0, 1, 2], rotated=False).read(batch, (KEYS_VALUES_QUERIES,))
        return distiller(batch, states, Counts.of([batch]), weights, Phase(True, True))

    alone, taught = step(teacher).losses, step(other)
    for part in ("key_loss", "value_loss", "struct_key_loss", "struct_value_loss", "attention_loss"):
        assert alone[part] < 1e-6 < 1e-4 < taught.losses[part], part
    taught.alignment.backward()
    reached = {path for path, parameter in student.named_parameters() if parameter.grad is not None}
    assert any(".0." in path for path in reached)
    assert any(".2." in path for path in reached)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Families by name, with the embedded pair's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "student")
    folders = {}
    for name in ("gemma2", "gpt oss", "falcon", "gptj", "bloom", "doge"):
        folders[name] = tmp_path_factory.mktemp(name)
        size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        family = FAMILIES[name]
        type(family)(family.name, family.config | size).make().save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def overrides(saved: dict[str, Path], teacher: str, student: str, loss: str) -> list[str]:
    return [
        "model=pair",
        f"model.teacher={saved[teacher]}",
        f"model.student={saved[student]}",
        "data.max_length=200",
        "trainer.max_steps=3",
        "trainer.warmup_steps=1",
        f"loss={loss}",
    ]


@pytest.mark.parametrize(
    ("teacher", "student", "loss"),
    [
        ("gptj", "gemma2", "kv+struct"),
        ("gemma2", "gpt oss", "kv+struct"),
        ("bloom", "falcon", "kv+struct"),
        ("falcon", "gptj", "kv+struct"),
        ("doge", "bloom", "kv+struct"),
        ("falcon", "bloom", "relations"),
        ("bloom", "doge", "kv"),
    ],
)
def test_a_run_of_two_families(saved, tmp_path, teacher, student, loss):
    assert do_run(short_config(*overrides(saved, teacher, student, loss)), tmp_path / "run") == "finished"
    rows = read_rows(RunDirectory(tmp_path / "run").metrics_file)
    assert len(rows) == 3
    part = {"kv": "key_loss", "kv+struct": "attention_loss", "relations": "query_relation_loss"}[loss]
    assert all(row["kv_grad_norm"] > 0 and 0 < row[part] < 1e3 for row in rows)


def test_a_loss_on_attention_that_it_does_not_know_is_refused(saved, tmp_path):
    config = short_config(*overrides(saved, "gptj", "doge", "kv+struct"))
    sentence = (
        r"model\.student=\S+: DogeForCausalLM attends by more than scaled dot products, windows, soft caps, sinks and"
    )
    with pytest.raises(ConfigError, match=rf"^loss=kv\+struct is not allowed with {sentence}") as caught:
        do_run(config, tmp_path / "run")
    assert str(caught.value).endswith("; use loss=kv or another model.")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def turned_for_good(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A NanoChat beside the others: it normalises its keys behind their rotation, which then cannot be undone."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "student")
    folder = tmp_path_factory.mktemp("nanochat")
    torch.manual_seed(0)
    NanoChatForCausalLM(NanoChatConfig(**SHAPE | {"vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return saved | {"nanochat": folder}


@pytest.mark.parametrize(
    ("pair", "role"),
    [(("nanochat", "gemma2"), "teacher"), (("gemma2", "nanochat"), "student")],
    ids=["teacher", "student"],
)
def test_keys_that_cannot_be_turned_back_are_refused_with_unrotated_keys_alone(turned_for_good, tmp_path, pair, role):
    with pytest.raises(ConfigError) as refused:
        do_run(short_config(*overrides(turned_for_good, *pair, "kv"), "keys=unrotated"), tmp_path / "refused")
    assert str(refused.value) == (
        f"keys=unrotated is not allowed with model.{role}={turned_for_good['nanochat']} (NanoChatForCausalLM): its rotary "
        "embedding cannot be undone: it does more than turn pairs of numbers; use keys=rotated or another model."
    )
    changes = ("keys=rotated",) if role == "student" else ("aligner=none",)
    loss = "kv+struct" if role == "student" else "logit_kd"
    run = RunDirectory(tmp_path / "run")
    assert do_run(short_config(*overrides(turned_for_good, *pair, loss), *changes), run.path) == "finished"
    assert len(read_rows(run.metrics_file)) == 3


def pair_config(teacher: str, student: str, *, student_start: str = "pretrained") -> ModelConfig:
    return ModelConfig(
        name="pair",
        teacher=teacher,
        student=student,
        student_start=student_start,
        teacher_dtype="float32",
        gradient_checkpointing=False,
        remote_code=[],
    )


class KeysFirst(GPTJAttention):
    """Multiplies keys by queries, not queries by keys."""

    def _attn(self, query, key, value, attention_mask=None):
        scores = torch.matmul(key, query.transpose(-1, -2)).transpose(-1, -2) / self.scale_attn + attention_mask
        weights = scores.softmax(dim=-1)
        return torch.matmul(weights, value), weights


class Doubled(GPTJAttention):
    """Adds a score of every token's own."""

    def _attn(self, query, key, value, attention_mask=None):
        scores = torch.matmul(query, key.transpose(-1, -2)) / self.scale_attn + attention_mask
        weights = (scores + key.sum(dim=-1)[..., None, :]).softmax(dim=-1)
        return torch.matmul(weights, value), weights


@pytest.mark.parametrize("attention", [KeysFirst, Doubled])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_queries_that_cannot_be_seen_are_not_made_up(attention, role):
    models = {each: FAMILIES["gptj"].make() for each in ("teacher", "student")}
    for module in models[role].modules():
        if type(module) is GPTJAttention:
            module.__class__ = attention
    readers = [LanguageModel(model, None, prepare(model, each)) for each, model in models.items()]
    assert not readers[role == "student"].geometry.gives_queries
    config = pair_config("a", "b")
    sentence = rf"^loss=relations is not allowed with model\.{role}=[ab]: GPTJForCausalLM computes its attention itself"
    with pytest.raises(ConfigError, match=sentence):
        check_queries(config, "relations", *readers, attention=False)
    # Its keys and values are as good as any.
    with torch.no_grad():
        with record() as recorder:
            models[role](input_ids=IDS, use_cache=False)
        cache = DynamicCache()
        models[role](input_ids=IDS, past_key_values=cache, use_cache=True)
    for number, layer in enumerate(recorder.ordered()):
        assert layer.q is None
        torch.testing.assert_close(layer.k, cache.layers[number].keys)
        torch.testing.assert_close(layer.v, cache.layers[number].values)


@pytest.mark.parametrize("start", ["scratch", "pretrained"])
def test_an_encoder_decoder_is_refused_before_it_is_loaded(tmp_path, start):
    T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).is_encoder_decoder
    model = pair_config(str(tmp_path), str(tmp_path), student_start=start)
    for role, load in (("teacher", load_teacher), ("student", lambda *args: load_student(args[0], 0, args[1]))):
        with pytest.raises(ConfigError, match=rf"^model\.{role}=\S+ is not allowed: it is an encoder-decoder"):
            load(model, torch.device("cpu"))
