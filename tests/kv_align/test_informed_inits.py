"""Inits that start a structured map from more than shares of heads: one battery for all, and what each recovers."""

from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kv_align.align.aligner import Aligner, map_generator
from kv_align.align.cka import cka_matrix
from kv_align.align.head_map import HeadInit, MapInit, MapShape
from kv_align.align.init.cka_hungarian import cka_hungarian
from kv_align.align.init.fixed import identity, orthogonal, shares, uniform
from kv_align.align.init.least_squares import least_squares
from kv_align.align.init.procrustes import procrustes
from kv_align.align.paired_states import Calibration, Pair
from kv_align.align.structured import StructuredMap
from kv_align.align.time_warp import SegmentWarp
from tests.tiny import project


def ridged(given: object, calibration: Calibration) -> HeadInit:
    return least_squares(given, calibration, ridge=1e-9)


BLIND: dict[str, HeadInit] = {"identity": identity, "orthogonal": orthogonal}
INFORMED: dict[str, HeadInit] = {"least_squares": ridged, "procrustes": procrustes, "cka_hungarian": cka_hungarian}
INITS = BLIND | INFORMED
LAYERS = 3
SHAPES = {
    "narrower": MapShape(LAYERS, teacher_heads=4, teacher_width=8, student_heads=2, student_width=6),
    "wider": MapShape(LAYERS, teacher_heads=2, teacher_width=6, student_heads=5, student_width=10),
    "square": MapShape(LAYERS, teacher_heads=4, teacher_width=8, student_heads=4, student_width=8),
}
OPTIONS = [
    {"share_dim_proj": share_dim_proj, "share_layers": share_layers, "elastic": False}
    for share_dim_proj, share_layers in product((True, False), (False, True))
]
every_init = pytest.mark.parametrize("name", INITS)
every_informed = pytest.mark.parametrize("name", INFORMED)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda each: "-".join(k for k, on in each.items() if on) or "own"
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(shape: MapShape, seed: int = 0, tokens: int = 400) -> Pair:
    """States that have nothing to do with each other."""
    teacher = draw(tokens, shape.num_layers, shape.teacher_heads, shape.teacher_width, seed=seed)
    return Pair(teacher, draw(tokens, shape.num_layers, shape.student_heads, shape.student_width, seed=seed + 1))


def calibration_of(shape: MapShape, seed: int = 0) -> Calibration:
    return Calibration(pair(shape, seed), pair(shape, seed + 10), pair(shape, seed + 20))


def start_of(
    name: str, shape: MapShape, *, seed: int = 0, calibration: Calibration | None = None, kind: str = "key"
) -> MapInit:
    states = None if name in BLIND else calibration or calibration_of(shape)
    generators = map_generator(seed, "mix"), map_generator(seed, "width")
    return MapInit(INITS[name], *generators, kind, {kind: shape}, states)


def make(name: str, shape: MapShape, options: dict = OPTIONS[0], **given: object) -> StructuredMap:
    return StructuredMap(shape, start_of(name, shape, **given), **options)


# The battery


@every_shape
@every_option
@every_init
def test_shapes_and_that_no_head_starts_dead(name, options, shape):
    head_map = make(name, shape, options)
    maps = 1 if options["share_layers"] else LAYERS
    assert head_map.mix.shape == (maps, shape.student_heads, shape.teacher_heads)
    heads = () if options["share_dim_proj"] else (shape.student_heads,)
    assert head_map.width.shape == (maps, *heads, shape.teacher_width, shape.student_width)
    assert {head_map.mix.dtype, head_map.width.dtype} == {torch.float32}
    assert head_map.mix.is_contiguous()
    assert head_map.width.is_contiguous()
    mapped = head_map(draw(2, LAYERS, shape.teacher_heads, 5, shape.teacher_width))
    assert mapped.shape == (2, LAYERS, shape.student_heads, 5, shape.student_width)
    # Fitted to what has nothing to do with the teacher, least squares keeps little, but something.
    assert (mapped.std(dim=(0, 3, 4)) > (1e-3 if name == "least_squares" else 0.05)).all()


@every_shape
@every_option
@every_init
def test_gradient_reaches_every_parameter_of_every_layer(name, options, shape):
    head_map = make(name, shape, options)
    mapped = head_map(draw(2, LAYERS, shape.teacher_heads, 5, shape.teacher_width))
    (mapped * draw(*mapped.shape, seed=1)).sum().backward()
    for parameter in head_map.parameters():
        # Every number, also what starts at zero.
        assert (parameter.grad != 0).all()


