"""`aligner=orthogonal`: what stays orthonormal, what that keeps of the teacher, and that it starts as the init says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kv_align.align.aligner import count_parameters, map_generator
from kv_align.align.head_map import HeadInit, Initializer, MapInit, MapShape
from kv_align.align.init.fixed import identity, orthogonal, random, uniform
from kv_align.align.orthogonal import OrthogonalMap
from kv_align.align.structured import StructuredMap
from kv_align.config.compose import compose_config
from kv_align.config.config import TrainerConfig
from kv_align.runs.errors import ConfigError
from kv_align.training.optimizer import make_optimizer

LAYERS = 3
SHAPES = {
    "fewer and narrower": MapShape(LAYERS, teacher_heads=4, teacher_width=8, student_heads=2, student_width=6),
    "more and wider": MapShape(LAYERS, teacher_heads=2, teacher_width=6, student_heads=5, student_width=10),
    "more and narrower": MapShape(LAYERS, teacher_heads=2, teacher_width=8, student_heads=3, student_width=5),
    "fewer and wider": MapShape(LAYERS, teacher_heads=4, teacher_width=4, student_heads=3, student_width=7),
    "equal": MapShape(LAYERS, teacher_heads=4, teacher_width=8, student_heads=4, student_width=8),
    "one head": MapShape(LAYERS, teacher_heads=1, teacher_width=4, student_heads=1, student_width=4),
}
OPTIONS = {
    "shared width": {"share_dim_proj": True, "share_layers": False, "elastic": False},
    "own widths": {"share_dim_proj": False, "share_layers": False, "elastic": False},
    "shared layers": {"share_dim_proj": True, "share_layers": True, "elastic": False},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(
    shape: MapShape,
    options: dict[str, Any] = OPTIONS["shared width"],
    kind: type = OrthogonalMap,
    init: Initializer = orthogonal,
    seed: int = 0,
) -> Any:
    start = MapInit(init, map_generator(seed, "mix"), map_generator(seed, "width"), "key", {"key": shape})
    return kind(shape, start, **options)


def defect(matrices: Tensor) -> float:
    """How far the shorter of rows and columns are from orthonormal."""
    tall = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    return (tall.mT @ tall - torch.eye(tall.shape[-1]).to(tall)).abs().max().item()


def chase(head_map: OrthogonalMap, states: Tensor, target: Tensor, steps: int = 30) -> list[float]:
    """Adam at a rate that turns the map far, towards a target a tenth as long as the teacher's states."""
    optimizer, losses = torch.optim.Adam(head_map.parameters(), lr=0.05), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (head_map(states) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def start_and_end(shape: MapShape, options: dict[str, Any], dtype: torch.dtype) -> tuple[OrthogonalMap, Tensor, Tensor]:
    """A map that has learned for a while, teacher states, and its mix at the start."""
    head_map, states = make(shape, options).to(dtype), draw(2, LAYERS, shape.teacher_heads, 5, shape.teacher_width)
    if dtype == torch.float64:  # drawn in single precision: made orthonormal in double
        for name in ("mix", "width"):
            tall = getattr(head_map.inner, name)
            setattr(
                head_map.inner,
                name,
                torch.linalg.qr(tall)[0] if tall.shape[-2] >= tall.shape[-1] else torch.linalg.qr(tall.mT)[0].mT,
            )
    before = head_map.inner.width.detach().clone()
    target = 0.1 * draw(2, LAYERS, shape.student_heads, 5, shape.student_width, seed=1).to(dtype)
    chase(head_map, states.to(dtype), target)
    return head_map, states.to(dtype), before


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@every_option
@every_shape
def test_mix_and_width_stay_orthonormal_while_they_learn(shape, options, dtype, tolerance):
    fresh = make(shape, options)
    assert max(defect(fresh.inner.mix), defect(fresh.inner.width)) < 1e-5
    head_map, _, width_before = start_and_end(shape, options, dtype)
    assert defect(head_map.inner.mix) < tolerance
    assert defect(head_map.inner.width) < tolerance
    assert (head_map.inner.width - width_before).abs().max() > 0.1  # and it did learn


@every_option
@every_shape
def test_it_starts_as_the_structured_map_to_the_bit_and_draws_from_no_global_state(shape, options):
    state = torch.get_rng_state()
    head_map = make(shape, options)
    assert torch.equal(torch.get_rng_state(), state)
    same, again = make(shape, options, kind=StructuredMap), make(shape, options)
    states = draw(2, LAYERS, shape.teacher_heads, 5, shape.teacher_width)
    assert torch.equal(head_map.inner.mix, same.mix)
    assert torch.equal(head_map.inner.width, same.width)
    assert torch.equal(head_map(states), same(states))
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(head_map.state_dict().values(), again.state_dict().values(), strict=True)
    )


