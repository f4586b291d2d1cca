"""What choices mean together: each impossible combination has its sentence, and choices without effect are taken out."""

import copy
import importlib.util
import itertools
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kv_align.config.compose import compose_raw
from kv_align.config.model_card import EMBEDDED, model_card
from kv_align.config.resolve import resolve
from kv_align.config.signals import (
    HIDDEN_STATES,
    KEYS_VALUES,
    KEYS_VALUES_QUERIES,
    LOGITS,
    RELATIONS,
    Signals,
    signals_of,
    uses_aligner,
)
from kv_align.models.load import load_student, weights_digest
from kv_align.runs.errors import ConfigError

WriteModel = Callable[..., str]
_numbers = itertools.count()


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose_raw(overrides)


def composed(*overrides: str, **changes: Any) -> dict[str, Any]:
    """What Hydra composes, with `section__key=value` changed afterwards: also what no command line can say."""
    raw = copy.deepcopy(_composed(overrides))
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        (raw[section] if section else raw)[last] = value
    return raw


def sentence_of(raw: dict[str, Any]) -> str:
    """The sentence that a configuration is refused with."""
    with pytest.raises(ConfigError) as refused:
        resolve(raw)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Writes the files of a model that can be asked before it is loaded, and returns its folder."""

    def write(
        *, layers: int | None = 6, tokenizer: str = "{}", weights: bool = True, key: str = "num_hidden_layers"
    ) -> str:
        folder = tmp_path / f"model_{next(_numbers)}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({} if layers is None else {key: layers}))
        (folder / "tokenizer.json").write_text(tokenizer)
        if weights:
            (folder / "model.safetensors").touch()
        return str(folder)

    return write


def pair(teacher: str, student: str, *overrides: str, start: str = "scratch", **changes: Any) -> dict[str, Any]:
    return composed(*overrides, model__teacher=teacher, model__student=student, model__student_start=start, **changes)


# Combinations of what the command line alone says


@pytest.mark.parametrize(
    ("overrides", "changes", "says"),
    [
        (
            ("loss=kv", "aligner=none"),
            {},
            "loss=kv is not allowed with aligner=none: there would be no projected keys and values to compare with; "
            "use aligner=flat or structured, or loss=ce or logit_kd.",
        ),
        (
            ("loss=kv+struct", "aligner=none"),
            {},
            "loss=kv+struct is not allowed with aligner=none: there would be no projected keys and values to compare "
            "with; use aligner=flat or structured, or loss=ce or logit_kd.",
        ),
        *(
            (
                (),
                {group: None},
                f"{group}=null is not allowed: set {group} to what conf/ has for it, since loss=kv needs it.",
            )
            for group in ("layer_map", "time_warp", "keys", "align")
        ),
        (
            (),
            {"init": None},
            "init=null is not allowed: set init to what conf/ has for it, since aligner=structured needs it.",
        ),
        (
            ("loss=ce",),
            {"data__shuffle_teacher": True},
            "data.shuffle_teacher=true is not allowed: set data.shuffle_teacher to false with loss=ce, which compares no "
            "keys and values.",
        ),
        (
            ("loss=logit_kd",),
            {"data__shuffle_teacher": True},
            "data.shuffle_teacher=true is not allowed: set data.shuffle_teacher to false with loss=logit_kd, which "
            "compares no keys and values.",
        ),
        (
            (),
            {"data__rationale": "short", "data__rationale_every": None},
            "data.rationale_every=null is not allowed: set data.rationale_every to a whole number with "
            "data.rationale=short.",
        ),
        (
            (),
            {"data__min_steps": 6},
            "data=arithmetic is not allowed: data.min_steps=6 is above data.max_steps=5: lower the first.",
        ),
        (("data=text",), {}, "data=text is not allowed: give either data.path or data.hub_name."),
        (
            (),
            {"trainer__micro_batch_size": 3},
            "trainer.micro_batch_size=3 is not allowed: set trainer.micro_batch_size to a divisor of "
            "trainer.batch_size=16.",
        ),
        (
            (),
            {"data__shuffle_teacher": True, "trainer__micro_batch_size": 1},
            "data.shuffle_teacher=true is not allowed: set data.shuffle_teacher to false where a micro-batch holds a "
            "single example.",
        ),
        (
            (),
            {"data__shuffle_teacher": True, "trainer__batch_size": 1},
            "data.shuffle_teacher=true is not allowed: set data.shuffle_teacher to false where a micro-batch holds a "
            "single example.",
        ),
        (
            (),
            {"trainer__epochs": None, "trainer__max_steps": None},
            "trainer.epochs=null is not allowed: set trainer.epochs to a number above 0, or trainer.max_steps to a whole "
            "number.",
        ),
        (
            (),
            {"align__fit": "fit_then_freeze", "align__fit_steps": None},
            "align.fit_steps=null is not allowed: set align.fit_steps to a whole number with align.fit=fit_then_freeze.",
        ),
        (
            (),
            {"align__fit": "fit_then_freeze", "align__fit_steps": 300},
            "align.fit_steps=300 is not allowed: set align.fit_steps to below trainer.max_steps=300.",
        ),
        (
            (),
            {"align__fit": "alternate", "align__period": None},
            "align.period=null is not allowed: set align.period to a whole number with align.fit=alternate.",
        ),
        (
            ("loss=logit_kd",),
            {"data__rationale": "none"},
            "data.rationale=none is not allowed: set data.rationale to full with loss=logit_kd, which compares token by "
            "token.",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_an_impossible_combination_has_its_sentence(
    overrides: tuple[str, ...], changes: dict[str, Any], says: str
) -> None:
    assert sentence_of(composed(*overrides, **changes)) == says


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ((), {"trainer__warmup_steps": 299}),
        ((), {"trainer__micro_batch_size": 4}),
        ((), {"data__shuffle_teacher": True, "trainer__micro_batch_size": 2}),
        ((), {"align__fit": "fit_then_freeze", "align__fit_steps": 299}),
        ((), {"align__fit": "fit_then_freeze", "align__fit_steps": 300, "trainer__max_steps": None}),
        ((), {"trainer__warmup_steps": 300, "trainer__max_steps": None}),
        ((), {"trainer__epochs": None}),
        ((), {"data__min_steps": 5}),
        (
            ("loss=ce", "aligner=none"),
            {"layer_map": None, "time_warp": None, "keys": None, "align": None, "init": None},
        ),
        (("aligner=flat",), {"init": None}),
        (("loss=ce",), {"data__rationale": "short"}),
        (("loss=logit_kd",), {"data__rationale": "full"}),
    ],
)
def test_the_last_allowed_value_on_the_right_side_of_each_bound_is_allowed(
    overrides: tuple[str, ...], changes: dict[str, Any]
) -> None:
    raw = composed(*overrides, **changes)
    config, _ = resolve(copy.deepcopy(raw))
    without_effect = {} if raw["trainer"]["max_steps"] is None else {"epochs": None}
    if config.align is None:
        without_effect["aligner_lr"] = None
    assert config.trainer.model_dump() == raw["trainer"] | without_effect


@pytest.mark.parametrize(
    ("overrides", "changes", "idle"),
    [
        (("loss=ce",), {}, "aligner_lr"),
        (("loss=logit_kd",), {}, "aligner_lr"),
        ((), {"align__fit": "frozen"}, "aligner_lr"),
        ((), {"trainer__micro_batch_size": 16}, "micro_batch_size"),
    ],
)
def test_a_trainer_option_without_effect_is_taken_out(
    overrides: tuple[str, ...], changes: dict[str, Any], idle: str
) -> None:
    raw = composed(*overrides, **changes)
    assert raw["trainer"][idle] is not None
    assert resolve(raw)[0].trainer.model_dump()[idle] is None


@pytest.mark.parametrize(
    ("asked", "steps", "is_then"), [(300, 301, 300), (300, 300, 30), (30, 25, 2), (30, 4, 0), (0, 1, 0), (1, 1, 0)]
)
def test_a_warm_up_that_is_as_long_as_the_run_is_shortened_and_said(asked: int, steps: int, is_then: int) -> None:
    config, notes = resolve(composed(trainer__warmup_steps=asked, trainer__max_steps=steps))
    assert config.trainer.warmup_steps == is_then
    said = f"trainer.warmup_steps={asked} is shortened to {is_then}: trainer.max_steps={steps}."
    assert notes == ([said] if is_then != asked else [])


def test_the_number_of_steps_alone_makes_a_short_run() -> None:
    config, _ = resolve(composed("trainer.max_steps=4"))
    assert (config.trainer.max_steps, config.trainer.warmup_steps) == (4, 0)


def test_an_aligner_that_learns_needs_a_rate() -> None:
    assert sentence_of(composed(trainer__aligner_lr=None)) == (
        "trainer.aligner_lr=null is not allowed: set trainer.aligner_lr to a number above 0 with align.fit=joint."
    )


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_is_allowed_exactly_where_its_package_is_installed(package: str) -> None:
    raw = composed(trainer__tracker=package)
    if importlib.util.find_spec(package) is not None:
        assert resolve(raw)[0].trainer.tracker == [package]
        return
    assert sentence_of(raw) == (
        f"trainer.tracker={package} is not allowed: the package {package} is not installed; "
        "install kv-align[trackers] or use trainer.tracker=none."
    )


# Files


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/no-such-model", "a/b/c", ""])
def test_a_model_folder_that_is_not_there_is_refused(role: str, name: str) -> None:
    assert sentence_of(composed(**{f"model__{role}": name})) == (
        f"model.{role}={name} is not allowed: there is no config.json in that folder; name a folder written by "
        "save_pretrained, a model on the hub, or embedded."
    )


def test_a_folder_without_a_model_is_refused_although_it_could_be_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sentence_of(composed(model__teacher="gpt2")).startswith("model.teacher=gpt2 is not allowed: there is no ")


def test_a_name_on_the_hub_is_left_for_the_loader() -> None:
    config, _ = resolve(composed(model__teacher="Qwen/Qwen2.5-1.5B"))
    assert config.model.teacher == "Qwen/Qwen2.5-1.5B"


def test_a_model_without_weights_is_refused_where_its_weights_are_needed(write_model: WriteModel) -> None:
    empty, whole = write_model(weights=False), write_model()
    advice = "that folder holds no safetensors weights; save the model with save_pretrained and name its folder."
    assert sentence_of(pair(empty, whole)) == f"model.teacher={empty} is not allowed: {advice}"
    assert sentence_of(pair(whole, empty, start="pretrained")) == f"model.student={empty} is not allowed: {advice}"
    assert resolve(pair(whole, empty, start="scratch"))[0].model.student == empty


def test_a_model_whose_config_is_broken_is_refused(write_model: WriteModel) -> None:
    broken = write_model()
    (Path(broken) / "config.json").write_text('{"num_hidden_layers": ')
    sentence = sentence_of(pair(broken, "embedded"))
    assert sentence.startswith(f"model.teacher={broken} is not allowed: its config.json cannot be read (")
    assert sentence.endswith("; save the model again with save_pretrained.")


@pytest.mark.parametrize("data", ["gsm8k", "text"])
def test_a_data_path_that_is_not_there_is_refused(data: str) -> None:
    assert sentence_of(composed(f"data={data}", data__path="/no/such/data")) == (
        "data.path=/no/such/data is not allowed: there is no such file or folder; correct the path."
    )


def test_a_data_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    assert sentence_of(composed("data=gsm8k", data__path=str(tmp_path))) == (
        f"data=gsm8k is not allowed: data.path={tmp_path} holds no test.jsonl; name the folder with the GSM8K files."
    )
    (tmp_path / "test.csv").touch()
    assert sentence_of(composed("data=text", data__path=str(tmp_path))) == (
        f"data=text is not allowed: data.path={tmp_path} holds 2 kinds of text files; it must hold one of .txt, .jsonl, "
        ".json, .parquet, .csv."
    )


def test_text_from_a_folder_and_from_the_hub_at_once_is_refused(tmp_path: Path) -> None:
    raw = composed("data=text", data__path=str(tmp_path), data__hub_name="some/set")
    assert sentence_of(raw) == "data=text is not allowed: give either data.path or data.hub_name."


# Layer maps and vocabularies, from the models' own files


def test_more_student_layers_than_the_last_layers_can_serve_are_refused(write_model: WriteModel) -> None:
    teacher, student = write_model(layers=2), write_model(layers=3)
    assert sentence_of(pair(teacher, student, "layer_map=last")) == (
        "layer_map=last is not allowed: the student has 3 layers and the teacher only 2; use layer_map=proportional."
    )
    assert resolve(pair(teacher, student))[0].layer_map is not None
    assert resolve(pair(student, teacher, "layer_map=last"))[0].layer_map is not None


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([0, 1], "has 2 entries for 3 student layers; give one teacher layer for each."),
        ([0, 1, 2, 3], "has 4 entries for 3 student layers; give one teacher layer for each."),
        ([0, 1, 6], "names layer 6 and the teacher's are 0 to 5; use these."),
    ],
)
def test_a_list_of_layers_that_does_not_fit_the_pair_is_refused(
    write_model: WriteModel, layers: list[int], says: str
) -> None:
    raw = pair(
        write_model(layers=6, key="n_layer"),  # as GPT-2 calls it
        write_model(layers=3),
        "layer_map=list",
        "layer_map.layers=[0]",
        layer_map__layers=layers,
    )
    assert sentence_of(raw) == f"layer_map=list is not allowed: layer_map.layers={layers} {says}"


@pytest.mark.parametrize("layer_map", ["proportional", "last", "random", "reverse"])
def test_a_model_whose_file_does_not_say_its_depth_is_left_for_the_loader(
    write_model: WriteModel, layer_map: str
) -> None:
    config, _ = resolve(pair(write_model(layers=None), write_model(layers=3), f"layer_map={layer_map}"))
    assert config.layer_map is not None
    assert config.layer_map.name == layer_map


def test_logits_of_another_vocabulary_are_refused_and_keys_and_values_are_not(write_model: WriteModel) -> None:
    teacher, student = write_model(tokenizer="[1]"), write_model(tokenizer="[2]")
    assert sentence_of(pair(teacher, student, "loss=logit_kd")) == (
        f"loss=logit_kd is not allowed with model.teacher={teacher}: its vocabulary is another than that of "
        f"model.student={student}; use a pair with one tokenizer, or another loss."
    )
    assert resolve(pair(teacher, student))[0].loss.name == "kv"
    same = write_model(tokenizer="[1]")
    assert resolve(pair(teacher, same, "loss=logit_kd"))[0].loss.name == "logit_kd"


@pytest.mark.parametrize(
    ("ours", "theirs", "alike"),
    [
        ({"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, {"merges": [["a", "b"]], "vocab": {"b": 1, "a": 0}}, True),
        ({"vocab": {"a": 0}, "merges": ["a b"]}, {"vocab": {"a": 0}, "merges": [["b", "a"]]}, False),
        ({"vocab": {"a": 0, "b": 1}, "merges": []}, {"vocab": {"a": 1, "b": 0}, "merges": []}, False),
        ({"type": "WordLevel", "vocab": {"a": 0}}, {"vocab": {"a": 0}, "merges": None}, True),
        ({"vocab": [["a", -1.5], ["b", -2]]}, {"vocab": [["a", -1.5000000000000002], ["b", -2.0]]}, True),
        ({"vocab": [["a", -1.5], ["b", -2]]}, {"vocab": [["b", -2], ["a", -1.5]]}, False),
    ],
)
def test_one_vocabulary_may_be_written_in_several_ways(
    write_model: WriteModel, ours: dict[str, Any], theirs: dict[str, Any], alike: bool
) -> None:
    files = {"model": ours}, {"padding": {"pad_id": 3}, "model": theirs}
    cards = [model_card(write_model(tokenizer=json.dumps(each))) for each in files]
    assert len({card.tokenizer_digest for card in cards if card is not None}) == (1 if alike else 2)


# A user's own choices


@pytest.mark.parametrize(("group", "missing"), [("aligner", "uses_init"), ("loss", "signals")], ids=["aligner", "loss"])
def test_a_class_that_does_not_declare_what_its_group_asks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, missing: str
) -> None:
    module = f"written_for_effective_{group}"
    base = {"aligner": "kv_align.align.head_map.HeadMap", "loss": "kv_align.losses.base.Loss"}[group]
    of, _, name = base.rpartition(".")
    (tmp_path / f"{module}.py").write_text(f"from {of} import {name} as Base\nclass Mine(Base): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    raw = composed(**{group: {"name": "mine", "_target_": f"{module}.Mine"}})
    assert sentence_of(raw) == (
        f"{group}=mine is not allowed: {module}.Mine does not say its {missing}; correct its _target_ or that class."
    )


@pytest.mark.parametrize("signals", ["('keys',)", "('keys_values', 'keys')", "'keys_values'"])
def test_a_loss_with_a_signal_that_nobody_gives_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: str
) -> None:
    module = f"written_for_signals_{len(signals)}"
    (tmp_path / f"{module}.py").write_text(
        f"import kv_align.losses.base\nclass Mine(kv_align.losses.base.Loss):\n    signals = {signals}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    raw = composed(loss={"name": "mine", "_target_": f"{module}.Mine"})
    assert sentence_of(raw) == (
        f"loss=mine is not allowed: its signals={signals} must be a tuple of names among keys_values, keys_values_queries, "
        "relations, hidden_states, logits; correct that class."
    )


@pytest.mark.parametrize("init", ["least_squares", "procrustes", "cka_hungarian"])
def test_an_init_that_is_fitted_to_an_untrained_student_is_warned_of(init: str) -> None:
    assert resolve(composed(f"init={init}"))[1] == [
        f"init={init} is fitted to the states of a student that has learned nothing, so to noise; use "
        "model.student_start=pretrained."
    ]
    assert resolve(composed(f"init={init}", model__student_start="pretrained"))[1] == []
    assert resolve(composed(f"init={init}", "aligner=flat"))[1] == [
        f"init={init} has no effect on aligner=flat: left out."
    ]


@pytest.mark.parametrize("init", ["uniform", "random", "identity", "orthogonal"])
def test_an_init_that_reads_no_states_is_not(init: str) -> None:
    assert resolve(composed(f"init={init}"))[1] == []


# What is taken out


def test_an_init_without_effect_is_taken_out_with_one_line() -> None:
    config, notes = resolve(composed("aligner=flat", "init=random"))
    assert config.init is None
    assert notes == ["init=random has no effect on aligner=flat: left out."]
    assert resolve(composed())[1] == []


@pytest.mark.parametrize("loss", ["ce", "logit_kd"])
def test_all_that_concerns_keys_and_values_is_taken_out_where_none_are_compared(loss: str) -> None:
    config, notes = resolve(composed(f"loss={loss}"))
    assert (config.init, config.layer_map, config.time_warp, config.keys, config.align) == (None,) * 5
    assert config.aligner.model_dump() == {"name": "none", "target": ""}
    assert notes == [f"aligner=structured has no effect on loss={loss}, which compares no keys and values: left out."]
    assert resolve(composed(f"loss={loss}", "aligner=none"))[1] == []


@pytest.mark.parametrize(
    ("fit", "fit_steps", "period"),
    [("joint", None, None), ("frozen", None, None), ("fit_then_freeze", 100, None), ("alternate", None, 10)],
)
def test_only_the_options_that_a_fit_uses_are_kept(fit: str, fit_steps: int | None, period: int | None) -> None:
    config, _ = resolve(composed(align__fit=fit))
    assert config.align is not None
    assert (config.align.fit, config.align.fit_steps, config.align.period) == (fit, fit_steps, period)


@pytest.mark.parametrize(("max_steps", "epochs"), [(None, 3.0), (300, None)])
def test_epochs_are_kept_only_where_they_say_when_to_stop(max_steps: int | None, epochs: float | None) -> None:
    config, _ = resolve(composed(trainer__max_steps=max_steps))
    assert (config.trainer.max_steps, config.trainer.epochs) == (max_steps, epochs)


@pytest.mark.parametrize(("rationale", "every"), [("full", None), ("none", None), ("short", 2)])
def test_a_step_of_the_reasoning_is_kept_only_where_it_is_shortened(rationale: str, every: int | None) -> None:
    assert resolve(composed(data__rationale=rationale))[0].data.rationale_every == every


@pytest.mark.parametrize(
    ("loss", "signals", "compares"),
    [
        ("ce", (), False),
        ("logit_kd", (LOGITS,), False),
        ("kv", (KEYS_VALUES,), True),
        ("kv+struct", (KEYS_VALUES_QUERIES,), True),
        ("relations", (RELATIONS,), False),
        ("hidden", (HIDDEN_STATES,), False),
    ],
)
def test_what_a_loss_needs_of_the_teacher_is_known_without_importing_it(
    loss: str, signals: Signals, compares: bool
) -> None:
    config, _ = resolve(composed(f"loss={loss}"))
    assert signals_of(config.loss) == signals
    assert uses_aligner(config) is compares


# Folders become absolute, so that a frozen configuration means the same from anywhere


def test_model_folders_become_absolute(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(write_model())
    monkeypatch.chdir(folder.parent)
    config, _ = resolve(pair(f"./{folder.name}", folder.name))
    assert (config.model.teacher, config.model.student) == (str(folder.resolve()), str(folder.resolve()))


def test_the_embedded_pair_keeps_its_name_so_that_it_is_found_on_any_machine() -> None:
    config, _ = resolve(composed())
    assert (config.model.teacher, config.model.student) == ("embedded", "embedded")


def test_an_architecture_without_a_tokenizer_reads_with_the_teachers() -> None:
    embedded = str(EMBEDDED / "teacher")
    config, _ = resolve(composed("model=smollm2_135m_to_17m", "loss=kv+logit", model__teacher=embedded))
    assert config.model.student == "llama_17m"  # by its name on any machine
    student = load_student(config.model, 3, torch.device("cpu"))
    assert student.model.num_parameters() == 49_152 * 256 + 6 * 737_792 + 256
    assert (student.geometry.num_layers, student.geometry.num_key_value_heads, student.geometry.key_width) == (6, 2, 64)
    teacher = AutoTokenizer.from_pretrained(embedded)
    assert student.tokenizer("How many apples?")["input_ids"] == teacher("How many apples?")["input_ids"]
    other = load_student(config.model, 4, torch.device("cpu"))
    assert weights_digest(other.model) != weights_digest(student.model)


def test_an_architecture_with_fewer_tokens_than_the_lent_tokenizer_is_refused(write_model: WriteModel) -> None:
    folder = Path(write_model(weights=False))
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "vocab_size": 7}))
    vocabulary = json.loads((EMBEDDED / "teacher" / "config.json").read_text())["vocab_size"]
    assert sentence_of(pair("embedded", str(folder))) == (
        f"model.student={folder} is not allowed: its folder has no tokenizer, and its 7 tokens are fewer than the "
        f"{vocabulary} of model.teacher=embedded, with whose tokenizer it would read; add its tokenizer, or enlarge its "
        "vocab_size."
    )


def test_what_is_composed_is_not_changed() -> None:
    raw = composed("aligner=flat", "data=gsm8k")
    before = copy.deepcopy(raw)
    resolve(raw)
    assert raw == before


def test_the_embedded_pair_can_serve_every_loss() -> None:
    teacher, student = model_card(str(EMBEDDED / "teacher")), model_card(str(EMBEDDED / "student"))
    assert teacher is not None
    assert student is not None
    assert teacher.num_layers > student.num_layers > 0
    assert teacher.tokenizer_digest == student.tokenizer_digest
    assert teacher.tokenizer_digest is not None
    assert re.fullmatch("[0-9a-f]{64}", teacher.tokenizer_digest)
    assert (teacher.has_weights, student.has_weights) == (True, True)


def test_a_name_on_the_hub_has_no_card() -> None:
    assert model_card("openai-community/gpt2") is None
