"""How a choice's options are read from the source of its target."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from kv_align.config import options
from kv_align.config.cli import train_main
from kv_align.config.compose import compose_config
from kv_align.config.options import (
    LayerList,
    NonNegativeFloat,
    NonNegativeInt,
    Option,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
    constant_of,
    options_of,
    parameters_of,
)
from kv_align.runs.errors import ConfigError

WriteModule = Callable[[str], str]
_numbers = itertools.count()


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteModule:
    """Writes a module that can be found by the name it returns; a new name each time, since targets are cached."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = f"written_for_options_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    return write


def test_the_options_of_the_flat_aligner_are_its_keyword_only_parameters() -> None:
    assert options_of("kv_align.align.flat.FlatMap") == {
        "mlp_ratio": Option(PositiveFloat | None, required=True),
        "share_layers": Option(bool, required=True),
        "elastic": Option(bool, required=True),
        "match_parameters": Option(Literal["structured"] | None, required=False),
    }


def test_the_options_of_a_layer_map_are_those_of_a_function() -> None:
    assert options_of("kv_align.align.layer_map.fixed.explicit") == {"layers": Option(LayerList, required=True)}


def test_a_target_without_keyword_only_parameters_has_no_options() -> None:
    assert options_of("kv_align.align.layer_map.fixed.proportional") == {}
    assert options_of("kv_align.losses.ce.CrossEntropy") == {}


def test_a_default_makes_an_option_optional() -> None:
    found = options_of("kv_align.data.gsm8k.GSM8K")
    assert found["path"] == Option(str, required=False)
    assert found["validation_examples"] == Option(PositiveInt, required=False)


def test_positional_parameters_are_not_options(write_module: WriteModule) -> None:
    name = write_module("def target(shape: int, start: int = 3, *, width: PositiveInt, bias: bool = True): ...\n")
    assert options_of(f"{name}.target") == {
        "width": Option(PositiveInt, required=True),
        "bias": Option(bool, required=False),
    }


def test_parameters_are_the_positional_ones_of_a_function_or_of_a_class_without_self(write_module: WriteModule) -> None:
    name = write_module(
        "raise RuntimeError('imported')\n"
        "def function(given: int, calibration: int, *, ridge: float): ...\n"
        "class With:\n    def __init__(self, pairing: int, *, size: int) -> None: ...\n"
        "class Without:\n    signal = 'none'\n"
    )
    assert parameters_of(f"{name}.function") == ("given", "calibration")
    assert parameters_of(f"{name}.With") == ("pairing",)
    assert parameters_of(f"{name}.Without") == ()
    assert "calibration" in parameters_of("kv_align.align.init.procrustes.procrustes")
    assert "calibration" not in parameters_of("kv_align.align.init.fixed.uniform")


def test_options_are_read_without_importing_the_module(write_module: WriteModule) -> None:
    name = write_module(
        "raise RuntimeError('imported')\n"
        "class Target:\n"
        "    signal = 'logits'\n"
        "    def __init__(self, *, size: int) -> None: ...\n"
    )
    assert options_of(f"{name}.Target") == {"size": Option(int, required=True)}
    assert constant_of(f"{name}.Target", "signal") == "logits"
    assert name not in sys.modules


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("bool", bool),
        ("str", str),
        ("Any", Any),
        ("UnitFloat", UnitFloat),
        ("NonNegativeInt", NonNegativeInt),
        ("PositiveInt | None", PositiveInt | None),
        ("list[PositiveInt]", list[PositiveInt]),
        ("Literal['mse', 'cosine']", Literal["mse", "cosine"]),
        ("dict[Literal['question', 'answer'], PositiveFloat | None]", None),
    ],
)
def test_annotations_are_evaluated_to_the_types_they_name(
    write_module: WriteModule, written: str, meant: object
) -> None:
    name = write_module(f"def target(*, option: {written}): ...\n")
    annotation = options_of(f"{name}.target")["option"].annotation
    if meant is not None:
        assert annotation == meant
    else:
        adapter = TypeAdapter(annotation)
        assert adapter.validate_python({"question": 2, "answer": None}) == {"question": 2.0, "answer": None}
        with pytest.raises(ValidationError):
            adapter.validate_python({"reasoning": 2.0})


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no_such_package.module.Name", "_target_=no_such_package.module.Name names no module that can be found"),
        ("kv_align.no_such_module.Name", "_target_=kv_align.no_such_module.Name names no module that can be found"),
        ("NameAlone", "_target_=NameAlone names no module that can be found"),
        ("", "_target_= names no module that can be found"),
        ("sys.exit", "_target_=sys.exit names no module that can be found"),
        ("os.system", "os.py defines no class or function system"),
        ("kv_align.align.flat.Flat", "flat.py defines no class or function Flat"),
    ],
)
def test_a_target_that_is_not_there_is_refused_by_name(target: str, says: str) -> None:
    with pytest.raises(ValueError, match="_target_=") as refused:
        options_of(target)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("option", "target: its option option has no type"),
        (
            "option: Tensor",
            "its option option has the type Tensor; known are Annotated, Any, Count, Decay, FractionFloat, ",
        ),
        ("option: list[Tensor]", "its option option has the type list[Tensor]; known are"),
        ("option: __import__('os').system", "its option option has the type __import__('os').system; known are"),
        ("option: Literal[1", "is not Python ("),
    ],
)
def test_an_option_whose_type_cannot_be_read_is_refused(write_module: WriteModule, written: str, says: str) -> None:
    name = write_module(f"def target(*, {written}): ...\n")
    with pytest.raises(ValueError, match="target") as refused:
        options_of(f"{name}.target")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        ("kv_align.align.flat.FlatMap", "uses_init", False),
        ("kv_align.align.structured.StructuredMap", "uses_init", True),
        ("kv_align.losses.ce.CrossEntropy", "signals", ()),
        ("kv_align.losses.kv.KeyValue", "signals", ("keys_values",)),
        ("kv_align.losses.kv.KeyValueStruct", "signals", ("keys_values_queries",)),
        ("kv_align.losses.logit_kd.LogitDistillation", "signals", ("logits",)),
    ],
)
def test_what_a_class_declares_is_read_from_its_body(target: str, name: str, value: object) -> None:
    assert constant_of(target, name) == value