@every_shape
def test_the_teachers_geometry_survives_as_far_as_the_shapes_allow(shape):
    head_map, states, _ = start_and_end(shape, OPTIONS["shared width"], torch.float64)
    mapped = head_map(states)
    # Inner products of whole tokens, all heads together.
    theirs, ours = (torch.einsum("blhtd,blhsd->blts", each, each) for each in (states, mapped))
    if shape.student_heads >= shape.teacher_heads and shape.student_width >= shape.teacher_width:
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    else:
        # A projection: what is lost is a Gram matrix itself, so no token, and no difference of two, becomes longer.
        assert torch.linalg.eigvalsh(theirs - ours).min() > -1e-9
        assert (ours.diagonal(dim1=-2, dim2=-1) < theirs.diagonal(dim1=-2, dim2=-1)).all()
        # A projection of states without a preferred direction keeps the share of dimensions that it has room for.
        room = min(1, shape.student_heads / shape.teacher_heads) * min(1, shape.student_width / shape.teacher_width)
        share = mapped.square().sum() / states.square().sum()
        assert 0.5 * room < share < min(1.0, 2.0 * room)


def test_it_cannot_shrink_its_target_where_the_structured_map_does():
    shape = SHAPES["equal"]
    states, nothing = draw(2, LAYERS, 4, 5, 8), torch.zeros(2, LAYERS, 4, 5, 8)
    kept = chase(make(shape), states, nothing)
    shrunk = chase(make(shape, kind=StructuredMap), states, nothing)
    assert kept[-1] == pytest.approx(kept[0], rel=1e-5)
    assert shrunk[-1] < 0.1 * shrunk[0]


def test_it_finds_a_rotation_that_it_is_shown():
    shape = SHAPES["equal"]
    shown, head_map, states = make(shape, seed=4), make(shape), draw(2, LAYERS, 4, 50, 8)
    for name in ("mix", "width"):  # of the same orientation, since rotations do not mirror, and not far
        start = getattr(head_map.inner, name).detach()
        turn = torch.linalg.matrix_exp(0.3 * (lambda a: a - a.mT)(draw(*start.shape, seed=3)))
        setattr(shown.inner, name, start @ turn)
    losses = chase(head_map, states, shown(states).detach(), steps=300)
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("init", [uniform, random])
def test_an_init_that_is_not_orthonormal_is_refused(init):
    with pytest.raises(ValueError, match=r"the mix of this init is off by .* between \[2, 4\]; use init=orthogonal"):
        make(SHAPES["fewer and narrower"], init=init)

    def stretched_width(given: Any) -> HeadInit:
        start = orthogonal(given)
        return HeadInit(start.mix, 1.1 * start.width)

    with pytest.raises(ValueError, match=r"the width of this init is off by 0.21 between \[8, 6\]"):
        make(SHAPES["fewer and narrower"], init=stretched_width)


def test_identity_is_orthonormal_where_no_teacher_head_serves_twice():
    head_map = make(SHAPES["fewer and narrower"], init=identity)
    assert head_map.inner.mix[0].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    with pytest.raises(ValueError, match="the mix of this init is off by 2 between"):
        make(SHAPES["more and wider"], init=identity)


@pytest.mark.parametrize("init", ["uniform", "random", "procrustes", "least_squares"])
def test_it_is_refused_before_anything_is_loaded(init):
    with pytest.raises(
        ConfigError, match=f"^init={init} is not allowed with aligner=orthogonal: .*; use init=orthogonal.$"
    ):
        compose_config(["aligner=orthogonal", f"init={init}"])
    config, _ = compose_config(["aligner=orthogonal", "init=orthogonal"])
    assert (config.aligner.name, config.init.name) == ("orthogonal", "orthogonal")


def test_frozen_is_the_frozen_structured_map_of_that_init():
    ours, _ = compose_config(["experiment=orthogonal_frozen"])
    assert (ours.aligner.name, ours.init.name, ours.align.fit, ours.trainer.aligner_lr) == (
        "orthogonal",
        "orthogonal",
        "frozen",
        None,
    )


def test_parameters_are_counted_as_the_structured_maps_and_do_not_decay():
    shape = SHAPES["fewer and narrower"]
    head_map = make(shape)
    assert count_parameters(head_map) == count_parameters(make(shape, kind=StructuredMap)) == LAYERS * (2 * 4 + 8 * 6)
    config, _ = compose_config(["experiment=orthogonal"])
    assert isinstance(config.trainer, TrainerConfig)

    class Both:
        student, trainable_projection = torch.nn.Linear(2, 2), head_map

    groups = make_optimizer(Both, config.trainer).param_groups
    rotations = {id(each) for each in head_map.parameters()}
    assert [group["weight_decay"] for group in groups if {id(each) for each in group["params"]} & rotations] == [0.0]


@pytest.mark.parametrize("half", ["autocast", "all"])
def test_in_half_precision_the_matrices_are_turned_in_single_precision(half):
    head_map, states = make(SHAPES["equal"]), draw(2, LAYERS, 4, 5, 8)
    with torch.no_grad():
        for parameter in head_map.parameters():
            parameter.add_(0.5 * draw(*parameter.shape, seed=2))
    expected = head_map(states)
    if half == "all":
        mapped = head_map.bfloat16()(states.bfloat16())
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mapped = head_map(states)
            assert defect(head_map._matrices("width").detach().double()) < 0.01
    assert mapped.dtype == torch.bfloat16
    assert (mapped.float() - expected).norm() / expected.norm() < 0.02