@every_init
def test_one_seed_gives_one_start_and_no_global_state_is_touched(name):
    shape, state = SHAPES["narrower"], torch.get_rng_state()
    first, again, other = (make(name, shape, seed=seed) for seed in (3, 3, 4))
    for part in ("mix", "width"):
        assert torch.equal(getattr(first, part), getattr(again, part))
    assert torch.equal(torch.get_rng_state(), state)
    # What draws nothing of its own differs by the seeded width map alone, if it keeps that.
    assert torch.equal(first.mix, other.mix) == (name != "orthogonal")
    assert torch.equal(first.width, other.width) == (name in ("identity", "least_squares", "procrustes"))


@every_init
def test_which_parts_an_init_sets(name):
    shape = SHAPES["narrower"]
    ours = make(name, shape)
    usual = StructuredMap(shape, MapInit(uniform, map_generator(0, "mix"), map_generator(0, "width")), **OPTIONS[0])
    sets = {
        "identity": {"mix", "width"},
        "orthogonal": {"mix"},
        "least_squares": {"mix", "width"},
        "procrustes": {"width"},
        "cka_hungarian": {"mix"},
    }[name]
    for part in ("mix", "width"):
        assert torch.equal(getattr(ours, part), getattr(usual, part)) == (part not in sets), part


@every_init
def test_inside_an_aligner_padding_neighbours_and_precision(name):
    shape = SHAPES["narrower"]
    maps = [make(name, shape, kind=kind) for kind in ("key", "value", "query")]
    aligner = Aligner((0, 1, 1), SegmentWarp(smoothness=0.0, ratios={}), *maps)
    states = [draw(2, 2, 4, 7, 8, seed=seed) for seed in range(3)]
    student, teacher = (
        torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 2, 2]]),
        torch.tensor([[1] * 3 + [2] * 4, [1] * 2 + [2] * 3 + [0] * 2]),
    )
    junk = [torch.where((teacher == 0)[:, None, None, :, None], 1e6, each) for each in states]
    clean, dirty = (project(aligner, each, student, teacher, False) for each in (states, junk))
    valid = (student != 0)[:, None, None, :, None]
    alone = project(aligner, (each[1:, ..., :5, :] for each in states), student[1:], teacher[1:, :5], False)
    rough = project(aligner.bfloat16(), (each.bfloat16() for each in states), student, teacher, False)
    for ours, theirs, single, half in zip(clean, dirty, alone, rough, strict=True):
        assert ours.shape == (2, 3, 2, 5, 6)
        assert torch.equal(ours[valid.expand_as(ours)], theirs[valid.expand_as(ours)])
        torch.testing.assert_close(ours[1:], single, atol=1e-5, rtol=1e-5)
        assert half.dtype == torch.bfloat16
        assert (half.float() - ours)[valid.expand_as(ours)].norm() < 0.02 * ours[valid.expand_as(ours)].norm()


@every_option
@every_init
def test_saved_and_loaded_through_safetensors(name, options, tmp_path):
    shape = SHAPES["narrower"]
    first, second = make(name, shape, options, seed=1), make(name, shape, options, seed=2)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * draw(*parameter.shape, seed=5))
    save_file(first.state_dict(), tmp_path / "map.safetensors")
    second.load_state_dict(load_file(tmp_path / "map.safetensors"))
    states = draw(2, LAYERS, 4, 5, 8)
    assert torch.equal(first(states), second(states))


@every_informed
def test_a_shared_map_sees_all_layers_and_its_own_map_sees_its_layer(name):
    shape = SHAPES["square"]
    states = calibration_of(shape)
    shared = make(name, shape, OPTIONS[1], calibration=states)
    assert (shared.mix.shape[0], shared.width.shape[0]) == (1, 1)
    own = make(name, shape, OPTIONS[0], calibration=states)
    only = make(name, MapShape(1, *list(vars(shape).values())[1:]), OPTIONS[0], calibration=states.layer(1))
    if name != "cka_hungarian":  # its width map is drawn
        torch.testing.assert_close(own.width[1], only.width[0])
    torch.testing.assert_close(own.mix[1], only.mix[0])
    assert not torch.allclose(own.mix[0] + own.width[0].sum(), own.mix[1] + own.width[1].sum(), atol=1e-3)


