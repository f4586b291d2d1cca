"""Distillation of a teacher's likeliest tokens: its k most likely ones and one bucket of all others.

Both distributions are coarse-grained alike, so what is compared are two distributions of k + 1 outcomes: their divergence
is never above that of the whole ones (the log-sum inequality), and equal to it where k is the whole vocabulary. Of the
teacher 2 k + 1 numbers per token are needed instead of the vocabulary.

Axes: N rows, V vocabulary, K tokens that are told apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from kv_align.config.signals import TopLogits
from kv_align.losses.predictions.linear_head import Predictions, RowLoss, slices
from kv_align.losses.predictions.next_token import padded_to


class TopPredictions(NamedTuple):
    """The coarse-grained distribution of each next token.

    Attributes
    ----------
    log_probabilities
        In nats, of the k most likely tokens, the likeliest first, and in the last place of all others together (-inf where
        there are none). Logarithms of probabilities rather than logits: what rounding does to those that matter is small.
    indices
        Which tokens these are.
    """

    log_probabilities: Float[Tensor, "*b k1"]
    indices: Int[Tensor, "*b k"]

    def at(self, places: Int[Tensor, " n"]) -> TopPredictions:
        """Return those at some places, among all tokens of a batch in a row."""
        return TopPredictions(*(each.flatten(0, -2).index_select(0, places) for each in self))


@torch.no_grad()
def top_predictions(predictions: Predictions, wanted: TopLogits) -> TopPredictions:
    """Coarse-grain predictions, [N, K + 1] and [N, K], some rows at a time."""
    rows_of, states = predictions.logits_by_rows(), predictions.states
    count = states.shape[0]
    logs_NK = torch.empty(count, wanted.k + 1, device=states.device)
    indices_NK = torch.empty(count, wanted.k, dtype=torch.int64, device=states.device)
    for rows in slices(predictions):
        logs = F.log_softmax(rows_of(rows)[:, : wanted.vocabulary] / wanted.temperature, dim=1)
        likeliest, indices_NK[rows] = logs.topk(wanted.k, dim=1)
        others = logs.scatter_(1, indices_NK[rows], -math.inf).logsumexp(dim=1, keepdim=True)
        logs_NK[rows] = torch.cat((likeliest, others), dim=1)
    return TopPredictions(logs_NK, indices_NK)


class TopDivergence(RowLoss):
    """tau² KL(teacher || student) of the coarse-grained predictions.

    With q the teacher's and p the student's probabilities, it has by the student's scaled logit of token j the derivative
    p_j - q_j where j is told apart, and p_j - q_others p_j / p_others elsewhere.

    Parameters
    ----------
    teacher
        What `top_predictions` gives at the same places; logarithms that were rounded are normalised anew.
    wanted
        What the teacher was asked for.
    """

    def __init__(self, teacher: TopPredictions, wanted: TopLogits) -> None:
        self._theirs, self._indices = F.log_softmax(teacher.log_probabilities.float(), dim=1), teacher.indices
        self._wanted = wanted

    def values(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the divergences."""
        logs, others = self._logs(logits, rows)
        ours = torch.cat((logs.gather(1, self._indices[rows]), others.logsumexp(dim=1, keepdim=True)), dim=1)
        theirs = self._theirs[rows]
        # What the teacher finds impossible adds nothing, also where it is so for the student: -inf less -inf.
        probabilities = theirs.exp()
        shares = torch.where(probabilities > 0, probabilities * (theirs - ours), 0.0)
        return shares.sum(dim=1) * self._wanted.temperature**2

    def gradient(self, logits: Tensor, rows: slice, upstream: Tensor) -> Tensor:
        """Return the derivatives, times the upstream."""
        logs, others = self._logs(logits, rows)
        probabilities = self._theirs[rows].exp().to(logs.dtype)
        # Where no other token is left this is NaN, and all of it is written over.
        target = others.sub_(others.logsumexp(dim=1, keepdim=True)).exp_().mul_(probabilities[:, -1:])
        target.scatter_(1, self._indices[rows], probabilities[:, :-1])
        return padded_to(logs.exp_().sub_(target).mul_(upstream * self._wanted.temperature), logits)

    def _logs(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Of all tokens, and of those that are not told apart (the others -inf)."""
        logs = F.log_softmax(logits[:, : self._wanted.vocabulary] / self._wanted.temperature, dim=1)
        return logs, logs.scatter(1, self._indices[rows], -math.inf)
