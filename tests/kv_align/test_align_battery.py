"""One battery that every aligner passes, and beside each fast path a plain loop that says what it computes.

An aligner of your own is one more `Entry`: its class, its options and, if there is one, its loop.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kv_align.align.aligner import Aligner, count_parameters, map_generator
from kv_align.align.flat import FlatMap, flatten_heads, unflatten_heads
from kv_align.align.head_map import HeadMap, Initializer, MapInit, MapShape
from kv_align.align.init.fixed import orthogonal as orthogonal_init
from kv_align.align.init.fixed import random, uniform
from kv_align.align.layer_map.fixed import proportional
from kv_align.align.orthogonal import OrthogonalMap
from kv_align.align.structured import StructuredMap, orthogonal
from kv_align.align.time_warp import SegmentWarp
from kv_align.config.targets import config_directory
from tests import readme
from tests.tiny import project

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
HIDDEN_LAYERS = {
    "mlp": {"mlp_ratio": 1.5},
    "linear": {"mlp_ratio": None},
    "matched": {"mlp_ratio": None, "match_parameters": "structured"},
}
Loop = Callable[[HeadMap, torch.Tensor, int], list[torch.Tensor]]


class Entry(NamedTuple):
    """An aligner in the battery.

    Attributes
    ----------
    kind, options
        Its map, and what that is called with.
    loop
        What it computes of one text and layer [H_t, T, D_t], as plainly as can be: student heads [T, D_s]. It is given the
        map, the states and the number of the layer. None: there is none.
    init
        The one that it must start from; None: any.
    """

    kind: type[HeadMap]
    options: dict[str, Any]
    loop: Loop | None = None
    init: Initializer | None = None

    @property
    def shares_layers(self) -> bool:
        """Whether all layers have one map."""
        return bool(self.options.get("share_layers"))


def place_of(head_map: HeadMap, layer: int) -> int:
    """Where a layer's parameters stand in those of one of the package's maps."""
    return 0 if len(next(head_map.parameters())) == 1 else layer


def stretched(head_map: HeadMap, place: int, heads: list[torch.Tensor]) -> list[torch.Tensor]:
    if head_map.elastic is None:
        return heads
    scale, shift = head_map.elastic.scale[place], head_map.elastic.shift[place]
    return [head * scale[number, 0, 0] + shift[number, 0] for number, head in enumerate(heads)]


def flat_loop(head_map: FlatMap, states: torch.Tensor, layer: int) -> list[torch.Tensor]:
    """Token by token, number by number."""
    place = place_of(head_map, layer)
    output_weight, output_bias = head_map.output_weight[place], head_map.output_bias[place]
    tokens = []
    for token in range(states.shape[1]):
        vector = torch.cat([states[head, token] for head in range(states.shape[0])])
        hidden = vector
        if head_map.hidden_weight is not None:
            rows = zip(head_map.hidden_weight[place], head_map.hidden_bias[place], strict=True)
            hidden = torch.stack([row @ vector + bias for row, bias in rows])
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        tokens.append(torch.stack([row @ hidden + bias for row, bias in zip(output_weight, output_bias, strict=True)]))
    number = head_map._student_heads
    width = len(output_bias) // number
    heads = [torch.stack([token[head * width :][:width] for token in tokens]) for head in range(number)]
    return stretched(head_map, place, heads)


def structured_loop(head_map: StructuredMap, states: torch.Tensor, layer: int) -> list[torch.Tensor]:
    """Student head by student head."""
    place = place_of(head_map, layer)
    heads, width = [], head_map.width[place]
    for student_head, weights in enumerate(head_map.mix[place]):
        mixed = sum(weight * teacher_head for weight, teacher_head in zip(weights, states, strict=True))
        heads.append(mixed @ (width if width.dim() == 2 else width[student_head]))
    return stretched(head_map, place, heads)


def orthogonal_loop(head_map: OrthogonalMap, states: torch.Tensor, layer: int) -> list[torch.Tensor]:
    """That of the structured map that it is; how its matrices come about is tested in `test_orthogonal`."""
    heads = structured_loop(head_map.inner, states, layer)
    return stretched(head_map, place_of(head_map, layer), heads)


def low_rank_loop(head_map: HeadMap, states: torch.Tensor, layer: int) -> list[torch.Tensor]:
    """Of the aligner that README shows."""
    vectors = torch.cat(list(states), dim=1)
    return list((vectors @ (head_map.down[layer] @ head_map.up[layer])).chunk(head_map._heads, dim=1))


FLAT = [
    Entry(FlatMap, {**hidden, "share_layers": share_layers, "elastic": elastic}, flat_loop)
    for hidden, share_layers, elastic in product(HIDDEN_LAYERS.values(), (False, True), (False, True))
]
STRUCTURED, ORTHOGONAL = (
    [
        Entry(
            kind,
            {"share_dim_proj": share_dim_proj, "share_layers": share_layers, "elastic": elastic},
            loop,
            init,
        )
        for share_dim_proj, share_layers, elastic in product((False, True), repeat=3)
    ]
    for kind, loop, init in ((StructuredMap, structured_loop, None), (OrthogonalMap, orthogonal_loop, orthogonal_init))
)
# Not in conf/; an aligner of conf/aligner is an entry of ARMS itself.
OTHERS = [Entry(readme.module("align.mine").LowRank, {"rank": 5}, low_rank_loop)]
ARMS = [*FLAT, *STRUCTURED, *ORTHOGONAL, *OTHERS]
NARROWER = MapShape(num_layers=3, teacher_heads=4, teacher_width=8, student_heads=2, student_width=6)
WIDER = MapShape(num_layers=3, teacher_heads=2, teacher_width=6, student_heads=5, student_width=10)
SQUARE = MapShape(num_layers=3, teacher_heads=4, teacher_width=8, student_heads=4, student_width=8)
SHAPES = [NARROWER, WIDER, SQUARE]


def arm_id(arm: Entry) -> str:
    hidden = [name for name, each in HIDDEN_LAYERS.items() if each.items() <= arm.options.items()][-1:]
    return "-".join([arm.kind.__name__, *hidden, *(name for name, on in arm.options.items() if on is True)])


every_arm = pytest.mark.parametrize("arm", ARMS, ids=arm_id)
own_arms = pytest.mark.parametrize("arm", [*FLAT, *STRUCTURED, *ORTHOGONAL], ids=arm_id)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=["narrower", "wider", "square"])


def make_map(kind: type[HeadMap], options: dict[str, Any], shape: MapShape, *, seed: int = 0, init=None) -> HeadMap:
    init = next((arm.init for arm in ARMS if arm.kind is kind), None) or init or uniform
    start = MapInit(init, map_generator(seed, "mix"), map_generator(seed, "width"), "key", {"key": shape})
    return kind(shape, start, **options)


def make_aligner(arm: Entry, *, seed: int = 0, layers: tuple[int, ...] = (0, 1, 1)) -> Aligner:
    """From 4 query, 2 key and 2 value heads of width 8, 8 and 10 to 6, 3 and 3 of width 6, 6 and 4."""
    shapes = {"key": (2, 8, 3, 6), "value": (2, 10, 3, 4), "query": (4, 8, 6, 6)}
    maps = [make_map(arm.kind, arm.options, MapShape(len(layers), *shape), seed=seed) for shape in shapes.values()]
    return Aligner(layers, SegmentWarp(smoothness=0.0, ratios={}), *maps)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher_states(tokens: int = 7, layers: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(
        draw(2, layers, heads, tokens, width, seed=seed) for seed, heads, width in ((1, 2, 8), (2, 2, 10), (3, 4, 8))
    )


def same_segments(tokens: int = 7) -> torch.Tensor:
    return torch.tensor([[1] * 3 + [2] * (tokens - 3), [1] * 2 + [2] * (tokens - 4) + [0] * 2])


@every_shape
@every_arm
def test_shapes_of_a_map(arm, shape):
    mapped = make_map(arm.kind, arm.options, shape)(draw(2, 3, shape.teacher_heads, 5, shape.teacher_width))
    assert mapped.shape == (2, 3, shape.student_heads, 5, shape.student_width)
    assert mapped.dtype == torch.float32
    # No head starts dead, and no two teacher inputs give the same output.
    assert (mapped.std(dim=(0, 3, 4)) > 0.05).all()


@every_arm
def test_shapes_of_an_aligner_and_queries_only_where_they_are_given(arm):
    aligner, (k, v, q) = make_aligner(arm), teacher_states()
    segments = same_segments()
    outputs = project(aligner, (k, v, q), segments, segments, True)
    assert [tuple(each.shape) for each in outputs] == [(2, 3, 3, 7, 6), (2, 3, 3, 7, 4), (2, 3, 6, 7, 6)]
    without = project(aligner, (k, v, None), segments, segments, True)
    assert without[2] is None
    assert torch.equal(without[0], outputs[0])
    assert torch.equal(without[1], outputs[1])
    aligner.query_map = None
    assert project(aligner, (k, v, q), segments, segments, True)[2] is None


@every_shape
@every_arm
def test_gradient_reaches_the_input_and_every_parameter_of_every_layer(arm, shape):
    head_map = make_map(arm.kind, arm.options, shape)
    states = draw(2, 3, shape.teacher_heads, 5, shape.teacher_width).requires_grad_()
    mapped = head_map(states)
    (mapped * draw(*mapped.shape, seed=1)).sum().backward()
    assert (states.grad.abs().amax(dim=-1) > 0).all()
    for name, parameter in head_map.named_parameters():
        reached = parameter.grad.abs() > 0
        assert reached.any(), name
        assert reached.flatten(1).any(dim=1).all() or len(parameter) != 3, name


@every_shape
@own_arms
def test_each_layer_has_parameters_of_its_own_unless_all_share_one(arm, shape):
    maps = 1 if arm.shares_layers else 3
    assert {len(parameter) for parameter in make_map(arm.kind, arm.options, shape).parameters()} == {maps}


@every_shape
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.loop is not None], ids=arm_id)
def test_a_map_is_its_plain_loop(arm, shape):
    head_map = make_map(arm.kind, arm.options, shape, init=random).double()
    with torch.no_grad():
        for parameter in head_map.parameters():  # away from the start, at which all heads' widths are equal
            parameter.add_(0.1 * draw(*parameter.shape, seed=5).double())
    states = draw(2, 3, shape.teacher_heads, 5, shape.teacher_width).double()
    mapped = head_map(states)
    for text, layer in product(range(2), range(3)):
        heads = arm.loop(head_map, states[text, layer], layer)
        torch.testing.assert_close(mapped[text, layer], torch.stack(heads), atol=1e-6, rtol=1e-6)


def test_every_aligner_of_the_package_is_in_the_battery():
    targets = {
        yaml.safe_load(file.read_text()).get("_target_", "") for file in (config_directory() / "aligner").glob("*.yaml")
    } - {""}
    assert targets == {f"{arm.kind.__module__}.{arm.kind.__name__}" for arm in ARMS if arm not in OTHERS}


def move_apart(module):
    """Maps may start alike; those that are no one map no longer are after a step."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(0.1 * draw(*parameter.shape, seed=number))