# identity


@pytest.mark.parametrize("options", OPTIONS)
def test_identity_between_equal_shapes_is_the_identity(options):
    states = draw(2, LAYERS, 4, 5, 8)
    assert torch.equal(make("identity", SHAPES["square"], options)(states), states)


def test_identity_between_other_shapes_by_hand():
    narrower = make("identity", SHAPES["narrower"])
    assert narrower.mix[0].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    states = draw(2, LAYERS, 4, 5, 8)
    assert torch.equal(narrower(states), states[:, :, [0, 2], :, :6])
    wider = make("identity", SHAPES["wider"])
    assert wider.mix[0].argmax(dim=1).tolist() == [0, 0, 0, 1, 1]
    states = draw(2, LAYERS, 2, 5, 6)
    mapped = wider(states)
    assert torch.equal(mapped[..., :6], states[:, :, [0, 0, 0, 1, 1]])
    assert (mapped[..., 6:] == 0).all()


# orthogonal


def test_orthogonal_is_orthonormal_on_its_shorter_side():
    for layer in make("orthogonal", SHAPES["narrower"]).mix.double():
        torch.testing.assert_close(layer @ layer.T, torch.eye(2).double(), atol=1e-6, rtol=0)
    for layer in make("orthogonal", SHAPES["wider"]).mix.double():
        torch.testing.assert_close(layer.T @ layer, torch.eye(2).double(), atol=1e-6, rtol=0)
    mixes = make("orthogonal", SHAPES["square"]).mix
    assert not torch.allclose(mixes[0], mixes[1], atol=0.1)


def test_orthogonal_between_equal_shapes_keeps_all_inner_products():
    states = draw(1, LAYERS, 4, 5, 8).double()
    mapped = make("orthogonal", SHAPES["square"]).double()(states)
    ours, theirs = (torch.einsum("blhtd,blhsd->blts", each, each) for each in (mapped, states))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# least squares


def planted(shape: MapShape, *, share_dim_proj: bool, noise: float = 0.0) -> tuple[Calibration, StructuredMap]:
    """Student states that a structured map makes of teacher states whose heads are not independent, and that map."""
    options = {"share_dim_proj": share_dim_proj, "share_layers": False, "elastic": False}
    truth = StructuredMap(shape, MapInit(uniform, map_generator(9, "mix"), map_generator(9, "width")), **options)
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.copy_(draw(*parameter.shape, seed=7))
    total = shape.teacher_heads * shape.teacher_width
    correlated = draw(600, shape.num_layers, total, seed=3) @ (torch.eye(total) + 0.3 * draw(total, total, seed=4))
    teacher = correlated.unflatten(-1, (shape.teacher_heads, shape.teacher_width))
    with torch.no_grad():
        student = truth(teacher.permute(1, 2, 0, 3)[None])[0].permute(2, 0, 1, 3)
    student = student + noise * draw(*student.shape, seed=5)
    known = Pair(teacher, student)
    return Calibration(known, known, known), truth


@pytest.mark.parametrize("share_dim_proj", [True, False])
@every_shape
def test_least_squares_recovers_an_exactly_linear_relation(shape, share_dim_proj):
    states, truth = planted(shape, share_dim_proj=share_dim_proj)
    options = {"share_dim_proj": share_dim_proj, "share_layers": False, "elastic": False}
    found = make("least_squares", shape, options, calibration=states)
    unseen = draw(2, LAYERS, shape.teacher_heads, 5, shape.teacher_width, seed=8)
    expected = truth(unseen)
    assert (found(unseen) - expected).norm() < 1e-4 * expected.norm()
    # The mix has the norm of `uniform`'s, as every other init's; the width map carries the scale.
    norms = found.mix.detach().norm(dim=(1, 2)) if share_dim_proj else found.mix.detach().norm(dim=2)
    plain = shares(shape.student_heads, shape.teacher_heads)
    wanted = plain.norm().expand(LAYERS) if share_dim_proj else plain.norm(dim=1).expand(LAYERS, -1)
    torch.testing.assert_close(norms, wanted)


def squared_error(head_map: StructuredMap, known: Pair) -> float:
    with torch.no_grad():
        projected = head_map(known.teacher.permute(1, 2, 0, 3)[None])[0].permute(2, 0, 1, 3)
    return float((projected - known.student).square().mean())


