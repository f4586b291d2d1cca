"""Agreement against numpy, collected over split batches; collapse at its threshold."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_align.losses.comparison import Comparison, StateComparison
from kv_align.losses.predictions.linear_head import Predictions
from kv_align.models.capture.states import States
from kv_align.training.agreement import (
    Agreement,
    AlignmentGradNorm,
    KindAgreement,
    collapsed,
    start_variances,
    variance,
)
from kv_align.training.step import StepResult

ONES = torch.ones(2)
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def comparison(student: States | None, target: States | None, aligned: torch.Tensor) -> Comparison:
    compared = () if student is None or target is None else (StateComparison(student, target, ONES, ONES),)
    return Comparison(Predictions(torch.zeros(aligned.numel(), 3)), aligned, compared)


def make_states(texts: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> States:
    """Two layers, three heads, five tokens; keys of width 4 and values of width 2."""
    return States(
        shift + scale * draw(texts, 2, 3, 5, 4, seed=seed), shift + scale * draw(texts, 2, 3, 5, 2, seed=seed + 1), None
    )


def step_result(alignment: torch.Tensor) -> StepResult:
    nothing = comparison(None, None, torch.ones(1, 1, dtype=torch.bool))
    return StepResult(alignment, alignment, {}, torch.zeros(0), nothing)


def valid_vectors(states: torch.Tensor, aligned: torch.Tensor) -> np.ndarray:
    """[L, H, N, D], float64."""
    return states.double().numpy().transpose(1, 2, 0, 3, 4)[:, :, aligned.numpy()]


def assert_is_numpys(found: KindAgreement, ours: np.ndarray, theirs: np.ndarray) -> None:
    norms = np.linalg.norm(ours, axis=-1), np.linalg.norm(theirs, axis=-1)
    cosines = (ours * theirs).sum(axis=-1) / (norms[0] * norms[1])
    np.testing.assert_allclose(found.cosine.numpy(), cosines.mean(axis=-1), atol=1e-6)
    np.testing.assert_allclose(found.norm_ratio.numpy(), norms[0].mean(-1) / norms[1].mean(-1), rtol=1e-6)
    np.testing.assert_allclose(found.student_variance.numpy(), ours.var(axis=2).mean(axis=(1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.target_variance.numpy(), theirs.var(axis=2).mean(axis=(1, 2)), rtol=1e-6)


@PROPERTY
@given(st.lists(st.integers(1, 5), min_size=8, max_size=8), st.lists(st.integers(1, 7), max_size=3), st.booleans())
def test_split_batches_give_what_numpy_gives_of_the_whole(lengths, cuts, junk):
    aligned = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    student, target = make_states(8, seed=1, scale=3.0, shift=20.0), make_states(8, seed=5)
    if junk:  # what stands at padding does not matter
        where = ~aligned[:, None, None, :, None]
        student = States(torch.where(where, torch.nan, student.k), torch.where(where, torch.inf, student.v), None)
    quality, places = Agreement(), sorted({0, *cuts, 8})
    for start, end in pairwise(places):
        here = slice(start, end)
        quality.add(
            comparison(
                States(student.k[here], student.v[here], None),
                States(target.k[here], target.v[here], None),
                aligned[here],
            )
        )
    found = quality.result()
    assert set(found) == {"key", "value"}
    for kind, ours, theirs in (("key", student.k, target.k), ("value", student.v, target.v)):
        assert_is_numpys(found[kind], valid_vectors(ours, aligned), valid_vectors(theirs, aligned))


def test_variance_is_numpys_of_valid_tokens():
    aligned = torch.arange(5)[None] < torch.tensor([[5], [2], [1]])
    states = 100 + draw(3, 2, 3, 5, 4, seed=0) * torch.tensor([1.0, 4.0])[:, None, None, None]
    dirty = torch.where(aligned[:, None, None, :, None], states, torch.nan)
    expected = valid_vectors(states, aligned).var(axis=2).mean(axis=(1, 2))
    # A mean of 100 costs a float32 no digits: sums are kept in double precision.
    np.testing.assert_allclose(variance(dirty, aligned).numpy(), expected, rtol=1e-6)
    assert variance(states, torch.zeros_like(aligned)).tolist() == [0, 0]


def test_by_hand():
    # One layer, one head, three valid tokens and one of padding.
    student = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [9.0, 9.0]]).reshape(1, 1, 1, 4, 2)
    target = torch.tensor([[6.0, 8.0], [5.0, 0.0], [1.0, 0.0], [9.0, 9.0]]).reshape(1, 1, 1, 4, 2)
    quality = Agreement()
    aligned = torch.tensor([[True, True, True, False]])
    quality.add(comparison(States(student, target, None), States(target, target, None), aligned))
    key, value = quality.result()["key"], quality.result()["value"]
    assert key.cosine.item() == pytest.approx((1 + 0 - 1) / 3, abs=1e-6)
    assert key.norm_ratio.item() == pytest.approx((5 + 2 + 1) / (10 + 5 + 1))
    # Numbers 3, 0, -1 and 4, 2, 0: variances 26/9 and 8/3.
    assert key.student_variance.item() == pytest.approx((26 / 9 + 8 / 3) / 2)
    assert (value.cosine.item(), value.norm_ratio.item()) == (pytest.approx(1), pytest.approx(1))
    row = key.row("key")
    assert row["cosine_key"] == pytest.approx(0, abs=1e-6)
    assert row["student_variance_key"] == [pytest.approx((26 / 9 + 8 / 3) / 2)]
    assert set(row) == {
        "cosine_key",
        "norm_ratio_key",
        "cosine_key_by_layer",
        "target_variance_key",
        "student_variance_key",
    }


def test_where_nothing_is_aligned_there_is_nothing():
    quality, aligned = Agreement(), torch.ones(2, 5, dtype=torch.bool)
    quality.add(comparison(None, None, aligned))
    assert quality.result() == {}
    # A batch without a valid token gives zeros, not NaN.
    quality.add(comparison(make_states(2, seed=1), make_states(2, seed=3), ~aligned))
    assert quality.result()["key"].cosine.tolist() == [[0.0] * 3] * 2
    assert quality.result()["key"].target_variance.tolist() == [0.0] * 2


def test_collecting_needs_no_graph():
    student = make_states(2, seed=1)
    states = States(student.k.requires_grad_(), student.v, None)
    quality = Agreement()
    quality.add(comparison(states, states, torch.ones(2, 5, dtype=torch.bool)))
    assert not quality.result()["key"].cosine.requires_grad


def with_variances(target: list[float], student: list[float]) -> dict[str, KindAgreement]:
    ones = torch.ones(len(target), 3)
    return {"key": KindAgreement(ones, ones, torch.tensor(target), torch.tensor(student))}


def test_collapse_is_named_under_1_percent_of_the_start():
    start = start_variances(with_variances([2.0, 4.0], [1.0, 1.0]))
    assert start == {"target_variance_key": [2.0, 4.0], "student_variance_key": [1.0, 1.0]}
    assert collapsed(start, with_variances([0.022, 0.044], [0.011, 0.011])) == []
    assert collapsed(start, with_variances([0.022, 0.036], [0.011, 0.011])) == [
        "target key variance of layer 1 is 0.9% of its start"
    ]
    assert collapsed(start, with_variances([0.018, 4.0], [1.0, 0.009])) == [
        "target key variance of layer 0 is 0.9% of its start",
        "student key variance of layer 1 is 0.9% of its start",
    ]
    assert collapsed(start, with_variances([400.0, 400.0], [100.0, 100.0])) == []


def test_a_collapse_of_real_states_is_found_though_their_cosine_is_perfect():
    aligned = torch.ones(4, 5, dtype=torch.bool)
    found = []
    for scale in (1.0, 0.09):
        states = make_states(4, seed=1, scale=scale)
        quality = Agreement()
        quality.add(comparison(states, states, aligned))
        found.append(quality.result())
    before, after = found
    assert after["key"].cosine.mean().item() == pytest.approx(1, abs=1e-6)
    # Variance goes with the square: 0.81 %.
    names = collapsed(start_variances(before), after)
    assert len(names) == 8
    assert names[0] == "target key variance of layer 0 is 0.8% of its start"


def test_gradient_reach_by_hand_and_over_micro_batches():
    student = torch.nn.Linear(2, 1, bias=True)
    student.bias.requires_grad_(False)
    rows = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    reach = AlignmentGradNorm(student)
    assert reach.norm() == 0
    for row in rows:
        reach.add(step_result((student.weight * row).sum()))
    # The gradients (3, 0) and (0, 4) are added before the norm is taken.
    assert reach.norm() == pytest.approx(5)
    assert student.weight.grad is None
    silent = AlignmentGradNorm(student)
    silent.add(step_result(torch.zeros(())))
    silent.add(step_result(student.bias.detach().clone().requires_grad_().sum()))
    assert silent.norm() == 0