@every_arm
def test_an_aligner_is_selection_warp_and_maps_in_this_order(arm):
    aligner, (k, v, q) = make_aligner(arm, layers=(1, 0, 1)).double(), teacher_states(tokens=4)
    student, teacher = torch.tensor([[1, 1, 2]] * 2), torch.tensor([[1, 2, 2, 2]] * 2)
    # The question's one token serves both of the student's, the reasoning's one token is the middle of three.
    picks = [0, 0, 2]
    outputs = project(aligner, (k.double(), v.double(), q.double()), student, teacher, False)
    maps = (aligner.key_map, aligner.value_map, aligner.query_map)
    for states, head_map, output in zip((k, v, q), maps, outputs, strict=True):
        expected = head_map(states.double()[:, [1, 0, 1]][..., picks, :])
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)


@every_arm
def test_more_student_layers_than_teacher_layers(arm):
    layers = tuple(proportional(2, 5, seed=0))
    assert layers == (0, 0, 1, 1, 1)
    aligner, (k, v, q) = make_aligner(arm, layers=layers), teacher_states()
    move_apart(aligner)
    segments = same_segments()
    k_target, v_target, q_target = project(aligner, (k, v, q), segments, segments, True)
    assert (k_target.shape[1], v_target.shape[1], q_target.shape[1]) == (5, 5, 5)
    assert not torch.equal(k_target[:, 0], k_target[:, 2])
    # Two student layers with one teacher layer have maps of their own, unless all share one.
    assert torch.equal(k_target[:, 0], k_target[:, 1]) == arm.shares_layers
    (k_target.sum() + v_target.sum() + q_target.sum()).backward()
    reached = [parameter.grad.abs() > 0 for parameter in aligner.parameters()]
    assert all(each.flatten(1).any(dim=1).all() or len(each) not in (1, 5) for each in reached)
    assert all(each.any() for each in reached)


