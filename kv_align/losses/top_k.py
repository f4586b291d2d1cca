"""Distillation of a teacher's likeliest tokens: its k most likely ones and one bucket of all others.

Both distributions are coarse-grained alike, so what is compared are two distributions of k + 1 outcomes: their divergence
is never above that of the whole ones (the log-sum inequality), and equal to it where k is the whole vocabulary. Of the
teacher 2 k + 1 numbers per token are needed instead of the vocabulary.

Axes: B batch, T tokens, V vocabulary, N rows (all tokens of a batch), n scored rows, K tokens that are told apart.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kv_align.config.signals import TopLogits
from kv_align.losses.functional import AT_ONCE, Masked, predicting


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

    log_probabilities: Float[Tensor, "b t k1"]
    indices: Int[Tensor, "b t k"]


@torch.no_grad()
def top_predictions(logits: Float[Tensor, "b t v"], wanted: TopLogits) -> TopPredictions:
    """Coarse-grain the teacher's predictions, some rows at a time."""
    rows_NV = logits.flatten(0, 1)[:, : wanted.vocabulary]
    found, places = [], []
    for some in torch.split(rows_NV, max(1, AT_ONCE // wanted.vocabulary)):
        logs = F.log_softmax(some.float() / wanted.temperature, dim=1)
        likeliest, indices = logs.topk(wanted.k, dim=1)
        others = logs.scatter_(1, indices, -math.inf).logsumexp(dim=1, keepdim=True)
        found.append(torch.cat((likeliest, others), dim=1))
        places.append(indices)
    return TopPredictions(*(torch.cat(each).view(*logits.shape[:2], -1) for each in (found, places)))


def top_divergence(
    student: Float[Tensor, "b t vs"], teacher: TopPredictions, scored: Bool[Tensor, "b t"], wanted: TopLogits
) -> Masked:
    """tau² KL(teacher || student) of the coarse-grained predictions of each scored token.

    Parameters
    ----------
    student
        Logits.
    teacher
        What `top_predictions` gives of the same tokens; logarithms that were rounded are normalised anew.
    scored
        As in `kv_align.losses.functional.causal_cross_entropy`.
    wanted
        What the teacher was asked for.
    """
    places = predicting(scored)
    chosen = (each.flatten(0, 1)[places] for each in teacher)
    total: Tensor = cast(Any, _TopDivergence).apply(student.flatten(0, 1), places, *chosen, wanted)
    return Masked(total, scored[:, 1:].sum())


class _TopDivergence(torch.autograd.Function):
    """The sum over chosen rows, some rows at a time, with the gradient in closed form (as `_CrossEntropy` in `losses`).

    With q the teacher's and p the student's probabilities, KL has by the student's scaled logit of token j the derivative
    p_j - q_j where j is told apart, and p_j - q_others p_j / p_others elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        places: Int[Tensor, " n"],
        teacher_nK: Tensor,
        indices_nK: Tensor,
        wanted: TopLogits,
    ) -> Float[Tensor, ""]:
        gradient_NV = torch.zeros_like(logits_NV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits_NV.device)
        rows = max(1, AT_ONCE // wanted.vocabulary)
        chunks = (torch.split(each, rows) for each in (places, teacher_nK, indices_nK))
        for some, teacher, indices in zip(*chunks, strict=True):
            logs = F.log_softmax(logits_NV[some][:, : wanted.vocabulary].float() / wanted.temperature, dim=1)
            others = logs.scatter(1, indices, -math.inf)
            of_others = others.logsumexp(dim=1, keepdim=True)
            ours = torch.cat((logs.gather(1, indices), of_others), dim=1)
            theirs = F.log_softmax(teacher.float(), dim=1)
            # What the teacher finds impossible adds nothing, also where it is so for the student: -inf less -inf.
            probabilities = theirs.exp()
            total += torch.where(probabilities > 0, probabilities * (theirs - ours), 0.0).sum()
            if gradient_NV is not None:
                # Where no other token is left this is NaN, and all of it is written over.
                target = others.sub_(of_others).exp_().mul_(probabilities[:, -1:])
                target.scatter_(1, indices, probabilities[:, :-1])
                by_logits = logs.exp_().sub_(target).mul_(wanted.temperature)
                gradient_NV[some, : wanted.vocabulary] = by_logits.to(gradient_NV.dtype)
        ctx.save_for_backward(gradient_NV)
        return total * wanted.temperature**2

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what `forward` has kept, in place: a second backward through the same graph is an error."""
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(upstream[0]), None, None, None, None
