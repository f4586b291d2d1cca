"""Layer maps that look at states or learn: the learned mixture through the aligner battery, and planted layers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_align.align.aligner import Aligner
from kv_align.align.layer_map.cka import cka
from kv_align.align.layer_map.fixed import proportional
from kv_align.align.layer_map.learned import Mixture, learned
from kv_align.align.layer_time_map import LayerMixture, LayerTimeMap
from kv_align.align.time_warp import SegmentWarp
from kv_align.config.compose import compose_config
from kv_align.data.correspondence import Correspondence
from kv_align.experiment.choices import choose_layers
from kv_align.models.capture.prepare import Geometry
from kv_align.runs.errors import ConfigError
from tests.kv_align.test_align_battery import ARMS, arm_id, draw, make_aligner, same_segments, teacher_states
from tests.tiny import project

quick = settings(deadline=None, max_examples=150, derandomize=True, database=None)
START = Mixture([1, 0, 1], [[0.0, 0.1], [0.3, 0.0], [0.0, 0.2]], 0.5)
SOME = [arm for arm in ARMS if not arm.options.get("elastic") and arm.options.get("mlp_ratio") != 1.5]
some_arms = pytest.mark.parametrize("arm", SOME, ids=arm_id)


def mixing(arm, *, start: Mixture = START, seed: int = 0) -> Aligner:
    """The battery's aligner, with a learned mixture of its two teacher layers."""
    plain = make_aligner(arm, seed=seed)
    warp = SegmentWarp(smoothness=0.0, ratios={})
    return Aligner(LayerMixture(start), warp, plain.key_map, plain.value_map, plain.query_map)


# The learned mixture


@some_arms
def test_at_a_one_hot_start_a_learned_map_is_a_list(arm):
    one_hot = Mixture([1, 0, 1], [[0.0, 1e4], [1e4, 0.0], [0.0, 1e4]], 1.0)
    learned_one, listed = mixing(arm, start=one_hot), make_aligner(arm, layers=(1, 0, 1))
    segments = same_segments()
    states = teacher_states()
    for ours, theirs in zip(
        project(learned_one, states, segments, segments, True),
        project(listed, states, segments, segments, True),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@some_arms
def test_a_mixture_is_its_plain_loop_before_warp_and_maps(arm):
    aligner, (k, v, q) = mixing(arm).double(), [each.double() for each in teacher_states(tokens=4)]
    student, teacher = torch.tensor([[1, 1, 2]] * 2), torch.tensor([[1, 2, 2, 2]] * 2)
    weights = []
    for row in START.logits:
        powers = [math.exp(number / 0.5) for number in row]
        weights.append([power / sum(powers) for power in powers])
    maps = (aligner.key_map, aligner.value_map, aligner.query_map)
    for states, head_map, output in zip(
        (k, v, q), maps, project(aligner, (k, v, q), student, teacher, False), strict=True
    ):
        mixed = torch.stack([a * states[:, 0] + b * states[:, 1] for a, b in weights], dim=1)
        torch.testing.assert_close(output, head_map(mixed[..., [0, 0, 2], :]), atol=1e-6, rtol=1e-6)


@some_arms
def test_gradient_reaches_every_weight_of_every_student_layer(arm):
    aligner = mixing(arm)
    k, v, q = (each.requires_grad_() for each in teacher_states())
    segments = same_segments()
    sum(
        (each * draw(*each.shape, seed=4)).sum() for each in project(aligner, (k, v, q), segments, segments, True)
    ).backward()
    assert (aligner.placement.mixture.logits.grad != 0).all()
    assert all((each.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all() for each in (k, v, q))
    # A softmax does not change by a constant.
    torch.testing.assert_close(aligner.placement.mixture.logits.grad.sum(dim=1), torch.zeros(3), atol=1e-4, rtol=0)


@some_arms
def test_padding_neighbours_precision_and_saving_with_a_mixture(arm):
    aligner, states = mixing(arm), teacher_states()
    teacher = same_segments()
    student = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 2, 2]])
    valid = (student != 0)[:, None, None, :, None]
    junk = [torch.where((teacher == 0)[:, None, None, :, None], 1e6, each) for each in states]
    clean, dirty = (project(aligner, each, student, teacher, False) for each in (states, junk))
    alone = project(aligner, (each[1:, ..., :5, :] for each in states), student[1:], teacher[1:, :5], False)
    other = mixing(arm, seed=2, start=Mixture([0, 0, 0], [[0.0, 0.0]] * 3, 0.5))
    assert not torch.equal(project(other, states, student, teacher, False)[0], clean[0])
    assert "placement.mixture.logits" in aligner.state_dict()
    other.load_state_dict(aligner.state_dict())
    loaded = project(other, states, student, teacher, False)
    rough = project(aligner.bfloat16(), (each.bfloat16() for each in states), student, teacher, False)
    for ours, theirs, single, same, half in zip(clean, dirty, alone, loaded, rough, strict=True):
        assert torch.equal(ours[valid.expand_as(ours)], theirs[valid.expand_as(ours)])
        torch.testing.assert_close(ours[1:], single, atol=1e-5, rtol=1e-5)
        assert torch.equal(same, ours)
        assert half.dtype == torch.bfloat16
        difference = (half.float() - ours)[valid.expand_as(ours)]
        assert difference.norm() < 0.03 * ours[valid.expand_as(ours)].norm()


def test_a_map_that_selects_adds_nothing_to_an_aligners_state():
    assert not any("placement" in name for name in make_aligner(ARMS[0]).state_dict())