@every_arm
def test_bfloat16(arm):
    aligner, (k, v, q) = make_aligner(arm), teacher_states()
    segments = same_segments()
    expected = project(aligner, (k, v, q), segments, segments, True)
    rough = project(aligner, (k.bfloat16(), v.bfloat16(), q.bfloat16()), segments, segments, True)
    for ours, theirs in zip(rough, expected, strict=True):
        assert ours.dtype == torch.float32  # a teacher in bfloat16 beside an aligner in float32
        assert (ours - theirs).norm() / theirs.norm() < 0.01
    aligner = aligner.bfloat16()
    rougher = project(aligner, (k.bfloat16(), v.bfloat16(), q.bfloat16()), segments, segments, True)
    for ours, theirs in zip(rougher, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() / theirs.norm() < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = project(make_aligner(arm), (k.bfloat16(), v.bfloat16(), q.bfloat16()), segments, segments, True)
    for ours, theirs in zip(half, expected, strict=True):
        assert (ours.float() - theirs).norm() / theirs.norm() < 0.02


@every_arm
def test_saved_and_loaded_through_safetensors(arm, tmp_path):
    first, second = make_aligner(arm, seed=1), make_aligner(arm, seed=2)
    segments = same_segments()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * draw(*parameter.shape, seed=5))
    expected = project(first, teacher_states(), segments, segments, True)
    assert not torch.equal(project(second, teacher_states(), segments, segments, True)[0], expected[0])
    save_file(first.state_dict(), tmp_path / "aligner.safetensors")
    second.load_state_dict(load_file(tmp_path / "aligner.safetensors"))
    for ours, theirs in zip(project(second, teacher_states(), segments, segments, True), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("same_time", [True, False], ids=["same time", "warped"])
@every_arm
def test_what_stands_at_padding_does_not_change_valid_outputs(arm, same_time):
    aligner, states = make_aligner(arm), teacher_states()
    teacher = same_segments()
    student = teacher if same_time else torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 2, 2]])
    junk = [torch.where((teacher == 0)[:, None, None, :, None], 1e6, each) for each in states]
    for clean, dirty in zip(
        project(aligner, states, student, teacher, same_time),
        project(aligner, junk, student, teacher, same_time),
        strict=True,
    ):
        valid = (student != 0)[:, None, None, :, None].expand_as(clean)
        assert torch.equal(clean[valid], dirty[valid])


