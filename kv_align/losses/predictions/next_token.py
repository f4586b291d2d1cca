"""What the prediction of a token is measured by: row losses of `kv_align.losses.predictions.linear_head`.

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from kv_align.losses.predictions.linear_head import Predictions, RowLoss


class CrossEntropy(RowLoss):
    """Cross-entropy in nats.

    Parameters
    ----------
    labels
        The token that follows at each place.
    """

    def __init__(self, labels: Int[Tensor, " n"]) -> None:
        self._labels = labels[:, None]

    def values(self, logits: Tensor, rows: slice) -> Tensor:
        """Return `-log softmax(logits)[label]`."""
        return -F.log_softmax(logits, dim=1).gather(1, self._labels[rows]).squeeze(1)

    def gradient(self, logits: Tensor, rows: slice, upstream: Tensor) -> Tensor:
        """Return `softmax(logits) - onehot(label)`, times the upstream."""
        return F.softmax(logits, dim=1).scatter_(1, self._labels[rows], -1.0, reduce="add").mul_(upstream)


class Divergence(RowLoss):
    """`tau² KL(teacher || student)` (Hinton et al., 2015, arXiv:1503.02531).

    Where one vocabulary is padded further than the other, the common part is compared.

    Parameters
    ----------
    teacher
        Its predictions at the same places; they get no gradient.
    temperature
        tau, which divides both logits.
    """

    def __init__(self, teacher: Predictions, temperature: float) -> None:
        self._teacher, self._temperature = teacher.logits_by_rows(), temperature

    def values(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the divergences."""
        student, teacher = (F.log_softmax(each, dim=1) for each in self._scaled(logits, rows))
        return (teacher.exp() * (teacher - student)).sum(dim=1) * self._temperature**2

    def gradient(self, logits: Tensor, rows: slice, upstream: Tensor) -> Tensor:
        """Return `tau (softmax(student / tau) - softmax(teacher / tau))`, times the upstream."""
        student, teacher = (F.softmax(each, dim=1) for each in self._scaled(logits, rows))
        return padded_to(student.sub_(teacher).mul_(upstream * self._temperature), logits)

    def _scaled(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        theirs = self._teacher(rows)
        common = min(logits.shape[1], theirs.shape[1])
        student, teacher = logits[:, :common], theirs[:, :common]
        if self._temperature == 1.0:
            return student, teacher
        return student / self._temperature, teacher / self._temperature


def padded_to(gradient: Float[Tensor, "n c"], logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Return a gradient by all logits, given that by the first of them."""
    left_out = logits.shape[1] - gradient.shape[1]
    return F.pad(gradient, (0, left_out)) if left_out else gradient
