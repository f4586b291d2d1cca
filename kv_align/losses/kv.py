"""`loss=kv`: a key term and a value term between the student and the projected teacher."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kv_align.config.options import Decay, NonNegativeFloat, NonNegativeInt
from kv_align.losses.base import Loss, Schedule
from kv_align.losses.comparison import Comparison, StateComparison
from kv_align.losses.functional import Masked, cosine_distance, scaled_mse


class KeyValue(Loss):
    """`lambda_kv (key term + value term)`.

    Parameters
    ----------
    metric
        `mse`, over the teacher's fixed variance of each layer, or `cosine` (1 - cos).
    lambda_kv, lambda_kv_decay, lambda_kv_warmup_steps
        The weight and its schedule, see `Schedule`.
    """

    signals = ("keys_values",)
    counted = "aligned"

    def __init__(
        self,
        *,
        metric: Literal["mse", "cosine"],
        lambda_kv: NonNegativeFloat,
        lambda_kv_decay: Decay,
        lambda_kv_warmup_steps: NonNegativeInt,
    ) -> None:
        self._metric = metric
        self.schedules = {"kv_loss": Schedule(lambda_kv, lambda_kv_decay, lambda_kv_warmup_steps)}

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """`key_loss` and `value_loss`."""
        states, mask = comparison.of(StateComparison), comparison.aligned
        student, target = states.student, states.target
        if self._metric == "cosine":
            return {
                "key_loss": cosine_distance(student.k, target.k, mask),
                "value_loss": cosine_distance(student.v, target.v, mask),
            }
        return {
            "key_loss": scaled_mse(student.k, target.k, mask, states.key_variance),
            "value_loss": scaled_mse(student.v, target.v, mask, states.value_variance),
        }

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """`kv_loss`."""
        return {"kv_loss": means["key_loss"] + means["value_loss"]}