@every_arm
def test_a_text_does_not_depend_on_its_neighbours_in_the_batch(arm):
    aligner, states = make_aligner(arm).double(), [each.double() for each in teacher_states()]
    student, teacher = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 2, 2]]), same_segments()
    together = project(aligner, states, student, teacher, False)
    alone = project(aligner, (each[1:, ..., :5, :] for each in states), student[1:], teacher[1:, :5], False)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours[1:], theirs, atol=1e-12, rtol=1e-9)


@PROPERTY
@given(st.lists(st.integers(1, 5), min_size=3, max_size=6), st.integers(0, 2**16))
def test_flatten_and_unflatten_are_exact_inverses(shape, seed):
    states = draw(*shape, seed=seed)
    flat = flatten_heads(states)
    heads, width = shape[-3], shape[-1]
    assert flat.shape == (*shape[:-3], shape[-2], heads * width)
    assert torch.equal(unflatten_heads(flat, heads), states)
    assert torch.equal(flatten_heads(unflatten_heads(flat, heads)), flat)
    # Heads side by side: number d of head h stands at h D + d.
    assert torch.equal(flat[..., width * (heads - 1)], states[..., heads - 1, :, 0])


@every_shape
def test_width_maps_start_equal_in_every_structured_arm(shape):
    starts = {}
    for (_, options, *_), init in product(STRUCTURED, (uniform, random)):
        width = make_map(StructuredMap, options, shape, seed=7, init=init).width.detach()
        per_head = width if width.dim() == 4 else width[:, None].expand(-1, shape.student_heads, -1, -1)
        starts[init.__name__, *options.values()] = per_head
    assert len(starts) == 16
    first = starts["uniform", False, False, False]
    for (*_, _, share_layers, _), width in starts.items():
        assert torch.equal(width, first[:1] if share_layers else first)
    other = make_map(StructuredMap, STRUCTURED[0].options, shape, seed=8).width
    assert not torch.allclose(other, first, atol=0.01)
    # Each layer has its own.
    assert not torch.allclose(first[0], first[1], atol=0.01)


