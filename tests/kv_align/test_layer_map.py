"""Which teacher layer each student layer looks at."""

import inspect
import itertools
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_align.align.layer_map import fixed as layer_map
from kv_align.align.layer_map.fixed import explicit, last, proportional, random, reverse

Map = Callable[[int, int, int], list[int]]
LAYERS, SEEDS = st.integers(1, 130), st.integers(0, 2**32)
quick = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (6, 3, [1, 3, 5]),
        (4, 4, [0, 1, 2, 3]),
        (28, 24, [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18, 19, 20, 22, 23, 24, 25, 26, 27]),
        (7, 3, [2, 4, 6]),
        (5, 1, [4]),
        (1, 3, [0, 0, 0]),
        (2, 4, [0, 0, 1, 1]),
        (3, 5, [0, 1, 1, 2, 2]),
    ],
)
def test_the_proportional_map_keeps_the_relative_depth_by_hand(teacher: int, student: int, expected: list[int]) -> None:
    # Student layer i of n ends at depth (i + 1) / n, and takes the teacher's layer that reaches to that depth.
    assert proportional(teacher, student, 0) == expected
    assert reverse(teacher, student, 0) == expected[::-1]


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [(6, 3, [3, 4, 5]), (4, 4, [0, 1, 2, 3]), (5, 1, [4]), (28, 2, [26, 27])],
)
def test_the_last_layers_are_taken_in_order(teacher: int, student: int, expected: list[int]) -> None:
    assert last(teacher, student, 0) == expected


def test_a_list_is_returned_as_it_was_given() -> None:
    given_layers = [5, 0, 0]
    returned = explicit(6, 3, 0, layers=given_layers)
    assert returned == [5, 0, 0]
    assert returned is not given_layers


@quick
@given(LAYERS, LAYERS, SEEDS)
def test_every_student_layer_has_a_teacher_layer(teacher: int, student: int, seed: int) -> None:
    for each in (proportional, reverse, random, *([last] if student <= teacher else [])):
        layers = each(teacher, student, seed)
        assert len(layers) == student
        assert set(layers) <= set(range(teacher)), each


@quick
@given(LAYERS, LAYERS, SEEDS)
def test_the_proportional_map_climbs_to_the_last_layer_and_leaves_no_gap_that_it_need_not(
    teacher: int, student: int, seed: int
) -> None:
    layers = proportional(teacher, student, seed)
    steps = [after - before for before, after in itertools.pairwise(layers)]
    assert layers[-1] == teacher - 1
    assert all(teacher // student <= step <= -(-teacher // student) for step in steps)
    assert len(set(layers)) == min(teacher, student)
    for place, layer in enumerate(layers):
        assert layer * student < (place + 1) * teacher <= (layer + 1) * student


@quick
@given(LAYERS, LAYERS, SEEDS)
def test_the_reverse_map_is_the_proportional_one_upside_down(teacher: int, student: int, seed: int) -> None:
    layers = reverse(teacher, student, seed)
    assert layers[0] == teacher - 1
    assert layers == list(reversed(proportional(teacher, student, seed)))


@quick
@given(LAYERS, LAYERS)
def test_the_last_map_serves_exactly_the_students_that_are_not_deeper(teacher: int, student: int) -> None:
    if student <= teacher:
        assert last(teacher, student, 0) == list(range(teacher))[-student:]
        return
    with pytest.raises(ValueError, match=f"the student has {student} layers and the teacher only {teacher}; use "):
        last(teacher, student, 0)


@quick
@given(LAYERS, LAYERS, SEEDS)
def test_the_random_map_repeats_no_layer_before_all_have_been_drawn(teacher: int, student: int, seed: int) -> None:
    layers = random(teacher, student, seed)
    assert layers == random(teacher, student, seed)
    counts = [layers.count(layer) for layer in range(teacher)]
    assert max(counts) - min(counts) <= 1
    for start in range(0, student - teacher + 1, teacher):
        assert sorted(layers[start : start + teacher]) == list(range(teacher))


def test_the_random_map_is_another_for_another_seed() -> None:
    drawn = {tuple(random(24, 12, seed)) for seed in range(20)}
    assert len(drawn) == 20
    assert tuple(proportional(24, 12, 0)) not in drawn


def test_the_random_map_draws_every_layer_for_every_place() -> None:
    draws = [random(4, 2, seed) for seed in range(400)]
    for place in range(2):
        counts = [sum(layers[place] == layer for layers in draws) for layer in range(4)]
        # 400 draws of 4: mean 100, standard deviation 8.7.
        assert all(60 < count < 140 for count in counts)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([1, 3], r"layer_map.layers=[1, 3] has 2 entries for 3 student layers; give one teacher layer for each"),
        ([1] * 4, r"layer_map.layers=[1, 1, 1, 1] has 4 entries for 3 student layers; give one teacher layer for each"),
        ([0, 6, 1], r"layer_map.layers=[0, 6, 1] names layer 6 and the teacher's are 0 to 5; use these"),
    ],
)
def test_a_list_that_does_not_fit_the_pair_is_refused(layers: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"layer_map\.layers") as refused:
        explicit(6, 3, 0, layers=layers)
    assert str(refused.value) == sentence


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 9), st.integers(1, 9))
def test_a_list_is_accepted_exactly_if_it_has_a_teacher_layer_for_each_student_layer(
    layers: list[int], teacher: int, student: int
) -> None:
    if len(layers) == student and all(layer < teacher for layer in layers):
        assert explicit(teacher, student, 0, layers=layers) == layers
    else:
        with pytest.raises(ValueError, match=r"^layer_map\.layers="):
            explicit(teacher, student, 0, layers=layers)


def test_no_map_looks_at_the_seed_but_the_random_one() -> None:
    maps = {name: each for name, each in vars(layer_map).items() if inspect.isfunction(each)}
    assert set(maps) == {"proportional", "last", "explicit", "reverse", "random"}
    without_options: list[tuple[str, Map]] = [(name, each) for name, each in maps.items() if name != "explicit"]
    changing = {name for name, each in without_options if len({tuple(each(24, 12, seed)) for seed in range(5)}) > 1}
    assert changing == {"random"}
