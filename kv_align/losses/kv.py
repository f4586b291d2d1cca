"""`loss=kv`: a key term and a value term between the student and the projected teacher."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kv_align.config.options import NonNegativeFloat, NonNegativeInt
from kv_align.losses.base import Comparison, Loss, scheduled
from kv_align.losses.functional import Masked, cosine_distance, scaled_mse


class KeyValue(Loss):
    """`lambda_kv (key term + value term)`.

    Parameters
    ----------
    metric
        `mse`, over the teacher's fixed variance of each layer, or `cosine` (1 - cos).
    lambda_kv, lambda_kv_decay, lambda_kv_warmup_steps
        The weight and its schedule, see `scheduled`.
    """

    signal = "keys_values"
    counted = "aligned"

    def __init__(
        self,
        *,
        metric: Literal["mse", "cosine"],
        lambda_kv: NonNegativeFloat,
        lambda_kv_decay: Literal["constant", "linear", "cosine"],
        lambda_kv_warmup_steps: NonNegativeInt,
    ) -> None:
        self._metric = metric
        self._schedule = (lambda_kv, lambda_kv_decay, lambda_kv_warmup_steps)

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """`key_loss` and `value_loss`."""
        student, target, mask = comparison.student, comparison.target, comparison.aligned
        assert student is not None
        assert target is not None
        if self._metric == "cosine":
            return {
                "key_loss": cosine_distance(student.k, target.k, mask),
                "value_loss": cosine_distance(student.v, target.v, mask),
            }
        assert comparison.key_variance is not None
        assert comparison.value_variance is not None
        return {
            "key_loss": scaled_mse(student.k, target.k, mask, comparison.key_variance),
            "value_loss": scaled_mse(student.v, target.v, mask, comparison.value_variance),
        }

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """`kv_loss`."""
        return {"kv_loss": means["key_loss"] + means["value_loss"]}

    def weights(self, step: int, num_steps: int) -> dict[str, float]:
        """`lambda_kv` on its schedule."""
        return {"kv_loss": scheduled(*self._schedule, step, num_steps)}