@pytest.mark.parametrize("init", [uniform, random])
@every_shape
def test_one_width_per_head_starts_as_one_for_all(shape, init):
    states = draw(2, 3, shape.teacher_heads, 5, shape.teacher_width)
    outputs = [
        make_map(
            StructuredMap,
            {"share_dim_proj": shared, "share_layers": False, "elastic": False},
            shape,
            init=init,
        ).double()(states.double())
        for shared in (True, False)
    ]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", [arm.options for arm in STRUCTURED])
def test_a_structured_map_between_equal_shapes_keeps_heads_and_their_geometry(options):
    head_map, states = make_map(StructuredMap, options, SQUARE).double(), draw(2, 3, 4, 5, 8).double()
    assert torch.equal(head_map.mix.detach(), torch.eye(4).double().expand_as(head_map.mix))
    mapped = head_map(states)
    # A rotation of each head's width: inner products within a head are those of the teacher.
    gram, expected = mapped @ mapped.transpose(-1, -2), states @ states.transpose(-1, -2)
    torch.testing.assert_close(gram, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        head_map.width.copy_(torch.eye(8).double().expand_as(head_map.width))
    assert torch.equal(head_map(states), states)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (8, 5), (5, 8), (1, 4)])
def test_orthogonal(rows, columns):
    matrix = orthogonal(rows, columns, torch.Generator().manual_seed(0)).double()
    assert matrix.shape == (rows, columns)
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(min(rows, columns)).double(), atol=1e-6, rtol=0)
    again = orthogonal(rows, columns, torch.Generator().manual_seed(0))
    assert torch.equal(again.double(), matrix)


def test_orthogonal_is_drawn_uniformly():
    # Without the signs of R, the first diagonal number would always have one sign (Mezzadri, 2007).
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([orthogonal(3, 3, generator) for _ in range(2000)])
    assert drawn.mean(dim=0).abs().max() < 0.05
    torch.testing.assert_close(drawn.square().mean(dim=0), torch.full((3, 3), 1 / 3), atol=0.03, rtol=0)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.options.get("elastic")], ids=arm_id)
