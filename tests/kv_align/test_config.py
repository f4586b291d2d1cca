"""The schema of `conf/`: every file of it fits its target, every cell composes or is refused, and what a hash is of."""

import copy
import inspect
import itertools
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hydra.utils import get_object
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from kv_align.config.compose import arm_name, compose_config, compose_raw, default_run_name
from kv_align.config.config import (
    AlignConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    KeysConfig,
    LlamaShape,
    ModelConfig,
    PretrainConfig,
    TrainerConfig,
)
from kv_align.config.identity import content_hash
from kv_align.config.options import options_of
from kv_align.config.resolve import resolve
from kv_align.config.schema import Choice, validate
from kv_align.config.targets import config_directory
from kv_align.runs.errors import ConfigError

GROUPS_WITH_TARGETS = ("adapter", "aligner", "data", "init", "layer_map", "loss", "time_warp")
GROUPS_WITHOUT = {"model": ModelConfig, "keys": KeysConfig, "trainer": TrainerConfig}
OF_OTHERS = {"experiment", "sweep", "cluster", "criteria", "hydra"}
BASES = {"reading"}  # files that others of their group start from, and that are no choices themselves
GIVEN = {
    "layer_map=list": ["layer_map.layers=[1,3,5]"],
    "model=pair": ["model.teacher=embedded", "model.student=embedded"],
    "model=smollm2_135m_to_64m": ["model.student=embedded"],
}
EXPERIMENTS = (
    "baseline",
    "v4_0_1",
    "v4_0_2",
    "v4_0_3",
    "none",
    "logit_kd",
    "frozen_random",
    "shuffled_teacher",
    "roadmap_literal",
    "relations",
    "hidden",
    "orthogonal",
    "orthogonal_frozen",
)


def choices(*groups: str) -> list[str]:
    files = [file for group in groups for file in sorted((config_directory() / group).glob("*.yaml"))]
    return [f"{file.parent.name}={file.stem}" for file in files if file.stem not in BASES]


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose_raw(overrides)


def composed(*overrides: str) -> dict[str, Any]:
    """What Hydra composes, as a copy that a test may change."""
    return copy.deepcopy(_composed(overrides))


def composed_choice(choice: str) -> dict[str, Any]:
    section = composed(choice, *GIVEN.get(choice, []))[choice.partition("=")[0]]
    assert isinstance(section, dict)
    return section


# Files and signatures


def test_the_groups_of_conf_are_those_that_are_tested_here() -> None:
    groups = {folder.name for folder in config_directory().iterdir() if any(folder.glob("*.yaml"))}
    assert groups - OF_OTHERS == {*GROUPS_WITH_TARGETS, *GROUPS_WITHOUT}
    assert [f"experiment={name}" for name in sorted(EXPERIMENTS)] == choices("experiment")


@pytest.mark.parametrize("choice", choices(*GROUPS_WITH_TARGETS, *GROUPS_WITHOUT))
def test_a_choice_has_the_name_of_its_file(choice: str) -> None:
    assert composed_choice(choice)["name"] == choice.partition("=")[2]


@pytest.mark.parametrize("choice", [each for each in choices(*GROUPS_WITH_TARGETS) if not each.endswith("=none")])
def test_the_keys_of_a_choice_are_the_options_of_its_target_and_their_values_have_their_types(choice: str) -> None:
    section = composed_choice(choice)
    target = get_object(section["_target_"])
    function = target.__init__ if inspect.isclass(target) else target
    own = {"name", "_target_"} | (set(DataConfig.model_fields) if choice.startswith("data=") else set())
    keywords = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    options = options_of(section["_target_"])
    assert set(section) - own == keywords
    assert set(options) == keywords
    types = typing.get_type_hints(function, include_extras=True)
    for name in keywords:
        assert types[name] == options[name].annotation
        TypeAdapter(types[name]).validate_python(section[name], strict=True)


@pytest.mark.parametrize("group", ["adapter", "aligner"])
def test_none_has_neither_target_nor_options(group: str) -> None:
    assert composed_choice(f"{group}=none") == {"name": "none"}


@pytest.mark.parametrize("choice", choices(*GROUPS_WITHOUT))
def test_the_keys_of_a_plain_section_are_the_fields_of_its_type(choice: str) -> None:
    kind, section = GROUPS_WITHOUT[choice.partition("=")[0]], composed_choice(choice)
    assert set(section) == set(kind.model_fields)
    assert validate(kind, section).model_dump() == section


