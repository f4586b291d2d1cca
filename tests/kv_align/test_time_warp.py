"""The resampling of tokens: by hand where there are few, against a plain loop over any layout of segments."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_align.align.time_warp import SegmentWarp, resample
from kv_align.data.correspondence import Correspondence

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LINEAR = SegmentWarp(smoothness=0.0, ratios={})
SAME = Correspondence(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long), same_time=True)
NAMES = {1: "question", 2: "reasoning", 3: "answer"}


def matrix_of(warp: SegmentWarp, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return warp.matrix(Correspondence(student, teacher, same_time=False))


def weights(student: list[int], teacher: list[int], *, smoothness: float = 0.0, **ratios: float) -> torch.Tensor:
    """The matrix of one text."""
    warp = SegmentWarp(smoothness=smoothness, ratios=ratios)
    return matrix_of(warp, torch.tensor([student]), torch.tensor([teacher]))[0]


def assert_weights(found: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, float]]:
    """A batch of texts, each with its own lengths of three segments on both sides, padded left or right."""
    texts = draw(st.integers(1, 3))
    sides = []
    for _ in range(2):
        rows = [[s for s in (1, 2, 3) for _ in range(draw(st.integers(0, 5)))] for _ in range(texts)]
        length = max(1, max(len(row) for row in rows)) + draw(st.integers(0, 2))
        left = draw(st.booleans())
        padded = [[0] * (length - len(row)) + row if left else row + [0] * (length - len(row)) for row in rows]
        sides.append(torch.tensor(padded))
    smoothness = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    ratios = draw(st.dictionaries(st.sampled_from(list(NAMES.values())), st.sampled_from([0.25, 0.5, 1.0, 3.0])))
    return *sides, smoothness, ratios


def loop(student: list[int], teacher: list[int], smoothness: float, ratios: dict[str, float]) -> list[list[float]]:
    """The matrix of one text, token by token."""
    matrix = []
    for place, segment in enumerate(student):
        row = [0.0] * len(teacher)
        theirs = [at for at, other in enumerate(teacher) if other == segment]
        if segment != 0 and theirs:
            ours = [at for at, other in enumerate(student) if other == segment]
            ratio = ratios.get(NAMES[segment], len(ours) / len(theirs))
            centre = (ours.index(place) + 0.5) / ratio - 0.5
            centre = min(max(centre, 0), len(theirs) - 1)
            kernel = [max(0.0, 1 - abs(centre - rank) / (1 + smoothness)) for rank in range(len(theirs))]
            for at, weight in zip(theirs, kernel, strict=True):
                row[at] = weight / sum(kernel)
        matrix.append(row)
    return matrix


@PROPERTY
@given(layouts())
def test_any_layout_is_a_plain_loop_over_its_tokens(layout):
    student, teacher, smoothness, ratios = layout
    matrix = matrix_of(SegmentWarp(smoothness=smoothness, ratios=ratios), student, teacher)
    expected = [loop(s, t, smoothness, ratios) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(matrix, torch.tensor(expected).reshape(matrix.shape), atol=1e-5, rtol=0)


@PROPERTY
@given(layouts())
def test_a_token_takes_from_its_own_segment_alone_and_takes_one_in_all(layout):
    student, teacher, smoothness, ratios = layout
    matrix = matrix_of(SegmentWarp(smoothness=smoothness, ratios=ratios), student, teacher)
    assert (matrix >= 0).all()
    assert (matrix[student[:, :, None] != teacher[:, None, :]] == 0).all()
    assert (matrix[student == 0] == 0).all()
    assert (matrix.transpose(1, 2)[teacher == 0] == 0).all()
    served = (student != 0) & (student[:, :, None] == teacher[:, None, :]).any(dim=2)
    torch.testing.assert_close(matrix.sum(dim=2), served.float(), atol=1e-6, rtol=0)


@PROPERTY
@given(layouts())
def test_later_student_tokens_do_not_look_at_earlier_teacher_tokens(layout):
    student, teacher, smoothness, ratios = layout
    matrix = matrix_of(SegmentWarp(smoothness=smoothness, ratios=ratios), student, teacher)
    centres = (matrix * torch.arange(teacher.shape[1])).sum(dim=2)
    for row, centre in zip(student, centres, strict=True):
        for segment in (1, 2, 3):
            inside = centre[row == segment]
            assert (inside.diff() >= -1e-4).all()


@PROPERTY
@given(layouts())
def test_equal_lengths_are_the_identity(layout):
    student = layout[0]
    matrix = matrix_of(LINEAR, student, student)
    assert torch.equal(matrix, torch.diag_embed((student != 0).float()))


def test_half_as_many_tokens_by_hand():
    assert_weights(weights([2, 2], [2, 2, 2, 2]), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert_weights(weights([2], [2, 2, 2]), [[0, 1, 0]])
    # 2 of 3: the middles of thirds and halves, 1/4 and 7/4 in tokens from the first.
    assert_weights(weights([1, 1], [1, 1, 1]), [[0.75, 0.25, 0], [0, 0.25, 0.75]])


def test_twice_as_many_tokens_by_hand():
    assert_weights(weights([3, 3, 3, 3], [3, 3]), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    assert_weights(weights([1, 1, 1], [1]), [[1], [1], [1]])


def test_segments_by_hand():
    matrix = weights([1, 2, 2, 3, 0], [1, 1, 2, 2, 2, 2, 3])
    half = [0.5, 0.5]
    assert_weights(
        matrix,
        [
            [*half, 0, 0, 0, 0, 0],
            [0, 0, *half, 0, 0, 0],
            [0, 0, 0, 0, *half, 0],
            [0, 0, 0, 0, 0, 0, 1],
            [0] * 7,
        ],
    )


def test_a_segment_that_the_teacher_lacks_has_no_target():
    assert_weights(weights([1, 2, 3], [1, 3, 3]), [[1, 0, 0], [0, 0, 0], [0, 0.5, 0.5]])
    # The student may lack one of the teacher's: nobody takes from it.
    assert_weights(weights([1, 3], [1, 2, 2, 3]), [[1, 0, 0, 0], [0, 0, 0, 1]])


def test_a_declared_ratio_replaces_that_of_the_lengths():
    # One student token per teacher token, whatever the lengths: the first ones, and the last for those left over.
    assert_weights(weights([2, 2], [2] * 4, reasoning=1.0), [[1, 0, 0, 0], [0, 1, 0, 0]])
    assert_weights(weights([2] * 3, [2] * 2, reasoning=1.0), [[1, 0], [0, 1], [0, 1]])
    # Half a student token per teacher token is what two for four has anyway.
    assert_weights(weights([2, 2], [2] * 4, reasoning=0.5), weights([2, 2], [2] * 4).tolist())
    # Two for one, at equal lengths: -1/4, 1/4 and 3/4 from the first.
    assert_weights(weights([2] * 3, [2] * 3, reasoning=2.0), [[1, 0, 0], [0.75, 0.25, 0], [0.25, 0.75, 0]])


def test_a_ratio_concerns_its_own_segment():
    matrix = weights([1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3], answer=2.0, reasoning=1.0)
    expected = torch.eye(6)
    expected[5] = torch.tensor([0, 0, 0, 0, 0.75, 0.25])
    assert_weights(matrix, expected.tolist())
    # None is the ratio of the lengths.
    none = SegmentWarp(smoothness=0.0, ratios={"question": None, "reasoning": None, "answer": None})
    assert none.is_identity(SAME)


def test_smoothness_widens_the_kernel():
    # Half-width 2 at equal lengths: 1, 1/2, 0, and normalised.
    expected = [[2 / 3, 1 / 3, 0], [1 / 4, 1 / 2, 1 / 4], [0, 1 / 3, 2 / 3]]
    assert_weights(weights([2] * 3, [2] * 3, smoothness=1.0), expected)
    # Two for four at 1/2 and 5/2 with half-width 2: 3/4, 3/4, 1/4.
    sevenths = [3 / 7, 3 / 7, 1 / 7, 0]
    assert_weights(weights([2] * 2, [2] * 4, smoothness=1.0), [sevenths, sevenths[::-1]])
    # It does not leak into another segment.
    assert_weights(weights([1, 2], [1, 2], smoothness=5.0), [[1, 0], [0, 1]])


def test_when_nothing_needs_resampling():
    assert LINEAR.is_identity(SAME)
    assert not LINEAR.is_identity(replace(SAME, same_time=False))
    assert not SegmentWarp(smoothness=0.5, ratios={}).is_identity(SAME)
    assert not SegmentWarp(smoothness=0.0, ratios={"answer": 1.0}).is_identity(SAME)


def test_each_text_of_a_batch_has_its_own():
    student = torch.tensor([[1, 1, 2, 2], [1, 2, 2, 0], [1, 2, 0, 0]])
    teacher = torch.tensor([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2], [1, 1, 1, 1, 2]])
    together = matrix_of(LINEAR, student, teacher)
    for row in range(3):
        assert torch.equal(together[row], matrix_of(LINEAR, student[row][None], teacher[row][None])[0])
    assert_weights(together[1], [[1, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0.5, 0.5], [0] * 5])
    assert_weights(together[2], [[0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1], [0] * 5, [0] * 5])


def test_left_padding_moves_the_weights_and_nothing_else():
    right = matrix_of(LINEAR, torch.tensor([[1, 2, 2, 0]]), torch.tensor([[1, 2, 2, 2, 2, 0, 0]]))[0]
    left = matrix_of(LINEAR, torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 0, 1, 2, 2, 2, 2]]))[0]
    assert torch.equal(left[1:, 2:], right[:3, :5])
    assert left[0].sum() == 0
    assert left[:, :2].sum() == 0


def test_resampling_is_linear_in_the_states_and_by_hand():
    states, other = (torch.randn(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    matrix = matrix_of(LINEAR, torch.tensor([[1, 2], [1, 2]]), torch.tensor([[1, 1, 2, 2], [1, 2, 2, 2]]))
    resampled = resample(states, matrix)
    assert resampled.shape == (2, 3, 2, 2, 5)
    torch.testing.assert_close(resampled[0, :, :, 1], (states[0, :, :, 2] + states[0, :, :, 3]) / 2)
    torch.testing.assert_close(resampled[1, :, :, 0], states[1, :, :, 0])
    torch.testing.assert_close(resampled[1, :, :, 1], states[1, :, :, 2])
    torch.testing.assert_close(
        resample(2 * states - 3 * other, matrix), 2 * resampled - 3 * resample(other, matrix), atol=1e-5, rtol=1e-5
    )
    constant = torch.full_like(states, 7.0)
    assert torch.equal(resample(constant, matrix), torch.full((2, 3, 2, 2, 5), 7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_keep_their_precision(dtype):
    states = torch.arange(8.0).reshape(1, 1, 1, 4, 2).to(dtype)
    matrix = matrix_of(LINEAR, torch.tensor([[2, 2]]), torch.tensor([[2, 2, 2, 2]]))
    resampled = resample(states, matrix)
    assert resampled.dtype == dtype
    assert resampled.flatten().tolist() == [1, 2, 5, 6]