def test_elastic_starts_as_the_identity_and_then_scales_and_shifts(arm):
    stiff, elastic = (make_map(arm.kind, arm.options | {"elastic": on}, NARROWER) for on in (False, True))
    states = draw(2, 3, 4, 5, 8)
    plain = stiff(states)
    assert torch.equal(elastic(states), plain)
    with torch.no_grad():
        elastic.elastic.scale[:, 1] = -2.0
        elastic.elastic.shift[:, 0] = torch.arange(6.0)
    changed = elastic(states)
    torch.testing.assert_close(changed[:, :, 1], -2 * plain[:, :, 1])
    torch.testing.assert_close(changed[:, :, 0], plain[:, :, 0] + torch.arange(6.0))


@every_arm
def test_share_layers_is_one_map_for_all(arm):
    head_map, states = make_map(arm.kind, arm.options, NARROWER, init=random), draw(2, 3, 4, 5, 8)
    move_apart(head_map)
    turned = head_map(states.flip(1)).flip(1)
    assert torch.allclose(turned, head_map(states), atol=1e-6) == arm.shares_layers


@pytest.mark.parametrize("maps", [1, 3], ids=["shared", "own"])
def test_parameters_by_hand(maps):
    shared = maps == 1
    linear = make_map(FlatMap, {"mlp_ratio": None, "share_layers": shared, "elastic": False}, NARROWER)
    assert count_parameters(linear) == maps * 12 * (32 + 1)
    flat = make_map(FlatMap, {"mlp_ratio": 4.0, "share_layers": shared, "elastic": False}, NARROWER)
    assert count_parameters(flat) == maps * (128 * (32 + 1) + 12 * (128 + 1))
    for share_dim_proj, widths in ((True, 1), (False, 2)):
        options = {"share_dim_proj": share_dim_proj, "share_layers": shared, "elastic": True}
        structured = make_map(StructuredMap, options, NARROWER)
        assert count_parameters(structured) == maps * (2 * 4 + widths * 8 * 6 + 2 + 2 * 6)


def test_parameters_of_a_real_pair():
    # Qwen2.5-7B to 1.5B: 28 layers each, 4 and 2 key/value heads of width 128.
    shape = MapShape(num_layers=28, teacher_heads=4, teacher_width=128, student_heads=2, student_width=128)
    counts = {
        (share_dim_proj, share_layers): 2
        * count_parameters(
            make_map(
                StructuredMap,
                {"share_dim_proj": share_dim_proj, "share_layers": share_layers, "elastic": False},
                shape,
            )
        )
        for share_dim_proj, share_layers in ((True, False), (False, False), (True, True))
    }
    assert counts == {(True, False): 917_952, (False, False): 1_835_456, (True, True): 32_784}


def test_the_mlp_starts_as_linear_does():
    # Kaiming uniform with a = sqrt(5): weights and biases within ±1/sqrt(fan in) (torch.nn.Linear).
    shape = MapShape(num_layers=2, teacher_heads=4, teacher_width=16, student_heads=4, student_width=16)
    flat = make_map(FlatMap, {"mlp_ratio": 4.0, "share_layers": False, "elastic": False}, shape)
    torch.manual_seed(0)
    first, second = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
    for ours, theirs, fan_in in (
        (flat.hidden_weight, first.weight, 64),
        (flat.hidden_bias, first.bias, 64),
        (flat.output_weight, second.weight, 256),
        (flat.output_bias, second.bias, 256),
    ):
        bound = 1 / math.sqrt(fan_in)
        for start in (ours.detach(), theirs.detach()):
            assert 0.9 * bound < start.abs().max().item() <= bound
            # Of a uniform distribution.
            assert start.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_the_hidden_layer_is_never_empty():
    shape = MapShape(num_layers=1, teacher_heads=1, teacher_width=2, student_heads=1, student_width=2)
    tiny = make_map(FlatMap, {"mlp_ratio": 0.1, "share_layers": False, "elastic": False}, shape)
    assert tiny.hidden_weight.shape == (1, 1, 2)
