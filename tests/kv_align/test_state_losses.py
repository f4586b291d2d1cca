"""Losses that compare the teacher's own states, without an aligner: relations and hidden states, against plain loops."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from kv_align.config.compose import compose_config
from kv_align.losses.base import Pairing
from kv_align.losses.comparison import Comparison, HiddenComparison, SourceComparison
from kv_align.losses.functional import Masked
from kv_align.losses.hidden import Hidden
from kv_align.losses.predictions.linear_head import Predictions
from kv_align.losses.relations import Relations
from kv_align.models.capture.prepare import Geometry
from kv_align.models.capture.states import States
from kv_align.runs.errors import ConfigError
from tests.kv_align.test_distill import BATCH, make_rig, make_student

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
TEACHER, STUDENT = Geometry(5, 6, 2, 8, 4), Geometry(3, 4, 2, 6, 6)
VARIANCE = torch.tensor([0.5, 2.0, 4.0])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairing(**changes: object) -> Pairing:
    given = Pairing(TEACHER, STUDENT, 7, 5, lambda: VARIANCE, torch.Generator().manual_seed(3), 9)
    return replace(given, **changes)


def states_of(shape: Geometry, seed: int, layers: int = 3, tokens: int = 5) -> States:
    return States(
        draw(2, layers, shape.num_key_value_heads, tokens, shape.key_width, seed=seed).requires_grad_(),
        draw(2, layers, shape.num_key_value_heads, tokens, shape.value_width, seed=seed + 1).requires_grad_(),
        draw(2, layers, shape.num_query_heads, tokens, shape.key_width, seed=seed + 2).requires_grad_(),
    )


def comparison(part: object, mask: Tensor = MASK) -> Comparison:
    return Comparison(Predictions(draw(10, 9)), mask, (part,))


# Relations


def relation_loop(student: Tensor, teacher: Tensor, mask: Tensor, layers: list[int], heads: int) -> Tensor:
    """Token by token: two softmaxes over the tokens up to it, and their divergence."""
    total = torch.zeros((), dtype=torch.float64)
    for text, layer, head, token in product(range(2), layers, range(heads), range(mask.shape[1])):
        if not mask[text, token]:
            continue
        rows = []
        for states in (student, teacher):
            side_by_side = torch.cat(list(states[text, layer].double()), dim=-1)
            width = side_by_side.shape[-1] // heads
            own = side_by_side[:, head * width : (head + 1) * width]
            seen = [other for other in range(token + 1) if mask[text, other]]
            powers = torch.stack([(own[token] @ own[other] / math.sqrt(width)).exp() for other in seen])
            rows.append(powers / powers.sum())
        total = total + (rows[1] * (rows[1] / rows[0]).log()).sum() / (len(layers) * heads)
    return total


@pytest.mark.parametrize("mask", [MASK, MASK.flip(1)], ids=["right", "left"])
@pytest.mark.parametrize(("layers", "compared"), [(None, [2]), ([0, 2], [0, 2]), ([1], [1])])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_and_their_gradient_are_those_of_a_plain_loop(heads, layers, compared, mask):
    loss = Relations(pairing(), lambda_relations=0.5, relation_heads=heads, layers=layers)
    student, teacher = states_of(STUDENT, 1), states_of(TEACHER, 11)
    parts = loss.components(comparison(SourceComparison(student, teacher), mask))
    assert list(parts) == ["query_relation_loss", "key_relation_loss", "value_relation_loss"]
    for part, ours, theirs in zip(
        parts.values(), (student.q, student.k, student.v), (teacher.q, teacher.k, teacher.v), strict=True
    ):
        expected = relation_loop(ours, theirs, mask, compared, heads)
        assert expected.item() > 0.02
        assert part.total.item() == pytest.approx(expected.item(), rel=1e-4)
        assert part.tokens.item() == mask.sum()
        (found,) = torch.autograd.grad(part.total, [ours], retain_graph=True)
        (by_loop,) = torch.autograd.grad(expected, [ours])
        torch.testing.assert_close(found, by_loop, atol=1e-5, rtol=1e-3)
        assert (found[:, [layer for layer in range(3) if layer not in compared]] == 0).all()
    means = {name: part.total / 6 for name, part in parts.items()}
    assert loss.terms(means)["relation_loss"].item() == pytest.approx(sum(mean.item() for mean in means.values()))
    assert loss.weights(0, 10) == loss.weights(9, 10) == {"relation_loss": 0.5}


def test_relations_by_hand():
    # One head, one layer, two tokens of width 4: dot products over 2.
    shape = Geometry(1, 1, 1, 4, 4)
    loss = Relations(pairing(teacher=shape, student=shape), lambda_relations=1.0, relation_heads=1, layers=None)
    ours = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0]])[None, None, None]  # token 1: dots 0 and 4
    theirs = torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0]])[None, None, None]  # token 1: dots 2 and 4
    states = [States(each, each, each) for each in (ours, theirs)]
    whole = torch.ones(1, 2, dtype=torch.bool)
    given = Comparison(Predictions(draw(2, 3)), whole, (SourceComparison(*states),))
    student, teacher = (torch.tensor(each).softmax(0) for each in ([0.0, 2.0], [1.0, 2.0]))
    # Token 0 is related to itself alone: nothing to differ in.
    expected = (teacher * (teacher / student).log()).sum().item()
    for part in loss.components(given).values():
        assert part.total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("junk", [1e4, math.inf, math.nan])
def test_what_stands_at_padding_changes_no_relation(junk):
    loss = Relations(pairing(), lambda_relations=0.5, relation_heads=2, layers=[0, 1, 2])
    unused = ~MASK[:, None, None, :, None]

    def total(spoil: bool) -> tuple[float, list[Tensor]]:
        both = (states_of(STUDENT, 1), states_of(TEACHER, 11))
        leaves = [
            [
                torch.where(unused, junk, each.detach()).requires_grad_() if spoil else each
                for each in vars(states).values()
            ]
            for states in both
        ]
        parts = loss.components(comparison(SourceComparison(States(*leaves[0]), States(*leaves[1]))))
        sum_of_parts = sum(part.total for part in parts.values())
        return sum_of_parts.item(), torch.autograd.grad(sum_of_parts, leaves[0])

    (clean, clean_gradients), (dirty, dirty_gradients) = total(False), total(True)
    assert clean == dirty
    for ours, theirs in zip(clean_gradients, dirty_gradients, strict=True):
        assert torch.equal(ours, theirs)
        assert (theirs[unused.expand_as(theirs)] == 0).all()


def test_relations_are_blind_to_a_rotation_within_relation_heads_and_see_scale():
    loss = Relations(pairing(teacher=STUDENT), lambda_relations=0.5, relation_heads=2, layers=[0, 1, 2])
    student = states_of(STUDENT, 1)
    turn = torch.linalg.qr(draw(6, 6)).Q  # keys: 2 heads of 6 are 2 relation heads
    turned = States(student.k @ turn, student.v @ turn, student.q)
    parts = loss.components(comparison(SourceComparison(student, turned)))
    assert [part.total.item() for part in parts.values()] == pytest.approx([0, 0, 0], abs=1e-5)
    scaled = States(student.k * 2, student.v * 2, student.q * 2)
    parts = loss.components(comparison(SourceComparison(student, scaled)))
    assert min(part.total.item() for part in parts.values()) > 0.1


def test_a_teacher_that_is_the_student_leaves_no_relation_to_learn():
    rig = make_rig("relations", teacher=make_student().requires_grad_(False), student=make_student())
    assert rig.step(BATCH).losses["relation_loss"].item() == pytest.approx(0.0, abs=1e-5)
    other = make_rig("relations", teacher=make_student(seed=13).requires_grad_(False), student=make_student())
    assert other.step(BATCH).losses["relation_loss"].item() > 0.1


def test_heads_that_cannot_be_cut_alike_are_refused():
    # Queries 48 and 24, keys 16 and 12, values 8 and 12.
    with pytest.raises(ValueError, match=r"^loss\.relation_heads=8 is not allowed") as refused:
        Relations(pairing(), lambda_relations=0.5, relation_heads=8, layers=None)
    assert str(refused.value) == (
        "loss.relation_heads=8 is not allowed: it must divide 4, the greatest common divisor of both models' queries, keys "
        "and values; choose another number"
    )


# Hidden states


def hidden_states(seed: int = 5) -> tuple[Tensor, Tensor]:
    return draw(2, 3, 5, 5, seed=seed).requires_grad_(), draw(2, 3, 5, 7, seed=seed + 1).requires_grad_()


@pytest.mark.parametrize("mask", [MASK, MASK.flip(1)], ids=["right", "left"])
@pytest.mark.parametrize(("layers", "compared"), [(None, [0, 1, 2]), ([2, 0], [2, 0])])
def test_hidden_states_and_their_gradients_are_those_of_a_plain_loop(layers, compared, mask):
    loss = Hidden(pairing(), lambda_hidden=0.3, layers=layers)
    student, teacher = hidden_states()
    given = comparison(HiddenComparison(student, teacher), mask)
    (part,) = loss.components(given).values()
    weight, bias = loss.projection.weight, loss.projection.bias
    expected = torch.zeros(())
    for place, layer in enumerate(compared):
        for text, token in product(range(2), range(5)):
            if mask[text, token] and mask[text, :token].any():  # but the first
                projected = torch.stack(
                    [student[text, layer, token] @ weight[place, :, out] + bias[place, out] for out in range(7)]
                )
                error = (projected - teacher[text, layer, token]).square().sum() / 7
                expected = expected + error / VARIANCE[layer] / len(compared)
    assert part.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert part.tokens.item() == mask.sum()
    leaves = [student, teacher, weight, bias]
    for ours, theirs in zip(
        torch.autograd.grad(part.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert loss.terms({"hidden_loss": part.total}) == {"hidden_loss": part.total}
    assert loss.weights(0, 10) == loss.weights(9, 10) == {"hidden_loss": 0.3}


@pytest.mark.parametrize("junk", [1e4, math.inf, math.nan])
def test_what_stands_at_padding_changes_no_hidden_loss(junk):
    found = []
    for spoil in (False, True):
        loss = Hidden(pairing(generator=torch.Generator().manual_seed(3)), lambda_hidden=1.0, layers=None)
        student, teacher = hidden_states()
        if spoil:
            unused = ~MASK[:, None, :, None]
            student, teacher = (torch.where(unused, junk, each.detach()) for each in (student, teacher))
        part = loss.components(comparison(HiddenComparison(student, teacher)))["hidden_loss"]
        found.append(part.total.item())
    assert found[0] == found[1]


def test_a_projection_that_gives_the_mean_has_a_loss_of_one():
    teacher = draw(2, 3, 5, 7, seed=6)
    everything = torch.ones(2, 5, dtype=torch.bool)
    variance = teacher[:, :, 1:].var(dim=(0, 2), unbiased=False).mean(dim=1)
    loss = Hidden(pairing(hidden_variance=lambda: variance), lambda_hidden=1.0, layers=None)
    with torch.no_grad():
        loss.projection.weight.zero_()
        loss.projection.bias.copy_(teacher[:, :, 1:].mean(dim=(0, 2)))
    part = loss.components(comparison(HiddenComparison(draw(2, 3, 5, 5), teacher), everything))["hidden_loss"]
    assert (part.total / 8).item() == pytest.approx(1.0, rel=1e-5)  # of ten tokens, two are first ones


def test_a_teachers_massive_first_token_changes_neither_loss_nor_gradient():
    found = []
    for size in (1.0, 1000.0):
        loss = Hidden(pairing(generator=torch.Generator().manual_seed(3)), lambda_hidden=1.0, layers=None)
        student, teacher = hidden_states()
        teacher = torch.cat((size * teacher[:, :, :1], teacher[:, :, 1:]), dim=2)
        part = loss.components(comparison(HiddenComparison(student, teacher)))["hidden_loss"]
        found.append((part.total, *torch.autograd.grad(part.total, [student, loss.projection.weight])))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_teacher_that_is_the_student_leaves_nothing_under_the_identity():
    rig = make_rig("hidden", teacher=make_student().requires_grad_(False), student=make_student())
    projection = torch.nn.Module()
    projection.weight = torch.nn.Parameter(torch.eye(32).expand(3, -1, -1).clone())
    projection.bias = torch.nn.Parameter(torch.zeros(3, 32))
    own = rig.distiller.projection
    own.weight, own.bias = projection.weight, projection.bias
    assert rig.step(BATCH).losses["hidden_loss"].item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        own.weight.mul_(0.5)
    assert rig.step(BATCH).losses["hidden_loss"].item() > 0.01


def test_what_is_compared_are_the_librarys_hidden_states_above_each_layer():
    rig = make_rig("hidden")
    tokens = BATCH.student
    inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "position_ids": tokens.positions}
    with torch.no_grad():
        ours = rig.distiller.student(**inputs, output_hidden_states=True).hidden_states
        theirs = rig.teacher.model(**inputs, output_hidden_states=True).hidden_states
        compared = rig.step(BATCH).comparison.of(HiddenComparison)
    assert rig.layers == [1, 2, 3]
    for layer in range(3):
        assert torch.equal(compared.student[:, layer], ours[layer + 1])
        torch.testing.assert_close(compared.teacher[:, layer], theirs[rig.layers[layer] + 1], atol=1e-5, rtol=1e-5)


def test_the_projection_starts_as_linear_does_and_is_drawn_from_its_generator():
    first, again, other = (
        Hidden(pairing(generator=torch.Generator().manual_seed(seed)), lambda_hidden=1.0, layers=None).projection
        for seed in (1, 1, 2)
    )
    assert first.weight.shape == (3, 5, 7)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert 0.9 / math.sqrt(5) < first.weight.abs().max() <= 1 / math.sqrt(5)


@pytest.mark.parametrize("kind", ["relations", "hidden"])
def test_the_student_learns_from_it_and_the_teacher_is_fixed(kind):
    rig = make_rig(kind)
    result = rig.step(BATCH)
    weights = rig.distiller.student.model.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(result.alignment, [weights])
    assert gradient.abs().max() > 0
    assert isinstance(next(iter(rig.distiller.loss.components(result.comparison).values())), Masked)
    assert rig.distiller.compares_states
    assert (rig.distiller.trainable_projection is None) == (kind == "relations")


# Configuration


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["loss=relations", "loss.layers=[3]"],
            "loss.layers=[3] is not allowed: set loss.layers to student layers, which are 0 to 2.",
        ),
        (
            ["loss=hidden", "loss.layers=[0,7]"],
            "loss.layers=[0, 7] is not allowed: set loss.layers to student layers, which are 0 to 2.",
        ),
        (
            ["loss=relations", "loss.relation_heads=0"],
            "loss.relation_heads=0 is not allowed: set loss.relation_heads to a number above 0.",
        ),
        (
            ["loss=hidden", "trainer.aligner_lr=null"],
            "trainer.aligner_lr=null is not allowed: set trainer.aligner_lr to a number above 0 with loss=hidden, which "
            "learns a projection.",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(overrides, says):
    with pytest.raises(ConfigError) as refused:
        compose_config(["aligner=none", *overrides])
    assert str(refused.value) == says


def test_layers_beyond_a_student_from_the_hub_are_refused_when_it_is_loaded():
    with pytest.raises(ValueError, match=r"loss.layers=\[3\] names layer 3 and the student's are 0 to 2"):
        Hidden(pairing(), lambda_hidden=1.0, layers=[3])


@pytest.mark.parametrize(
    ("loss", "kept"),
    [("relations", {"layer_map", "time_warp", "keys"}), ("hidden", {"layer_map", "time_warp"})],
)
def test_what_has_no_effect_on_them_is_taken_out(loss, kept):
    config, notes = compose_config([f"loss={loss}"])
    groups = ("layer_map", "time_warp", "keys", "align", "init")
    assert {group for group in groups if getattr(config, group) is not None} == kept
    assert config.aligner.model_dump() == {"name": "none", "target": ""}
    assert notes == [f"aligner=structured has no effect on loss={loss}, which needs no aligner: left out."]
    assert (config.trainer.aligner_lr is None) == (loss == "relations")
    assert compose_config([f"experiment={loss}"])[0].model_copy(update={"arm": None}) == config
    assert compose_config([f"loss={loss}", "data.shuffle_teacher=true"])[0].data.shuffle_teacher