def test_an_annotated_declaration_is_read_like_a_plain_one(write_module: WriteModule) -> None:
    name = write_module("class Target:\n    signal: str = 'logits'\n")
    assert constant_of(f"{name}.Target", "signal") == "logits"


@pytest.mark.parametrize(
    "body",
    [
        "class Target:\n    other = 'logits'\n",
        "class Target:\n    signal = compute()\n",
        "class Target:\n    signal: str\n",
        "def Target():\n    signal = 'logits'\n",
    ],
)
def test_a_target_that_does_not_declare_a_literal_is_refused(write_module: WriteModule, body: str) -> None:
    name = write_module(body)
    with pytest.raises(ValueError, match="does not say its signal"):
        constant_of(f"{name}.Target", "signal")


@pytest.mark.parametrize(
    ("annotation", "accepted", "refused"),
    [
        (PositiveFloat, [0.5, 1, 1e300], [0, -1.0, float("inf"), float("nan"), True, "1", None]),
        (NonNegativeFloat, [0, 0.0, 2.5], [-1e-9, float("inf"), float("nan"), False, "0"]),
        (UnitFloat, [0, 0.5, 1], [-0.1, 1.1, float("nan")]),
        (PositiveInt, [1, 10**12], [0, -1, 1.0, True, "1"]),
        (NonNegativeInt, [0, 7], [-1, 0.0, False]),
        (LayerList, [[0], [3, 1, 1]], [[], [-1], [1.0], 3, (1, 2), None]),
    ],
)
def test_each_type_accepts_what_its_name_says(annotation: object, accepted: list[Any], refused: list[Any]) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    for value in accepted:
        assert adapter.validate_python(value, strict=True) == value
    for value in refused:
        with pytest.raises(ValidationError):
            adapter.validate_python(value, strict=True)


def test_every_type_of_the_module_can_be_named_in_an_annotation(write_module: WriteModule) -> None:
    named = [name for name in vars(options) if name.endswith(("Int", "Float", "List"))]
    parameters = ", ".join(f"option_{name}: {name}" for name in named)
    found = options_of(f"{write_module(f'def target(*, {parameters}): ...')}.target")
    assert {option: each.annotation for option, each in found.items()} == {
        f"option_{name}": getattr(options, name) for name in named
    }
    assert len(named) == 8


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {"WORLD_SIZE": "abc", "RANK": "0"},
            "RANK=0 is not allowed with WORLD_SIZE=abc: start the processes with torchrun.",
        ),
        (
            {"WORLD_SIZE": "0", "RANK": "0"},
            "RANK=0 is not allowed with WORLD_SIZE=0: start the processes with torchrun.",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "5"},
            "RANK=5 is not allowed with WORLD_SIZE=2: start the processes with torchrun.",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE=2 is not allowed without MASTER_ADDR: start the processes with torchrun.",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "WORLD_SIZE=2 is not allowed without LOCAL_RANK: start the processes with torchrun.",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x", "LOCAL_RANK": "0"},
            "MASTER_PORT=x is no number: start the processes with torchrun.",
        ),
        ({"RANK": "1"}, "RANK=1 is not allowed without WORLD_SIZE: start the processes with torchrun, or unset it."),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 is not allowed without RANK: start the processes with torchrun, or unset it.",
        ),
    ],
    ids=str,
)
def test_half_of_what_says_which_process_this_is_is_refused(environment, sentence, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        train_main(lambda config, path: "finished")
    assert (left.value.code, capsys.readouterr().err) == (2, f"kv-align: {sentence}\n")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "hub.repo='na me/repo'",
            "hub.repo='na me/repo' is not allowed: set hub.repo to a repository's name on the hub",
        ),
        (f"hub.repo={'n' * 300}/r", "is not allowed: set hub.repo to a repository's name on the hub"),
        (
            "seed=99999999999999999999999",
            "seed=99999999999999999999999 is not allowed: set seed to a number of at most",
        ),
        ("evaluation.lm_eval=' '", "evaluation.lm_eval"),
    ],
)
def test_a_name_or_a_number_that_would_fail_at_the_end_is_refused_at_once(override, sentence):
    with pytest.raises(ConfigError) as refused:
        compose_config([override])
    assert sentence in str(refused.value)
