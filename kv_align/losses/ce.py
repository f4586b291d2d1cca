"""Control: cross-entropy only."""

from __future__ import annotations

from torch import Tensor

from kv_align.losses.base import Comparison, Loss
from kv_align.losses.functional import Masked


class CrossEntropy(Loss):
    """No term beside the cross-entropy."""

    signal = "none"
    counted = "scored"

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """Nothing."""
        return {}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def weights(self, step: int, num_steps: int) -> dict[str, float]:
        """Nothing."""
        return {}