@pytest.mark.parametrize("share_dim_proj", [True, False])
def test_least_squares_is_a_minimum_where_nothing_fits_exactly(share_dim_proj):
    shape = SHAPES["narrower"]
    options = {"share_dim_proj": share_dim_proj, "share_layers": False, "elastic": False}
    states, truth = planted(shape, share_dim_proj=share_dim_proj, noise=2.0)
    found = make("least_squares", shape, options, calibration=states)
    best = squared_error(found, states.key)
    assert best < squared_error(truth, states.key)
    for seed in range(5):
        moved = make("least_squares", shape, options, calibration=states)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(1e-2 * draw(*parameter.shape, seed=seed))
        assert squared_error(moved, states.key) > best
    # The gradient of the error vanishes there.
    projected = found(states.key.teacher.permute(1, 2, 0, 3)[None])[0].permute(2, 0, 1, 3)
    (projected - states.key.student).square().mean().backward()
    start = make("cka_hungarian", shape, options, calibration=states)
    worse = start(states.key.teacher.permute(1, 2, 0, 3)[None])[0].permute(2, 0, 1, 3)
    (worse - states.key.student).square().mean().backward()
    for part in ("mix", "width"):
        assert getattr(found, part).grad.norm() < 2e-3 * getattr(start, part).grad.norm(), part


def test_a_ridge_shrinks_what_is_found():
    shape = SHAPES["narrower"]
    states, _ = planted(shape, share_dim_proj=True)
    generators = map_generator(0, "mix"), map_generator(0, "width")
    norms = []
    for ridge in (0.0, 0.1, 1.0):
        start = MapInit(lambda *given, ridge=ridge: least_squares(*given, ridge=ridge), *generators, calibration=states)
        norms.append(StructuredMap(shape, start, **OPTIONS[0]).width.norm().item())
    assert norms[0] > norms[1] > norms[2] > 0


def test_a_teacher_number_that_never_varies_does_not_break_least_squares():
    shape = SHAPES["narrower"]
    states, _ = planted(shape, share_dim_proj=True)
    states.key.teacher[..., 0] = 0
    head_map = make("least_squares", shape, calibration=states)
    assert head_map.width.isfinite().all()
    assert head_map.width.abs().max() < 100


# procrustes


