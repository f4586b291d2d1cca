"""Control: cross-entropy only."""

from __future__ import annotations

from kv_align.losses.base import Loss
from kv_align.losses.comparison import Comparison
from kv_align.losses.functional import Masked


class CrossEntropy(Loss):
    """No term beside the cross-entropy."""

    signals = ()
    counted = "scored"

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """Nothing."""
        return {}
