"""Control: distillation of the teacher's next-token distribution."""

from __future__ import annotations

from torch import Tensor

from kv_align.losses import Masked, logit_divergence
from kv_align.objectives.objective import Comparison, Objective
from kv_align.options import NonNegativeFloat, PositiveFloat


class LogitDistillation(Objective):
    """`lambda_logit tau² KL(teacher || student)` over the vocabulary, at the tokens that the cross-entropy scores.

    Parameters
    ----------
    lambda_logit
        Weight of the term.
    temperature
        tau.
    """

    signal = "logits"
    counted = "scored"

    def __init__(self, *, lambda_logit: NonNegativeFloat, temperature: PositiveFloat) -> None:
        self._lambda, self._temperature = lambda_logit, temperature

    def parts(self, comparison: Comparison) -> dict[str, Masked]:
        """`logit_loss`."""
        assert comparison.teacher_logits is not None
        return {
            "logit_loss": logit_divergence(
                comparison.logits, comparison.teacher_logits, comparison.scored, self._temperature
            )
        }

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """`logit_loss`."""
        return means

    def weights(self, step: int, num_steps: int) -> dict[str, float]:
        """Constant."""
        return {"logit_loss": self._lambda}