@pytest.mark.parametrize("share_dim_proj", [True, False])
def test_procrustes_recovers_a_rotation(share_dim_proj):
    shape = SHAPES["square"]
    options = {"share_dim_proj": share_dim_proj, "share_layers": False, "elastic": False}
    teacher = draw(300, LAYERS, 4, 8)
    heads = 1 if share_dim_proj else 4
    turns = torch.linalg.qr(draw(LAYERS, heads, 8, 8, seed=3)).Q
    student = 3 * torch.einsum("nlhd,lhde->nlhe", teacher, turns.expand(-1, 4, -1, -1))  # scaled: not its business
    known = Pair(teacher, student)
    found = make("procrustes", shape, options, calibration=Calibration(known, known, known))
    width = found.width.detach()
    torch.testing.assert_close(width, turns[:, 0] if share_dim_proj else turns, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(width @ width.transpose(-1, -2), torch.eye(8).expand_as(width), atol=1e-5, rtol=0)


@every_shape
def test_procrustes_has_the_largest_inner_product_of_all_such_matrices(shape):
    states = calibration_of(shape)
    found = make("procrustes", shape, calibration=states)
    teacher, student = states.key.teacher[:, 0], states.key.student[:, 0]
    mixed = torch.einsum("gh,nhd->ngd", shares(shape.student_heads, shape.teacher_heads), teacher)

    def product_with(width: Tensor) -> float:
        return float((mixed @ width * student).sum())

    best = product_with(found.width[0].detach())
    for seed in range(20):
        left = torch.linalg.qr(torch.eye(shape.teacher_width) + 0.1 * draw(*[shape.teacher_width] * 2, seed=seed)).Q
        left = left * torch.sign(left.diagonal())
        assert product_with(left @ found.width[0].detach()) < best


# CKA and the Hungarian method


def test_linear_cka_is_its_definition_and_blind_to_rotation_scale_and_shift():
    x, y = draw(50, 6).double(), draw(50, 4, seed=1).double() + 3
    centre = torch.eye(50).double() - 1 / 50
    k, m = (centre @ each @ each.T @ centre for each in (x, y))
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert cka_matrix([x], [y]).item() == pytest.approx(expected.item(), rel=1e-9)
    turned = 5 * x @ torch.linalg.qr(draw(6, 6, seed=2).double()).Q - 7
    torch.testing.assert_close(
        cka_matrix([x, y], [turned, y, torch.ones(50, 2)])[0, [0, 2]], torch.tensor([1.0, 0.0]).double()
    )
    both = cka_matrix([x, y], [y, x])
    torch.testing.assert_close(both, both.flip(0, 1))
    assert ((both >= 0) & (both <= 1 + 1e-12)).all()


def permuted(shape: tuple[int, int, int, int], groups: list[int], seed: int = 0) -> Pair:
    """Student heads that are rotated and scaled teacher heads in another order, with a little noise."""
    tokens, heads, width, per_group = shape
    teacher = draw(tokens, 1, heads, width, seed=seed)
    order = [group * per_group + place for group in groups for place in range(per_group)]
    turns = torch.linalg.qr(draw(len(order), width, width, seed=seed + 1)).Q
    student = torch.einsum("nlhd,hde->nlhe", teacher[:, :, order], turns) * 2
    return Pair(teacher, student + 0.3 * draw(*student.shape, seed=seed + 2))


@pytest.mark.parametrize("groups", [[2, 0, 3, 1], [3, 1], [1]])
def test_cka_hungarian_recovers_a_permutation_of_heads(groups):
    known = permuted((300, 4, 8, 1), groups)
    shape = MapShape(1, 4, 8, len(groups), 8)
    found = make("cka_hungarian", shape, calibration=Calibration(known, known, None))
    assert torch.equal(found.mix[0].detach(), torch.eye(4)[groups])


def test_no_teacher_head_serves_twice_as_long_as_there_are_enough_and_all_serve_where_there_are_not():
    # All student heads are most like teacher head 0.
    teacher = draw(300, 1, 3, 8)
    student = teacher[:, :, [0, 0, 0]] + 0.5 * draw(300, 1, 3, 8, seed=1) + 0.3 * teacher
    known = Pair(teacher, student)
    mix = make("cka_hungarian", MapShape(1, 3, 8, 3, 8), calibration=Calibration(known, known, None)).mix[0]
    assert sorted(mix.argmax(dim=1).tolist()) == [0, 1, 2]
    many = Pair(teacher, torch.cat((student, student, teacher[:, :, :1]), dim=2))
    mix = make("cka_hungarian", MapShape(1, 3, 8, 7, 8), calibration=Calibration(many, many, None)).mix[0]
    assert sorted(mix.sum(dim=0).tolist()) == [2, 2, 3]


def test_keys_values_and_queries_permute_together_and_queries_only_within_their_group():
    groups, per_group = [1, 2, 0], 2
    keys = permuted((300, 3, 8, 1), groups)
    values = Pair(draw(300, 1, 3, 8, seed=50), draw(300, 1, 3, 8, seed=51))  # of themselves they say nothing
    teacher_q = draw(300, 1, 6, 8, seed=60)
    # Query heads of each group stand the other way round, and every one is even more like a head of another group.
    own = [group * per_group + place for group in groups for place in (1, 0)]
    student_q = teacher_q[:, :, own] + 2 * teacher_q[:, :, [(head + 2) % 6 for head in own]]
    states = Calibration(keys, values, Pair(teacher_q, student_q))
    shape, queries = MapShape(1, 3, 8, 3, 8), MapShape(1, 6, 8, 6, 8)
    key, value = (make("cka_hungarian", shape, calibration=states, kind=kind).mix[0] for kind in ("key", "value"))
    assert key.argmax(dim=1).tolist() == groups
    assert torch.equal(key, value)
    query = make("cka_hungarian", queries, calibration=states, kind="query").mix[0]
    assert query.argmax(dim=1).tolist() == own
    assert cka_matrix(states.query.student[:, 0].unbind(1), teacher_q[:, 0].unbind(1)).argmax(dim=1).tolist() != own


def test_values_decide_where_keys_do_not():
    groups = [2, 0, 1]
    keys = Pair(draw(300, 1, 3, 8, seed=50), draw(300, 1, 3, 8, seed=51))
    states = Calibration(keys, permuted((300, 3, 8, 1), groups), None)
    key = make("cka_hungarian", MapShape(1, 3, 8, 3, 8), calibration=states).mix[0]
    assert key.argmax(dim=1).tolist() == groups
