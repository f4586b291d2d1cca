"""The parameter-matched flat aligner: as near to the structured one as hidden units can be rounded."""

import itertools
import logging

import pytest

from kv_align.align.aligner import count_parameters, map_generator
from kv_align.align.flat import FlatMap, flat_parameters, matched_widths
from kv_align.align.head_map import MapInit, MapShape
from kv_align.align.init.fixed import uniform
from kv_align.align.structured import StructuredMap, structured_parameters
from kv_align.config.compose import compose_config
from kv_align.experiment.choices import make_aligner
from kv_align.models.capture.prepare import Geometry

# Layers, query heads, KV heads, key width, value width of teacher and student.
PAIRS = {
    "embedded": (Geometry(6, 8, 4, 24, 24), Geometry(3, 4, 2, 16, 16)),
    "qwen2.5 7b to 1.5b": (Geometry(28, 28, 4, 128, 128), Geometry(28, 12, 2, 128, 128)),
    "llama3.2 3b to 1b": (Geometry(28, 24, 8, 128, 128), Geometry(16, 32, 8, 64, 64)),
    "wide values": (Geometry(4, 16, 2, 32, 48), Geometry(2, 8, 8, 64, 16)),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)
every_loss = pytest.mark.parametrize("loss", ["kv", "kv+struct"])


def shapes_of(teacher: Geometry, student: Geometry, *, queries: bool) -> dict:
    t, s = teacher, student
    shapes = {
        "key": MapShape(s.num_layers, t.num_key_value_heads, t.key_width, s.num_key_value_heads, s.key_width),
        "value": MapShape(s.num_layers, t.num_key_value_heads, t.value_width, s.num_key_value_heads, s.value_width),
        "query": MapShape(s.num_layers, t.num_query_heads, t.key_width, s.num_query_heads, s.key_width),
    }
    return shapes if queries else {kind: shapes[kind] for kind in ("key", "value")}


def built(pair: str, loss: str, *overrides: str) -> int:
    config, _ = compose_config([*overrides, f"loss={loss}"])
    aligner = make_aligner(config, *PAIRS[pair], queries=loss == "kv+struct")
    assert aligner is not None
    return count_parameters(aligner)


@pytest.mark.parametrize(
    ("loss", "structured", "matched"),
    [
        # Keys: 2 heads x 4 + 24 x 16 = 392 a layer; 3 hidden units of 96 + 1 + 32, and 32 biases, are 419.
        ("kv", 3 * 2 * 392, 3 * 2 * 419),
        # Queries: 4 x 8 + 24 x 16 = 416; a hidden unit of 192 + 1 + 64, and 64 biases, are 321.
        ("kv+struct", 3 * (2 * 392 + 416), 3 * (2 * 419 + 321)),
    ],
)
def test_the_embedded_pair_by_hand(loss: str, structured: int, matched: int) -> None:
    assert built("embedded", loss, "aligner=structured") == structured
    assert built("embedded", loss, "aligner=flat", "aligner.match_parameters=structured") == matched


@every_loss
@every_pair
def test_no_other_rounding_comes_nearer(pair: str, loss: str) -> None:
    shapes = shapes_of(*PAIRS[pair], queries=loss == "kv+struct")
    widths = matched_widths(shapes)
    wanted = sum(structured_parameters(shape) for shape in shapes.values())
    found = abs(sum(flat_parameters(shapes[kind], widths[kind]) for kind in shapes) - wanted)
    near = [[max(1, widths[kind] + step) for step in (-1, 0, 1)] for kind in shapes]
    for way in itertools.product(*near):
        # Neighbours that are themselves a share rounded up or down.
        rounded = all(
            abs(flat_parameters(shape, width) - structured_parameters(shape))
            < flat_parameters(shape, 1) - flat_parameters(shape, 0)
            for shape, width in zip(shapes.values(), way, strict=True)
        )
        total = sum(flat_parameters(shape, width) for shape, width in zip(shapes.values(), way, strict=True))
        assert not rounded or abs(total - wanted) >= found


@every_loss
@every_pair
def test_the_built_aligners_have_these_numbers_and_both_are_logged(
    pair: str, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = shapes_of(*PAIRS[pair], queries=loss == "kv+struct")
    widths, layers = matched_widths(shapes), PAIRS[pair][1].num_layers
    structured = built(pair, loss, "aligner=structured")
    assert structured == layers * sum(structured_parameters(shape) for shape in shapes.values())
    with caplog.at_level(logging.INFO, logger="kv_align.experiment.choices"):
        matched = built(pair, loss, "aligner=flat", "aligner.match_parameters=structured")
    assert matched == layers * sum(flat_parameters(shapes[kind], widths[kind]) for kind in shapes)
    assert caplog.messages == [f"aligner=flat: {matched} parameters, matched to {structured}"]
    # Half a hidden unit of each kind is the most that rounding can cost, unless one unit is already too many.
    units = [flat_parameters(shape, 1) - flat_parameters(shape, 0) for shape in shapes.values()]
    if all(width > 1 for width in widths.values()):
        assert abs(matched - structured) <= layers * sum(units) / 2


def test_real_pairs_match_within_two_percent() -> None:
    for pair in ("qwen2.5 7b to 1.5b", "llama3.2 3b to 1b"):
        for loss in ("kv", "kv+struct"):
            structured = built(pair, loss, "aligner=structured")
            matched = built(pair, loss, "aligner=flat", "aligner.match_parameters=structured")
            assert matched / structured == pytest.approx(1.0, abs=0.02), (pair, loss)


@pytest.mark.parametrize("option", ["share_layers", "elastic"])
def test_shared_layers_and_elastic_factors_are_matched_too(option: str) -> None:
    shape = MapShape(num_layers=3, teacher_heads=4, teacher_width=24, student_heads=2, student_width=16)
    options = {"share_layers": False, "elastic": False} | {option: True}
    start = MapInit(uniform, map_generator(0, "mix"), map_generator(0, "width"), "key", {"key": shape})
    flat = FlatMap(shape, start, mlp_ratio=None, match_parameters="structured", **options)
    structured = StructuredMap(shape, start, share_dim_proj=True, **options)
    assert flat.matched == count_parameters(structured)
    maps = 1 if option == "share_layers" else 3
    assert count_parameters(flat) - flat.matched == maps * (419 - 392)


def test_a_hidden_layer_has_at_least_one_unit() -> None:
    # One unit of 64 x 128 in and 1 x 2 out is more than the structured map has.
    shape = MapShape(num_layers=1, teacher_heads=64, teacher_width=128, student_heads=1, student_width=2)
    assert matched_widths({"key": shape}) == {"key": 1}
    assert flat_parameters(shape, 1) == 64 * 128 + 1 + 2 + 2 > structured_parameters(shape) == 64 + 256


def test_what_is_matched_has_no_other_width_and_an_unset_option_leaves_the_identity() -> None:
    matched = "aligner.match_parameters=structured"
    plain, _ = compose_config(["aligner=flat"])
    assert plain.aligner.options == {"mlp_ratio": 4.0, "share_layers": False, "elastic": False}
    one, two = (compose_config(["aligner=flat", matched, f"aligner.mlp_ratio={ratio}"])[0] for ratio in (4, 2))
    assert one == two
    assert one.aligner.options == plain.aligner.options | {"mlp_ratio": None, "match_parameters": "structured"}
    linear, _ = compose_config(["aligner=flat", "aligner.mlp_ratio=null"])
    assert linear.aligner.options == plain.aligner.options | {"mlp_ratio": None}