def test_the_keys_of_the_primary_configuration_are_the_fields_of_its_type() -> None:
    raw = composed()
    assert set(raw) == set(Config.model_fields) - {"inputs"}  # which no command line says
    assert set(raw["align"]) == set(AlignConfig.model_fields)
    assert set(raw["evaluation"]) == set(EvaluationConfig.model_fields)


def test_the_pretraining_recipe_fits_its_type() -> None:
    raw = compose_raw([], config_name="pretrain")
    assert set(raw) == set(PretrainConfig.model_fields)
    assert set(raw["teacher"]) == set(raw["student"]) == set(LlamaShape.model_fields)
    recipe = validate(PretrainConfig, raw)
    assert (recipe.teacher.num_layers, recipe.student.num_layers) == (
        raw["teacher"]["num_layers"],
        raw["student"]["num_layers"],
    )


# Cells


def refusal(experiment: str | None, aligner: str, loss: str) -> str | None:
    """What a cell is refused for, None where it is allowed."""
    if aligner != "structured" and experiment in ("v4_0_1", "v4_0_2", "v4_0_3", "roadmap_literal"):
        return "aligner.share_dim_proj is an unknown key"
    if loss in ("kv", "kv+struct"):
        return f"loss={loss} is not allowed with aligner=none" if aligner == "none" else None
    return "data.shuffle_teacher=true is not allowed" if experiment == "shuffled_teacher" else None


