"""The losses, as pure functions of tensors and masks.

Each returns a `Masked`: the sum over valid tokens of a per-token loss that is already a mean over layers, heads and head
width, and how many tokens were valid. Whoever calls divides, once, by the number of valid tokens in the whole optimizer
step; so neither micro-batches nor processes nor depth change the value. A batch without a valid token gives a sum of 0
that is still attached to the graph.

Axes: B batch, L student layers, H heads, T student tokens, D head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 2**21
"""Logits whose softmax is held at once."""


class Masked(NamedTuple):
    """A sum over valid tokens, and their number."""

    total: Float[Tensor, ""]
    tokens: Int[Tensor, ""]


def token_losses(
    logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], scored: Bool[Tensor, "b t"]
) -> Float[Tensor, "b t-1"]:
    """Cross-entropy in nats of each token after the first, 0 where it is not scored."""
    labels = ids.masked_fill(~scored, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="none")


def _over_tokens(per_token_BT: Tensor, mask_BT: Tensor) -> Masked:
    # where, not a product: what stands at padding may be infinite or NaN.
    return Masked(torch.where(mask_BT, per_token_BT, 0.0).sum(), mask_BT.sum())


def _without_padding(states_BLHTD: Tensor, mask_BT: Tensor) -> Tensor:
    # A NaN that is masked in the result alone still makes the gradient NaN.
    return torch.where(mask_BT[:, None, None, :, None], states_BLHTD, 0.0)


def scaled_mse(
    student: Float[Tensor, "b l h t d"],
    target: Float[Tensor, "b l h t d"],
    mask: Bool[Tensor, "b t"],
    variance: Float[Tensor, " l"],
) -> Masked:
    """Squared difference over a fixed variance per layer.

    Parameters
    ----------
    student, target
        Keys or values, of the student and projected from the teacher.
    mask
        True at tokens that count.
    variance
        Of the teacher's raw keys or values at each student layer's teacher layer; the same in all arms, so that keys,
        which are larger than values, and deep layers, which are larger than shallow ones, weigh alike.
    """
    difference = _without_padding(student.float() - target.float(), mask)
    per_layer = difference.square().mean(dim=(2, 4)) / variance[:, None]
    return _over_tokens(per_layer.mean(dim=1), mask)


def cosine_distance(
    student: Float[Tensor, "b l h t d"], target: Float[Tensor, "b l h t d"], mask: Bool[Tensor, "b t"]
) -> Masked:
    """1 - cosine between student and target vectors of each head; blind to magnitude."""
    student, target = _without_padding(student.float(), mask), _without_padding(target.float(), mask)
    cosine = F.cosine_similarity(student, target, dim=-1)
    return _over_tokens(1 - cosine.mean(dim=(1, 2)), mask)


def causal_cross_entropy(
    logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], scored: Bool[Tensor, "b t"]
) -> Masked:
    """Cross-entropy of each scored token under the logits of the token before it, in nats.

    Parameters
    ----------
    logits, ids
        Of the same tokens; the shift by one happens here.
    scored
        True at tokens whose prediction counts; the first token of a row has none and must be False.
    """
    predicts = scored[:, 1:]
    total: Tensor = cast(Any, _CrossEntropy).apply(logits.flatten(0, 1), predicting(scored), ids[:, 1:][predicts])
    return Masked(total, predicts.sum())


def predicting(scored: Bool[Tensor, "b t"]) -> Int[Tensor, " n"]:
    """Places, among the rows of a whole batch's logits, of those that predict a scored token: of the tokens before them."""
    return F.pad(scored[:, 1:], (0, 1)).flatten().nonzero().squeeze(1)


class _CrossEntropy(torch.autograd.Function):
    """Sum over chosen rows of the cross-entropy, some rows at a time.

    Logits are the largest tensor of a step. The gradient is known in closed form, so it is taken while a few rows' softmax
    is at hand, and nothing else of the logits' size is made.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, places: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        # Selected, not masked: a logit that is not finite would make the gradient NaN even where nothing is scored.
        gradient_NV = torch.zeros_like(logits_NV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits_NV.device)
        rows = max(1, AT_ONCE // logits_NV.shape[1])
        for some, wanted in zip(torch.split(places, rows), torch.split(labels[:, None], rows), strict=True):
            log_softmax = F.log_softmax(logits_NV[some].float(), dim=1)
            total -= log_softmax.gather(1, wanted).sum()
            if gradient_NV is not None:
                by_logits = log_softmax.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float))
                gradient_NV.index_copy_(0, some, by_logits.to(gradient_NV.dtype))
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what `forward` has kept, in place: a second backward through the same graph is an error."""
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(upstream[0]), None, None


def logit_divergence(
    student: Float[Tensor, "b t vs"], teacher: Float[Tensor, "b t vt"], scored: Bool[Tensor, "b t"], temperature: float
) -> Masked:
    """tau² KL(teacher || student) of the predictions of each scored token (Hinton et al., 2015, arXiv:1503.02531).

    Parameters
    ----------
    student, teacher
        Logits over one vocabulary; where one is padded further than the other, the common part is compared.
    scored
        As in `causal_cross_entropy`.
    temperature
        tau, which divides both logits.
    """
    vocabulary = min(student.shape[-1], teacher.shape[-1])
    predicts = scored[:, 1:]
    student_log = F.log_softmax(student[:, :-1][predicts][:, :vocabulary].float() / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher[:, :-1][predicts][:, :vocabulary].float() / temperature, dim=-1)
    total = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True) * temperature**2
    return Masked(total, predicts.sum())
