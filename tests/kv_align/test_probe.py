"""The probe: 1 where a linear map tells everything, about 0 where it tells nothing, and least squares with a penalty."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_align.evaluation.probe import ProbeResult, ridge_r2, tokens_by_layer

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def least_squares_r2(
    x_fit: np.ndarray, y_fit: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, ridge: float
) -> float:
    """The penalty as rows of data: for each input one more row, in which that input alone is large and y is its mean."""
    x_mean, y_mean = x_fit.mean(axis=0), y_fit.mean(axis=0)
    count, inputs = x_fit.shape
    mean_eigenvalue = np.linalg.eigvalsh(np.cov(x_fit, rowvar=False, bias=True).reshape(inputs, inputs)).mean()
    rows = np.vstack([x_fit - x_mean, np.sqrt(count * ridge * mean_eigenvalue) * np.eye(inputs)])
    goals = np.vstack([y_fit - y_mean, np.zeros((inputs, y_fit.shape[1]))])
    slope = np.linalg.lstsq(rows, goals, rcond=None)[0]
    residual = y_test - y_mean - (x_test - x_mean) @ slope
    return 1 - (residual**2).sum() / ((y_test - y_mean) ** 2).sum()


@PROPERTY
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([1e-6, 0.01, 1.0, 30.0]), st.integers(0, 1000))
def test_against_least_squares_with_augmented_rows(inputs, outputs, ridge, seed):
    x_fit, x_test = 5 + 3 * draw(40, inputs, seed=seed), 5 + 3 * draw(25, inputs, seed=seed + 1)
    slope, noise = draw(inputs, outputs, seed=seed + 2), draw(65, outputs, seed=seed + 3)
    y_fit, y_test = x_fit @ slope + noise[:40] - 7, x_test @ slope + noise[40:] - 7
    expected = least_squares_r2(*(each.double().numpy() for each in (x_fit, y_fit, x_test, y_test)), ridge)
    assert ridge_r2(x_fit, y_fit, x_test, y_test, ridge) == pytest.approx(expected, abs=1e-8)


def test_an_exactly_linear_relation_is_told_completely():
    slope, x = draw(6, 4, seed=0), draw(300, 6, seed=1)
    y = x @ slope + torch.tensor([1.0, -2.0, 30.0, 0.0])
    assert ridge_r2(x[:200], y[:200], x[200:], y[200:], 1e-9) == pytest.approx(1, abs=1e-6)
    # A penalty as large as the mean eigenvalue halves the slope, and leaves a quarter of the squares.
    assert ridge_r2(x, y, x, y, 1.0) == pytest.approx(0.75, abs=0.02)


def test_noise_tells_nothing():
    x, y = draw(4000, 5, seed=1), draw(4000, 3, seed=2)
    assert ridge_r2(x[:2000], y[:2000], x[2000:], y[2000:], 1e-3) == pytest.approx(0, abs=0.01)
    # With as many inputs as tokens it fits the noise, and is worse than the mean on other text.
    x, y = draw(100, 45, seed=3), draw(100, 3, seed=4)
    assert ridge_r2(x[:50], y[:50], x[50:], y[50:], 1e-6) < -0.5


def test_half_of_the_variance_by_hand():
    # y is the sum of two independent halves, of which x holds one.
    x, rest = draw(20000, 1, seed=1), draw(20000, 1, seed=2)
    y = x + rest
    assert ridge_r2(x[:10000], y[:10000], x[10000:], y[10000:], 1e-9) == pytest.approx(0.5, abs=0.02)


@PROPERTY
@given(st.sampled_from([1e-3, 0.1, 10.0, 1e4]), st.sampled_from([1e-3, 7.0]), st.floats(-50, 50))
def test_the_scale_and_place_of_either_side_do_not_matter(x_scale, y_scale, place):
    x, slope = draw(120, 6, seed=1), draw(6, 4, seed=2)
    y = x @ slope + draw(120, 4, seed=3)
    expected = ridge_r2(x[:80], y[:80], x[80:], y[80:], 0.1)
    assert 0.5 < expected < 0.95
    moved_x, moved_y = x_scale * (x.double() + place), y_scale * (y.double() - place)
    found = ridge_r2(moved_x[:80], moved_y[:80], moved_x[80:], moved_y[80:], 0.1)
    assert found == pytest.approx(expected, abs=1e-6)


def test_states_that_do_not_vary_are_no_division_by_zero():
    x, y = torch.ones(10, 3), draw(10, 2, seed=1)
    assert ridge_r2(x, y, x, y, 0.1) == pytest.approx(0, abs=1e-9)
    assert ridge_r2(y, torch.ones(10, 3), y, torch.ones(10, 3), 0.1) == pytest.approx(1)


def test_tokens_are_kept_by_layer_with_their_heads_side_by_side():
    states, mask = draw(2, 3, 4, 5, 6, seed=0), torch.arange(5)[None] < torch.tensor([[5], [2]])
    tokens = tokens_by_layer(states, mask)
    assert tokens.shape == (3, 7, 24)
    assert torch.equal(tokens[1, 5], states[1, 1, :, 0].flatten())
    assert torch.equal(tokens[2, 4, 6:12], states[0, 2, 1, 4])


def test_a_result_as_columns():
    assert ProbeResult(key=[0.5, 0.7], value=[0.1, -0.3]).row() == {
        "probe_r2_key": pytest.approx(0.6),
        "probe_r2_value": pytest.approx(-0.1),
        "probe_r2_key_by_layer": [0.5, 0.7],
        "probe_r2_value_by_layer": [0.1, -0.3],
    }
