"""The probe: how much of the student's keys and values a linear map can tell from the teacher's, on held-out text.

Every arm's own cosine is seen through its own aligner and can be gamed. The probe is the same in all arms, whatever they
trained with: unrotated keys (rotated ones for a pair of which one cannot turn them back), the proportional layer map, one
ridge regression per layer and kind.

Axes: N tokens, I teacher heads times width, O student heads times width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ProbeResult:
    """R² on held-out tokens by student layer, 1 is perfect, 0 or less is no better than the mean."""

    key: list[float]
    value: list[float]

    def row(self) -> dict[str, object]:
        """Columns for the evaluations file."""
        return {
            "probe_r2_key": sum(self.key) / len(self.key),
            "probe_r2_value": sum(self.value) / len(self.value),
            "probe_r2_key_by_layer": self.key,
            "probe_r2_value_by_layer": self.value,
        }


def tokens_by_layer(states: Float[Tensor, "b l h t d"], mask: Tensor) -> Float[Tensor, "l n hd"]:
    """Flatten heads and keep valid tokens."""
    return rearrange(states, "b l h t d -> l b t (h d)")[:, mask]


def ridge_r2(
    x_fit: Float[Tensor, "n i"],
    y_fit: Float[Tensor, "n o"],
    x_test: Float[Tensor, "m i"],
    y_test: Float[Tensor, "m o"],
    ridge: float,
) -> float:
    """Fit a ridge regression with intercept on some tokens and return R² on others.

    Parameters
    ----------
    x_fit, y_fit, x_test, y_test
        Teacher and student states.
    ridge
        Penalty in units of the mean eigenvalue of x's covariance, so that it does not depend on the teacher's scale.

    Returns
    -------
    1 - (squared error) / (squared distance to the mean of y_fit), both summed over all numbers of y_test.
    """
    x_fit, y_fit, x_test, y_test = (each.double() for each in (x_fit, y_fit, x_test, y_test))
    x_mean, y_mean = x_fit.mean(dim=0), y_fit.mean(dim=0)
    centred = x_fit - x_mean
    covariance = centred.T @ centred / len(centred)
    penalty = ridge * covariance.diagonal().mean().clamp(min=1e-12)
    regularised = covariance + penalty * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    slope = torch.linalg.solve(regularised, centred.T @ (y_fit - y_mean) / len(centred))
    residual = y_test - y_mean - (x_test - x_mean) @ slope
    return 1.0 - float((residual.square().sum() / (y_test - y_mean).square().sum().clamp(min=1e-30)).item())
