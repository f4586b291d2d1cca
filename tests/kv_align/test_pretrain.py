"""The recipe of a pair: what cannot be made is said before anything is read or trained, and any text will do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from kv_align.config.compose import compose_raw
from kv_align.config.config import PretrainConfig
from kv_align.config.schema import validate
from kv_align.data.batch import DataOrder, pad
from kv_align.data.encode import Encoded
from kv_align.experiment import pretraining as recipe
from kv_align.experiment.pretraining import check, pretrain
from kv_align.runs.errors import ConfigError

SHORT = (
    *("data=arithmetic", "data.train_examples=40", "data.validation_examples=4", "data.test_examples=1"),
    *("batch_size=4", "warmup_steps=1", "evaluation_examples=3", "teacher.steps=2", "student.steps=2"),
    *("teacher.hidden_size=16", "teacher.intermediate_size=16", "teacher.num_layers=1"),
    *("student.hidden_size=16", "student.intermediate_size=16", "student.num_layers=1"),
)


def short(folder: Path, *overrides: str) -> PretrainConfig:
    return validate(PretrainConfig, compose_raw([*SHORT, f"output_dir={folder}", *overrides], config_name="pretrain"))


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "recipe.json").read_text()))


def test_a_pair_that_loads(tmp_path, capsys):
    folder = tmp_path / "new" / "pair"
    pretrain(short(folder))
    for role in ("teacher", "student"):
        assert report(folder)[role]["exact_match_examples"] == 3
        assert report(folder)[role]["exact_match"] == 0.0
        tokenizer = AutoTokenizer.from_pretrained(folder / role)
        assert AutoModelForCausalLM.from_pretrained(folder / role).config.vocab_size == len(tokenizer)
    with pytest.raises(ConfigError, match="already holds a finished recipe"):
        pretrain(short(folder))


def test_plain_texts_have_no_answers_to_try(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("".join(f"This is text {number}.\n" for number in range(30)))
    text = ("data=text", f"data.path={tmp_path / 'texts.txt'}", "data.validation_examples=4", "data.test_examples=1")
    overrides = [each for each in SHORT if not each.startswith("data")]
    raw = compose_raw([*overrides, *text, f"output_dir={tmp_path / 'pair'}"], config_name="pretrain")
    pretrain(validate(PretrainConfig, raw))
    assert report(tmp_path / "pair")["student"]["exact_match"] is None
    assert report(tmp_path / "pair")["student"]["exact_match_examples"] == 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["vocabulary_size=1000000000"], r"vocabulary_size=1000000000 is not allowed: .* at most 1e\+07"),
        (
            ["vocabulary_size=100"],
            r"vocabulary_size=100 is not allowed: set vocabulary_size to at least 258: all bytes",
        ),
        (["teacher.head_dim=3"], r"teacher\.head_dim=3 is not allowed: set teacher\.head_dim to an even number"),
        (["student.num_key_value_heads=3"], r"student\.num_key_value_heads=3 .* to a divisor of student\.num_heads=4"),
        (["data.max_length=1"], r"data\.max_length=1 is not allowed: set data\.max_length to at least 2"),
        (["output_dir=''"], r"output_dir='' is not allowed: set output_dir to the name of a folder"),
        (["batch_size=41"], r"batch_size=41 is not allowed: set batch_size to at most 40, the texts to train on"),
    ],
)
def test_what_cannot_be_made_is_refused_before_it_is_begun(tmp_path, monkeypatch, overrides, sentence):
    monkeypatch.setattr(recipe, "train_tokenizer", None)
    with pytest.raises(ConfigError, match=sentence):
        pretrain(short(tmp_path / "pair", *overrides))


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_text("somebody's")
    with pytest.raises(ConfigError, match=r"output_dir=.* already holds a teacher: remove it, or name another folder"):
        check(short(tmp_path))
    assert (tmp_path / "teacher" / "model.safetensors").read_text() == "somebody's"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"output_dir=.* cannot be written to \(.*\): name a folder that can"):
            check(short(folder))


def test_texts_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "talks.jsonl").write_text('{"text": [{"role": "assistant", "content": "Hi"}]}\n' * 30)
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    overrides = [each for each in SHORT if not each.startswith("data")]
    for name, sentence in (
        ("talks", "its conversations need a chat template, which the tokenizer that is trained has not"),
        ("broken", r"broken\.jsonl, line 1 cannot be read as JSON"),
    ):
        text = ["data=text", f"data.path={tmp_path / name}.jsonl", "data.validation_examples=4", "data.test_examples=1"]
        raw = compose_raw([*overrides, *text, f"output_dir={tmp_path / 'pair'}"], config_name="pretrain")
        with pytest.raises(ConfigError, match=sentence):
            pretrain(validate(PretrainConfig, raw))


def test_whole_texts_are_learned_by_their_plain_cross_entropy():
    config = short(Path("unused"), "batch_size=2", "student.steps=3", "learning_rate=0.1")
    model, reference = (recipe.build_llama(config.student, 300, 32, 0, seed=1) for _ in range(2))
    texts = [Encoded([5, 9, 7, 30][: 4 - at % 2], [0, 0, 1, 2][: 4 - at % 2], False) for at in range(6)]
    losses = [loss for _, loss in recipe.fit(model, texts, 1, config, config.student, "student")]
    order = DataOrder(len(texts), 2, config.seed)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, 3)
    for step, loss in enumerate(losses):
        tokens = pad([texts[at] for at in order[step]], 1)
        labels = tokens.ids.masked_fill(~tokens.mask, -100)
        expected = reference(**tokens.inputs, labels=labels).loss
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        optimizer.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