def cells() -> Iterator[tuple[str | None, list[tuple[str, str, str]]]]:
    """By experiment, its (aligner, loss, init). Flat and none, which have no init, take the inits in turn."""
    losses, inits = ("kv", "kv+struct", "ce", "logit_kd"), ("uniform", "random")
    yield None, list(itertools.product(("flat", "structured", "none"), losses, inits))
    for shift, experiment in enumerate(EXPERIMENTS):
        pairs = itertools.product(("flat", "none"), losses)
        in_turn = [(*pair, inits[(place + place // 4 + shift) % 2]) for place, pair in enumerate(pairs)]
        yield experiment, [*itertools.product(["structured"], losses, inits), *in_turn]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "grid"), list(cells()))
def test_every_cell_is_composed_and_made_canonical_or_refused(
    experiment: str | None, grid: list[tuple[str, str, str]]
) -> None:
    check_cells(experiment, grid)


@pytest.mark.parametrize(("place", "experiment", "grid"), [(place, *cell) for place, cell in enumerate(cells())])
def test_a_cell_is_composed_and_made_canonical_or_refused(
    place: int, experiment: str | None, grid: list[tuple[str, str, str]]
) -> None:
    """Of each experiment every fourth cell, from another one on in each: all aligners, losses and inits come up."""
    check_cells(experiment, grid[place % 4 :: 4])


def check_cells(experiment: str | None, grid: list[tuple[str, str, str]]) -> None:
    for aligner, loss, init in grid:
        named = [] if experiment is None else [f"experiment={experiment}"]
        command = [*named, f"aligner={aligner}", f"loss={loss}", f"init={init}"]
        expected = refusal(experiment, aligner, loss)
        if expected is not None:
            with pytest.raises(ConfigError) as refused:
                compose_config(command)
            assert str(refused.value).startswith(expected), command
            continue
        config, _ = compose_config(command)
        aligned = loss in ("kv", "kv+struct")
        assert config.loss.name == loss
        assert config.aligner.name == (aligner if aligned else "none"), command
        assert (config.init and config.init.name) == (init if aligned and aligner == "structured" else None), command
        for group in ("layer_map", "time_warp", "keys", "align"):
            assert (getattr(config, group) is not None) == aligned, command
        assert config.arm == experiment


@pytest.mark.parametrize(
    ("experiment", "aligner", "init", "share_dim_proj", "loss", "rotated", "fit", "shuffled"),
    [
        ("baseline", "flat", None, None, "kv", False, "joint", False),
        ("v4_0_1", "structured", "random", True, "kv", False, "joint", False),
        ("v4_0_2", "structured", "uniform", True, "kv", False, "joint", False),
        ("v4_0_3", "structured", "uniform", False, "kv", False, "joint", False),
        ("none", "none", None, None, "ce", None, None, False),
        ("logit_kd", "none", None, None, "logit_kd", None, None, False),
        ("frozen_random", "structured", "random", True, "kv", False, "frozen", False),
        ("shuffled_teacher", "structured", "uniform", True, "kv", False, "joint", True),
    ],
)
def test_an_experiment_is_what_the_expected_results_matrix_says(
    experiment: str,
    aligner: str,
    init: str | None,
    share_dim_proj: bool | None,
    loss: str,
    rotated: bool | None,
    fit: str | None,
    shuffled: bool,
) -> None:
    config, _ = compose_config([f"experiment={experiment}"])
    assert arm_name(config) == experiment
    assert config.aligner.name == aligner
    assert (config.init and config.init.name) == init
    assert config.aligner.options.get("share_dim_proj") is share_dim_proj
    assert config.loss.name == loss
    assert (config.keys and config.keys.rotated) is rotated
    assert (config.align and config.align.fit) == fit
    assert config.data.shuffle_teacher is shuffled


def test_the_defaults_of_the_losses_are_those_of_the_method() -> None:
    assert {key: composed_choice("loss=kv+struct")[key] for key in ("lambda_kv", "lambda_struct", "temperature")} == {
        "lambda_kv": 0.5,
        "lambda_struct": 0.1,
        "temperature": 1.0,
    }
    parts = {key: composed_choice("loss=kv+struct")[key] for key in ("alpha_k", "alpha_v", "alpha_attn")}
    assert parts == {"alpha_k": 1.0, "alpha_v": 1.0, "alpha_attn": 0.5}


def test_the_full_trainer_has_the_defaults_of_the_full_experiment() -> None:
    full = composed_choice("trainer=full")
    assert (full["epochs"], full["max_steps"], full["batch_size"], full["lr"]) == (3.0, None, 8, 5e-5)


# Content hash


def hash_of(*overrides: str) -> str:
    return content_hash(resolve(composed(*overrides))[0])


def with_inputs(raw: dict[str, Any]) -> Config:
    """What is validated, of a version that records inputs; it has none."""
    return validate(Config, raw).model_copy(update={"inputs": {}})


def test_a_hash_is_a_sha256_that_another_process_would_give_too() -> None:
    config, _ = resolve(composed())
    reordered = {key: composed()[key] for key in reversed(composed())}
    assert len(content_hash(config)) == 64
    assert int(content_hash(config), 16) >= 0
    assert content_hash(resolve(reordered)[0]) == content_hash(config)


@pytest.mark.parametrize(
    "commands",
    [
        [("aligner=flat", "init=uniform"), ("aligner=flat", "init=random"), ("aligner=flat",)],
        [("loss=ce", "aligner=none"), ("loss=ce", "aligner=flat"), ("loss=ce", "aligner=structured", "init=random")],
        [("loss=ce",), ("loss=ce", "keys=rotated", "layer_map=reverse", "align.fit=frozen", "time_warp.smoothness=2")],
        [("loss=logit_kd", "aligner=none"), ("loss=logit_kd", "aligner=flat"), ("experiment=logit_kd",)],
        [(), ("experiment=v4_0_2",), ("aligner=structured", "init=uniform", "loss=kv")],
        [(), ("output_dir=elsewhere",), ("run_name=mine",), ("arm=mine",), ("trainer.num_workers=4",)],
        [(), ("trainer.checkpoint_interval=7",), ("trainer.keep_checkpoints=9",)],
        [(), ("align.fit_steps=7",), ("align.period=7",), ("data.rationale_every=5",)],
        [("align.fit=alternate",), ("align.fit=alternate", "align.fit_steps=7")],
        [("align.fit=fit_then_freeze",), ("align.fit=fit_then_freeze", "align.period=7")],
        [("loss.lambda_kv=1",), ("loss.lambda_kv=1.0",), ("loss.lambda_kv=1e0",)],
        [("aligner=flat", "aligner.mlp_ratio=2"), ("aligner=flat", "aligner.mlp_ratio=2.0")],
        [
            ("aligner=flat", "aligner.match_parameters=structured"),
            ("aligner=flat", "aligner.match_parameters=structured", "aligner.mlp_ratio=2"),
        ],
        [("loss=hidden",), ("loss=hidden", "keys=rotated", "align.fit=frozen", "aligner=flat")],
        [("time_warp.ratios.answer=2",), ("time_warp.ratios.answer=2.0",)],
        [("trainer.max_steps=null", "trainer.epochs=3"), ("trainer.max_steps=null", "trainer.epochs=3.0")],
        [("trainer.max_steps=300",), ("trainer.max_steps=300", "trainer.epochs=5")],
        [
            ("model=embedded",),
            ("model=pair", *GIVEN["model=pair"], "model.student_start=scratch", "model.teacher_dtype=float32"),
        ],
    ],
)
def test_commands_that_mean_the_same_run_have_one_hash(commands: list[tuple[str, ...]]) -> None:
    assert len({hash_of(*command) for command in commands}) == 1


def test_a_tracker_does_not_change_the_hash() -> None:
    config = with_inputs(composed())
    for tracker in ("tensorboard", "wandb"):
        tracked = config.model_copy(update={"trainer": config.trainer.model_copy(update={"tracker": [tracker]})})
        assert content_hash(tracked) == content_hash(config)


def test_two_spellings_of_a_folder_have_one_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("train.jsonl", "test.jsonl"):
        (tmp_path / file).write_text('{"question": "?", "answer": "#### 1"}\n' * 3)
    raw = composed("data=gsm8k", "data.validation_examples=2")
    raw["data"]["path"] = str(tmp_path)
    whole, _ = resolve(copy.deepcopy(raw))
    monkeypatch.chdir(tmp_path.parent)
    raw["data"]["path"] = f"./{tmp_path.name}/../{tmp_path.name}"
    spelled, _ = resolve(raw)
    assert content_hash(spelled) == content_hash(whole)
    assert spelled.data.options["path"] == str(tmp_path.resolve())


@pytest.mark.parametrize("overrides", [(), ("loss=ce",), ("aligner=flat",), ("loss=kv+struct", "align.fit=alternate")])
def test_a_frozen_configuration_is_the_same_run_again(overrides: tuple[str, ...]) -> None:
    config, _ = resolve(composed(*overrides))
    frozen = yaml.safe_load(yaml.safe_dump(config.model_dump(by_alias=True), sort_keys=False))
    again, notes = resolve(frozen)
    assert again == config
    assert content_hash(again) == content_hash(config)
    assert notes == []


@pytest.mark.parametrize(
    "commands",
    [
        [("init=uniform",), ("init=random",)],
        [("layer_map=proportional",), ("layer_map=last",), ("layer_map=reverse",), ("layer_map=random",)],
        [("keys=rotated",), ("keys=unrotated",)],
        [("aligner=structured",), ("aligner=flat",), ("experiment=v4_0_3",), ("experiment=roadmap_literal",)],
        [("loss=kv",), ("loss=kv+struct",), ("loss=ce",), ("loss=logit_kd",), ("loss=relations",), ("loss=hidden",)],
        [("init=identity",), ("init=orthogonal",), ("init=least_squares",), ("init=least_squares", "init.ridge=1")],
        [("layer_map=cka",), ("layer_map=cka", "layer_map.monotone=false"), ("layer_map=learned",)],
        [
            ("aligner=flat",),
            ("aligner=flat", "aligner.mlp_ratio=null"),
            ("aligner=flat", "aligner.match_parameters=structured"),
        ],
        [(), ("experiment=frozen_random",), ("experiment=shuffled_teacher",), ("experiment=v4_0_1",)],
        [(), ("data.rationale=none",), ("data.rationale=short",), ("data.rationale=short", "data.rationale_every=3")],
        [("align.fit=alternate",), ("align.fit=alternate", "align.period=7")],
        [("trainer.max_steps=null",), ("trainer.max_steps=null", "trainer.epochs=5"), ("trainer.max_steps=300",)],
    ],
)
def test_choices_that_change_numbers_have_other_hashes(commands: list[tuple[str, ...]]) -> None:
    assert len({hash_of(*command) for command in commands}) == len(commands)


# Excluded by declaration: where a run is written, how it is shown, how fast it goes, and labels.
WITHOUT_NUMBERS = {
    "output_dir",
    "run_name",
    "arm",
    "model.teacher_device_map",
    "model.remote_code",  # of another model than the two
    "trainer.parallel",
    "trainer.num_workers",
    "trainer.checkpoint_interval",
    "trainer.keep_checkpoints",
    "trainer.tracker",
    "trainer.grad_norm_interval",  # how often a diagnostic is measured
    "hub.repo",
    "hub.private",
    "teacher_cache",  # whether there is one is in the hash by its precision
}


def leaves(section: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def annotation_of(raw: dict[str, Any], key: str) -> Any:
    """The type that a key is checked against, from the schema or from the target's signature."""
    section, _, rest = key.partition(".")
    if not rest:
        return Config.model_fields[section].annotation
    kind = Config.model_fields[section].annotation
    kind = next(
        each for each in (kind, *typing.get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)
    )
    if rest in kind.model_fields:
        return kind.model_fields[rest].annotation
    annotation = options_of(raw[section]["_target_"])[rest.partition(".")[0]].annotation
    return typing.get_args(annotation)[1] if "." in rest else annotation


def another(annotation: Any, value: Any) -> Any:
    """A valid value other than `value`."""
    for kind in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(kind) is Literal:
            return next(each for each in typing.get_args(kind) if each != value)
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value + 0.125
        case str():
            return f"{value}-other"
        case list():
            return [*value, "other" if annotation == list[str] else 1]
        case _:
            assert value is None
            members = typing.get_args(annotation)
            if any(typing.get_origin(member) is list for member in members):
                return ["other"]
            literals = [each for member in members for each in typing.get_args(member) if isinstance(each, str)]
            return literals[0] if literals else "other" if str in members else 1


BASE_COMMANDS = (
    ("loss=kv+struct", "align.fit=fit_then_freeze"),
    ("aligner=flat", "loss=kv", "trainer=full", "align.fit=alternate"),
    ("loss=logit_kd", "data=gsm8k", "trainer=full"),
    ("loss=ce", "data=text"),
    ("layer_map=list", "layer_map.layers=[1,3,5]", "model=pair", *GIVEN["model=pair"]),
)


@pytest.mark.parametrize("command", BASE_COMMANDS, ids=" ".join)
def test_every_key_that_changes_a_number_changes_the_hash_and_no_other_does(command: tuple[str, ...]) -> None:
    raw = composed(*command)
    before = content_hash(with_inputs(raw))
    seen = 0
    for key, value in leaves(raw):
        if key.endswith("_target_"):
            continue
        changed = copy.deepcopy(raw)
        *parents, last = key.split(".")
        section = changed
        for parent in parents:
            section = section[parent]
        section[last] = another(annotation_of(raw, key), value)
        is_label = last == "name" or key in WITHOUT_NUMBERS
        assert (content_hash(with_inputs(changed)) == before) == is_label, key
        seen += 1
    assert seen > 50


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    *(
        st.fixed_dictionaries(
            {},
            optional={
                "seed": st.integers(0, 2),
                "trainer.batch_size": st.integers(1, 3),
                "trainer.num_workers": st.integers(0, 2),
                "trainer.checkpoint_interval": st.integers(1, 3),
                "trainer.lr": st.sampled_from([1, 1.0, 0.5]),
                "evaluation.interval": st.integers(1, 3),
                "loss.lambda_kv": st.sampled_from([0, 0.0, 1, 1.0]),
                "aligner.elastic": st.booleans(),
                "arm": st.sampled_from(["a", "b"]),
                "output_dir": st.sampled_from(["a", "b"]),
            },
        )
        for _ in range(2)
    )
)
def test_two_configurations_hash_alike_exactly_if_they_agree_in_all_that_changes_numbers(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    hashes, meant = [], []
    for changes in (one, two):
        raw = composed()
        for key, value in changes.items():
            *parents, last = key.split(".")
            (raw[parents[0]] if parents else raw)[last] = value
        hashes.append(content_hash(with_inputs(raw)))
        meant.append({key: value for key, value in leaves(raw) if key not in WITHOUT_NUMBERS})
    assert (hashes[0] == hashes[1]) == (meant[0] == meant[1])


def test_a_plan_from_before_runs_were_sharded_is_read_as_it_was_meant() -> None:
    raw = composed()
    now = validate(Config, raw)
    del raw["trainer"]["parallel"]
    assert validate(Config, raw) == now
    assert now.trainer.parallel == "ddp"


# The object


def test_a_configuration_is_frozen() -> None:
    config, _ = resolve(composed())
    sections: list[tuple[BaseModel, str]] = [
        (config, "seed"),
        (config.model, "teacher"),
        (config.data, "max_length"),
        (config.aligner, "name"),
        (config.aligner, "elastic"),
        (config.trainer, "lr"),
        (config.evaluation, "interval"),
    ]
    for section, key in sections:
        before = getattr(section, key)
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, before)
        assert getattr(section, key) == before


def test_options_are_handed_out_as_a_copy() -> None:
    config, _ = resolve(composed())
    config.aligner.options["elastic"] = True
    assert config.aligner.options == {"share_dim_proj": True, "share_layers": False, "elastic": False}


def test_options_have_the_type_that_their_target_declares() -> None:
    raw = composed()
    raw["loss"]["lambda_kv"] = 2
    raw["time_warp"]["ratios"]["answer"] = 3
    config = validate(Config, raw)
    assert isinstance(config.loss.options["lambda_kv"], float)
    assert config.time_warp is not None
    assert isinstance(config.time_warp.options["ratios"]["answer"], float)
    assert type(config.data) is DataConfig
    assert type(config.aligner) is Choice


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("trainer.lr", 0.0, "trainer.lr=0.0 is not allowed: set trainer.lr to a number above 0."),
        ("trainer.lr", float("inf"), "trainer.lr=inf is not allowed: set trainer.lr to a finite number."),
        (
            "trainer.batch_size",
            True,
            "trainer.batch_size=true is not allowed: set trainer.batch_size to a whole number.",
        ),
        ("seed", -1, "seed=-1 is not allowed: set seed to a number of at least 0."),
        ("seed", None, "seed=null is not allowed: set seed to a whole number."),
        ("evaluation", None, "evaluation=null is not allowed: set evaluation to a mapping."),
        (
            "align.fit",
            "never",
            "align.fit=never is not allowed: set align.fit to one of joint, fit_then_freeze, alternate or frozen.",
        ),
        ("loss.metric", "l1", "loss.metric=l1 is not allowed: set loss.metric to one of mse or cosine."),
        ("loss.lambda_kv", float("nan"), "loss.lambda_kv=nan is not allowed: set loss.lambda_kv to a finite number."),
        ("aligner.elastic", 1, "aligner.elastic=1 is not allowed: set aligner.elastic to true or false."),
        (
            "time_warp.ratios.answer",
            0,
            "time_warp.ratios.answer=0 is not allowed: set time_warp.ratios.answer to a number above 0.",
        ),
        (
            "time_warp.ratios.anwser",
            1.0,
            "time_warp.ratios.anwser is an unknown key: "
            "time_warp.ratios has the keys answer, question, reasoning; did you mean answer.",
        ),
        (
            "aligner.mlp_ratio",
            4.0,
            "aligner.mlp_ratio is an unknown key: "
            "aligner=structured has the keys elastic, share_dim_proj, share_layers; remove it or use one of these.",
        ),
        (
            "init.scale",
            1.0,
            "init.scale is an unknown key: init=uniform has the keys none; remove it or use one of these.",
        ),
        ("keys.rotate", True, "keys.rotate is an unknown key: keys has the keys rotated; did you mean rotated."),
        ("aligner._target_", "kv_align.align.flat.Flat", "aligner=structured: _target_=kv_align.align.flat.Flat: "),
    ],
)
def test_a_wrong_key_type_or_range_is_one_sentence(key: str, value: object, sentence: str) -> None:
    raw = composed()
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        section = section[parent]
    section[last] = value
    with pytest.raises(ConfigError) as refused:
        validate(Config, raw)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["seed", "loss", "trainer.lr", "data.rationale", "aligner.share_dim_proj"])
def test_a_missing_key_is_named(key: str) -> None:
    raw = composed()
    section, _, last = key.rpartition(".")
    del (raw[section] if section else raw)[last]
    with pytest.raises(ConfigError, match=rf"^{key} is missing: "):
        validate(Config, raw)


# Names


def test_a_run_is_named_after_its_choices_its_seed_and_its_hash() -> None:
    config, _ = resolve(composed("loss=kv+struct"))
    assert default_run_name(config) == f"structured-uniform-kv+struct-seed0-{content_hash(config)[:8]}"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "structured-uniform"),
        (("init=random",), "structured-random"),
        (("aligner.share_dim_proj=false",), "structured-per_head-uniform"),
        (("aligner=flat",), "flat"),
        (("loss=ce",), "ce"),
        (("loss=logit_kd",), "logit_kd"),
        (("experiment=v4_0_3",), "v4_0_3"),
        (("experiment=none", "arm=mine"), "mine"),
    ],
)
def test_an_arm_is_named_as_declared_or_after_what_tells_it_from_others(overrides: tuple[str, ...], name: str) -> None:
    assert arm_name(resolve(composed(*overrides))[0]) == name
