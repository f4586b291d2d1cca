"""Control: distillation of the teacher's next-token distribution."""

from __future__ import annotations

from kv_align.config.options import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from kv_align.config.signals import LOGITS, Signals, TopLogits
from kv_align.losses.base import Loss, Pairing, Schedule
from kv_align.losses.comparison import Comparison, LogitComparison, TopLogitComparison
from kv_align.losses.functional import Masked
from kv_align.losses.predictions.linear_head import RowLoss
from kv_align.losses.predictions.next_token import Divergence
from kv_align.losses.predictions.top_k import TopDivergence


class LogitDistillation(Loss):
    """`lambda_logit tau² KL(teacher || student)` over the vocabulary, at the tokens that the cross-entropy scores.

    Parameters
    ----------
    pairing
        Of the two models.
    lambda_logit, lambda_logit_decay, lambda_logit_warmup_steps
        Weight of the term and its schedule, see `Schedule`.
    temperature
        tau.
    top_k
        Tell the teacher's so many most likely tokens apart, and take all others as one; None: the whole vocabulary.

    Raises
    ------
    ValueError
        If there are fewer tokens.
    """

    signals = ("logits",)
    counted = "scored"

    def __init__(
        self,
        pairing: Pairing,
        *,
        lambda_logit: NonNegativeFloat,
        lambda_logit_decay: Decay | None = None,
        lambda_logit_warmup_steps: NonNegativeInt | None = None,
        temperature: PositiveFloat,
        top_k: PositiveInt | None = None,
    ) -> None:
        weight = Schedule(lambda_logit, lambda_logit_decay, lambda_logit_warmup_steps)
        self.schedules, self._temperature = {"logit_loss": weight}, temperature
        self._top: TopLogits | None = None
        if top_k is None:
            return
        if top_k > pairing.vocabulary:
            raise ValueError(
                f"loss.top_k={top_k} is not allowed: the two models have {pairing.vocabulary} tokens; choose at most that, "
                "or null"
            )
        self._top = TopLogits(k=top_k, temperature=temperature, vocabulary=pairing.vocabulary)

    @property
    def requests(self) -> Signals:
        """All logits, or the likeliest alone."""
        return (self._top or LOGITS,)

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """Nothing beside the predictions."""
        return {}

    def row_losses(self, comparison: Comparison) -> dict[str, RowLoss]:
        """`logit_loss`."""
        if self._top is not None:
            return {"logit_loss": TopDivergence(comparison.of(TopLogitComparison).teacher, self._top)}
        return {"logit_loss": Divergence(comparison.of(LogitComparison).teacher, self._temperature)}
