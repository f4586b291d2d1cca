"""Control: distillation of the teacher's next-token distribution."""

from __future__ import annotations

from torch import Tensor

from kv_align.config.options import NonNegativeFloat, PositiveFloat, PositiveInt
from kv_align.losses.base import Comparison, Loss, Pairing, Signal
from kv_align.losses.functional import Masked, logit_divergence
from kv_align.losses.top_k import TopLogits, top_divergence


class LogitDistillation(Loss):
    """`lambda_logit tau² KL(teacher || student)` over the vocabulary, at the tokens that the cross-entropy scores.

    Parameters
    ----------
    pairing
        Of the two models.
    lambda_logit
        Weight of the term.
    temperature
        tau.
    top_k
        Tell the teacher's so many most likely tokens apart, and take all others as one; None: the whole vocabulary.

    Raises
    ------
    ValueError
        If there are fewer tokens.
    """

    signal: Signal = "logits"
    counted = "scored"

    def __init__(
        self,
        pairing: Pairing,
        *,
        lambda_logit: NonNegativeFloat,
        temperature: PositiveFloat,
        top_k: PositiveInt | None = None,
    ) -> None:
        self._lambda, self._temperature = lambda_logit, temperature
        if top_k is None:
            return
        if top_k > pairing.vocabulary:
            raise ValueError(
                f"loss.top_k={top_k} is not allowed: the two models have {pairing.vocabulary} tokens; choose at most that, "
                "or null"
            )
        self.signal = TopLogits(top_k, temperature, pairing.vocabulary)

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """`logit_loss`."""
        student, scored = comparison.logits, comparison.scored
        if isinstance(self.signal, TopLogits):
            assert comparison.teacher_top is not None
            return {"logit_loss": top_divergence(student, comparison.teacher_top, scored, self.signal)}
        assert comparison.teacher_logits is not None
        return {"logit_loss": logit_divergence(student, comparison.teacher_logits, scored, self._temperature)}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """`logit_loss`."""
        return means

    def weights(self, step: int, num_steps: int) -> dict[str, float]:
        """Constant."""
        return {"logit_loss": self._lambda}
