"""`loss=kv` and `loss=kv+struct`: between the student's states and the projected teacher's."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kv_align.config.options import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat
from kv_align.losses.attention_divergence import attention_divergence
from kv_align.losses.base import Loss, Schedule
from kv_align.losses.comparison import AttentionComparison, Comparison, StateComparison
from kv_align.losses.functional import Masked, cosine_distance, scaled_mse

_WEIGHTS = {None: (1.0, 1.0), "keys": (1.0, 0.0), "values": (0.0, 1.0)}


class KeyValue(Loss):
    """`lambda_kv (key term + value term)`, or one of the two terms alone.

    Parameters
    ----------
    metric
        `mse`, over the teacher's fixed variance of each layer, or `cosine` (1 - cos).
    lambda_kv, lambda_kv_decay, lambda_kv_warmup_steps
        The weight and its schedule, see `Schedule`.
    terms
        `keys` or `values`: which term alone teaches; the other one is measured only. None: both.
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
        terms: Literal["keys", "values"] | None = None,
    ) -> None:
        self._metric = metric
        self._key_weight, self._value_weight = _WEIGHTS[terms]
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
        # A weight of zero, and no term left out: the other term's maps still have a gradient for all processes to sum.
        return {"kv_loss": self._key_weight * means["key_loss"] + self._value_weight * means["value_loss"]}


class KeyValueStruct(Loss):
    """`lambda_kv kv + lambda_struct (alpha_k (1 - cos K) + alpha_v (1 - cos V) + alpha_attn tau² KL(target || student))`.

    Parameters
    ----------
    metric, lambda_kv, lambda_kv_decay, lambda_kv_warmup_steps
        Of the KV loss, see `KeyValue`.
    lambda_struct, lambda_struct_decay, lambda_struct_warmup_steps
        Weight of the structural loss and its schedule, see `Schedule`.
    alpha_k, alpha_v, alpha_attn
        Weights of its parts.
    temperature
        tau of the attention part.
    """

    signals = ("keys_values_queries",)
    counted = "aligned"

    def __init__(
        self,
        *,
        metric: Literal["mse", "cosine"],
        lambda_kv: NonNegativeFloat,
        lambda_kv_decay: Decay,
        lambda_kv_warmup_steps: NonNegativeInt,
        lambda_struct: NonNegativeFloat,
        lambda_struct_decay: Decay,
        lambda_struct_warmup_steps: NonNegativeInt,
        alpha_k: NonNegativeFloat,
        alpha_v: NonNegativeFloat,
        alpha_attn: NonNegativeFloat,
        temperature: PositiveFloat,
    ) -> None:
        self._kv = KeyValue(
            metric=metric,
            lambda_kv=lambda_kv,
            lambda_kv_decay=lambda_kv_decay,
            lambda_kv_warmup_steps=lambda_kv_warmup_steps,
        )
        struct = Schedule(lambda_struct, lambda_struct_decay, lambda_struct_warmup_steps)
        self.schedules = {**self._kv.schedules, "struct_loss": struct}
        self._alphas = {"struct_key_loss": alpha_k, "struct_value_loss": alpha_v, "attention_loss": alpha_attn}
        self._temperature = temperature

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """The KV loss's parts, `struct_key_loss`, `struct_value_loss` and `attention_loss`."""
        states, attention = comparison.of(StateComparison), comparison.of(AttentionComparison)
        student, target, mask = states.student, states.target, comparison.aligned
        return {
            **self._kv.components(comparison),
            "struct_key_loss": cosine_distance(student.k, target.k, mask),
            "struct_value_loss": cosine_distance(student.v, target.v, mask),
            "attention_loss": attention_divergence(
                attention.student_q,
                attention.student_k,
                attention.target_q,
                attention.target_k,
                mask,
                forms=attention.forms,
                temperature=self._temperature,
            ),
        }

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """`kv_loss` and `struct_loss`."""
        weighted = [alpha * means[part] for part, alpha in self._alphas.items()]
        return {**self._kv.terms(means), "struct_loss": weighted[0] + weighted[1] + weighted[2]}