def test_a_teacher_in_bfloat16_is_mixed_in_float32():
    mixing = LayerTimeMap(LayerMixture(START), SegmentWarp(smoothness=0.0, ratios={}))
    states, segments = teacher_states()[0].bfloat16(), same_segments()
    correspondence = Correspondence(segments, segments, same_time=True)
    placed = mixing({"k": states}, correspondence, torch.float32)["k"]
    assert placed.dtype == torch.float32
    expected = mixing({"k": states.float()}, correspondence)["k"]
    assert torch.equal(placed, expected)


@pytest.mark.parametrize(("teacher", "student"), [(6, 3), (2, 5), (28, 24)])
@pytest.mark.parametrize("start_weight", [0.5, 0.1, 0.99])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_a_learned_map_starts_with_the_weight_that_was_given(teacher, student, start_weight, temperature):
    start = learned(teacher, student, 0, start_weight=start_weight, temperature=temperature)
    assert start.layers == proportional(teacher, student, 0)
    weights = LayerMixture(start).weights()
    assert weights.shape == (student, teacher)
    for layer, row in zip(start.layers, weights.tolist(), strict=True):
        assert row[layer] == pytest.approx(start_weight, rel=1e-4)
        rest = [weight for number, weight in enumerate(row) if number != layer]
        assert rest == pytest.approx([(1 - start_weight) / (teacher - 1)] * (teacher - 1), rel=1e-4)


def test_a_learned_map_reads_every_layer_and_names_the_proportional_ones():
    shapes = Geometry(6, 8, 4, 24, 24), Geometry(3, 4, 2, 16, 16)
    layers = choose_layers(compose_config(["layer_map=learned"])[0], *shapes)
    assert (layers.of_student, layers.read) == ([1, 3, 5], [0, 1, 2, 3, 4, 5])
    assert isinstance(layers.placed(), LayerMixture)
    listed = choose_layers(compose_config(["layer_map=list", "layer_map.layers=[4,0,4]"])[0], *shapes)
    assert (listed.of_student, listed.read, listed.placed()) == ([4, 0, 4], [0, 4], [1, 0, 1])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["layer_map.start_weight=1.0"],
            "layer_map=learned is not allowed: layer_map.start_weight=1.0 leaves nothing to learn; use a number between 0 "
            "and 1, such as 0.5.",
        ),
        (
            ["layer_map.start_weight=1.5"],
            "layer_map.start_weight=1.5 is not allowed: set layer_map.start_weight to a number of at most 1.",
        ),
        (
            ["align.fit=frozen"],
            "layer_map=learned is not allowed with align.fit=frozen: it is trained with the aligner; use "
            "layer_map=proportional.",
        ),
        (
            ["loss=relations", "aligner=none"],
            "layer_map=learned is not allowed with loss=relations, which has no aligner: it is trained with the aligner; "
            "use layer_map=proportional.",
        ),
    ],
)
def test_a_learned_map_with_nothing_to_learn_is_refused(overrides, says):
    with pytest.raises(ConfigError) as refused:
        compose_config(["layer_map=learned", *overrides])
    assert str(refused.value) == says


def test_a_single_teacher_layer_cannot_be_mixed():
    with pytest.raises(ValueError, match="the teacher has a single layer, so there is nothing to mix; use "):
        learned(1, 3, 0, start_weight=0.5, temperature=1.0)


# CKA


@pytest.mark.parametrize(
    ("similarity", "monotone", "expected"),
    [
        ([[0.9, 0.1, 0.2], [0.1, 0.2, 0.8]], True, [0, 2]),
        # The best of each would cross: 2 then 0 sums to 1.7; in order, 1 then 1 to 1.3 is the most.
        ([[0.1, 0.6, 0.9], [0.8, 0.7, 0.1]], False, [2, 0]),
        ([[0.1, 0.6, 0.9], [0.8, 0.7, 0.1]], True, [1, 1]),
        ([[0.5, 0.5, 0.5]], True, [0]),
        ([[0.3, 0.9], [0.3, 0.9], [0.2, 0.9]], True, [1, 1, 1]),
    ],
)
def test_a_cka_map_by_hand(similarity, monotone, expected):
    assert cka(len(similarity[0]), len(similarity), 0, similarity, monotone=monotone) == expected


@quick
@given(st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_monotone_cka_map_is_the_best_of_all_that_keep_the_order(teacher, student, source):
    similarity = [[source.random() for _ in range(teacher)] for _ in range(student)]
    found = cka(teacher, student, 0, similarity, monotone=True)

    def total(layers) -> float:
        return sum(row[layer] for row, layer in zip(similarity, layers, strict=True))

    ordered = [each for each in itertools.product(range(teacher), repeat=student) if list(each) == sorted(each)]
    assert found == sorted(found)
    assert total(found) == pytest.approx(max(total(each) for each in ordered))
    free = cka(teacher, student, 0, similarity, monotone=False)
    assert total(free) == pytest.approx(sum(max(row) for row in similarity))


def test_a_layer_map_that_asks_for_similarity_is_given_it():
    config, notes = compose_config(["layer_map=cka"])
    asked = []

    def similarity() -> list[list[float]]:
        asked.append(1)
        return [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.0, 0.0]]

    shapes = Geometry(6, 8, 4, 24, 24), Geometry(3, 4, 2, 16, 16)
    assert choose_layers(config, *shapes, similarity).of_student == [1, 3, 3]
    assert asked == [1]
    choose_layers(compose_config([])[0], *shapes, similarity)
    assert asked == [1]
    assert notes == [
        "layer_map=cka is fitted to the states of a student that has learned nothing, so to noise; use "
        "model.student_start=pretrained."
    ]
    assert compose_config(["layer_map=cka", "model.student_start=pretrained"])[1] == []
