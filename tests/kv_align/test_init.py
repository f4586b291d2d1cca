"""How head mixes start: overlaps of heads laid side by side, by hand; and draws that do not touch each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_align.align.aligner import map_generator
from kv_align.align.head_map import InitContext, MapInit, MapShape
from kv_align.align.init.fixed import random, shares, uniform
from kv_align.align.structured import StructuredMap
from kv_align.runs.seeds import derive_seed

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
heads = st.integers(1, 12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def given_heads(student: int, teacher: int, draw: torch.Generator) -> InitContext:
    shape = MapShape(num_layers=1, teacher_heads=teacher, teacher_width=3, student_heads=student, student_width=2)
    return InitContext(shape, "key", draw, torch.arange(6.0).reshape(1, 3, 2))


def random_mix(student: int, teacher: int, seed: int) -> torch.Tensor:
    return random(given_heads(student, teacher, generator(seed))).mix


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (4, 2, [[1 / 2, 1 / 2, 0, 0], [0, 0, 1 / 2, 1 / 2]]),
        (3, 2, [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]),
        (2, 4, [[1, 0], [1, 0], [0, 1], [0, 1]]),
        (5, 3, [[3 / 5, 2 / 5, 0, 0, 0], [0, 1 / 5, 3 / 5, 1 / 5, 0], [0, 0, 0, 2 / 5, 3 / 5]]),
        (1, 3, [[1], [1], [1]]),
        (3, 1, [[1 / 3, 1 / 3, 1 / 3]]),
        (2, 3, [[1, 0], [1 / 2, 1 / 2], [0, 1]]),
        (3, 3, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_uniform_by_hand(teacher, student, expected):
    mix, width = uniform(given_heads(student, teacher, generator()))
    assert torch.equal(width, torch.arange(6.0).reshape(1, 3, 2))
    assert torch.equal(mix, shares(student, teacher))
    assert mix.dtype == torch.float32
    torch.testing.assert_close(mix, torch.tensor(expected, dtype=torch.float32), atol=1e-7, rtol=0)


@PROPERTY
@given(heads, heads)
def test_uniform_rows_are_means_of_neighbours(student, teacher):
    mix = shares(student, teacher).double()
    torch.testing.assert_close(mix.sum(dim=1), torch.ones(student).double(), atol=1e-6, rtol=0)
    # Every teacher head is used, to the same extent, and no student head is left without.
    torch.testing.assert_close(mix.sum(dim=0), torch.full((teacher,), student / teacher).double(), atol=1e-6, rtol=0)
    assert (mix.norm(dim=1) > 0).all()
    assert (mix >= 0).all()
    for row in mix:
        used = row.nonzero().flatten().tolist()
        assert used == list(range(used[0], used[-1] + 1))


@PROPERTY
@given(heads, heads)
def test_uniform_counts_which_head_lies_under_each_piece_of_a_line(student, teacher):
    # The line is cut into student * teacher pieces, each under one head of either.
    overlap = torch.zeros(student, teacher)
    for piece in range(student * teacher):
        overlap[piece // teacher, piece // student] += 1 / teacher
    torch.testing.assert_close(shares(student, teacher), overlap, atol=1e-6, rtol=0)


@PROPERTY
@given(heads, heads, st.integers(0, 2**16))
def test_random_rows_have_the_norm_of_uniform_rows(student, teacher, seed):
    drawn, mean = random_mix(student, teacher, seed), shares(student, teacher)
    torch.testing.assert_close(drawn.norm(dim=1), mean.norm(dim=1))
    assert (drawn != 0).all()


def test_random_mixes_all_heads_with_either_sign():
    drawn = torch.stack([random_mix(2, 4, seed) for seed in range(2000)])
    # A direction drawn uniformly in 4 dimensions, of squared norm 1/2: mean 0 and variance 1/8 in each number.
    torch.testing.assert_close(drawn.mean(dim=0), torch.zeros(2, 4), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.var(dim=0), torch.full((2, 4), 1 / 8), atol=0.015, rtol=0)
    assert torch.equal(random_mix(2, 4, 3), random_mix(2, 4, 3))
    assert not torch.equal(random_mix(2, 4, 3), random_mix(2, 4, 4))


def test_uniform_draws_nothing():
    draw = generator()
    before = draw.get_state()
    uniform(given_heads(3, 5, draw))
    assert torch.equal(draw.get_state(), before)


def test_generators_are_independent():
    purposes = [f"aligner {kind} {part}" for kind in ("key", "value", "query") for part in ("mix", "width")]
    seeds = {derive_seed(seed, purpose) for seed in (0, 1) for purpose in [*purposes, "student start", "data order"]}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    # blake2b of "kv-align 0 student start", its first 63 bits: the same on every machine and in every version.
    assert derive_seed(0, "student start") == 4819282184643344500
    first = torch.randn(4, generator=map_generator(0, "aligner key mix"))
    torch.manual_seed(99)
    torch.randn(10)
    assert torch.equal(torch.randn(4, generator=map_generator(0, "aligner key mix")), first)
    assert not torch.equal(torch.randn(4, generator=map_generator(0, "aligner value mix")), first)
    assert not torch.equal(torch.randn(4, generator=map_generator(1, "aligner key mix")), first)


def test_what_the_mix_draws_shifts_no_width_map_and_no_global_state():
    shape = MapShape(num_layers=2, teacher_heads=4, teacher_width=6, student_heads=3, student_width=5)
    state = torch.get_rng_state()
    maps = [
        StructuredMap(
            shape,
            MapInit(init, map_generator(5, "mix"), map_generator(5, "width")),
            share_dim_proj=True,
            share_layers=False,
            elastic=False,
        )
        for init in (uniform, random)
    ]
    assert torch.equal(maps[0].width, maps[1].width)
    assert not torch.equal(maps[0].mix, maps[1].mix)
    # Layers are drawn one after the other; under uniform they all start alike.
    assert torch.equal(maps[0].mix[0], maps[0].mix[1])
    assert not torch.equal(maps[1].mix[0], maps[1].mix[1])
    assert torch.equal(torch.get_rng_state(), state)
