"""The losses, as pure functions of tensors and masks.

Each returns a `Masked`: the sum over valid tokens of a per-token loss that is already a mean over layers, heads and head
width, and how many tokens were valid. Whoever calls divides, once, by the number of valid tokens in the whole optimizer
step; so neither micro-batches nor processes nor depth change the value. A batch without a valid token gives a sum of 0
that is still attached to the graph.

Axes: B batch, L student layers, H heads, T student tokens, D head width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Masked(NamedTuple):
    """A sum over valid tokens, and their number."""

    total: Float[Tensor, ""]
    tokens: Int[Tensor, ""]


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
    labels = ids.masked_fill(~scored, -100)[:, 1:]
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return Masked(total, scored[:, 1:].sum())


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


def attention_divergence(
    student_q: Float[Tensor, "b l hq t d"],
    student_k: Float[Tensor, "b l hk t d"],
    target_q: Float[Tensor, "b l hq t d"],
    target_k: Float[Tensor, "b l hk t d"],
    mask: Bool[Tensor, "b t"],
    *,
    scaling: tuple[float, ...],
    windows: tuple[int | None, ...],
    temperature: float,
    chunk: int = 128,
) -> Masked:
    """tau² KL(target attention || student attention) of each query token, causal and padding-aware.

    The attention matrices are made for `chunk` queries of one layer at a time and again in backward, so the memory is
    linear in T.

    Parameters
    ----------
    student_q, student_k, target_q, target_k
        Rotated at the student's positions where the student has a rotary embedding; HK divides HQ.
    mask
        True at tokens that count, as query and as key.
    scaling, windows
        Of each layer: what the dot products are multiplied by, and how many tokens back a query sees (None: all).
    temperature
        tau, which divides the scaled dot products of both.
    chunk
        Queries at a time.
    """
    num_layers, length = student_q.shape[1], student_q.shape[3]
    total = student_q.new_zeros((), dtype=torch.float32)
    for layer in range(num_layers):
        states = [part[:, layer] for part in (student_q, student_k, target_q, target_k)]
        for start in range(0, length, chunk):
            total = total + checkpoint(
                _attention_chunk,
                *states,
                mask,
                start,
                min(start + chunk, length),
                scaling[layer] / temperature,
                windows[layer],
                use_reentrant=False,
            )
    return Masked(total * (temperature**2 / num_layers), mask.sum())


def _attention_chunk(
    student_q: Tensor,
    student_k: Tensor,
    target_q: Tensor,
    target_k: Tensor,
    mask_BT: Tensor,
    start: int,
    end: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Sum over the queries start..end of one layer of the mean over heads of KL(target || student)."""
    query_place = torch.arange(start, end, device=mask_BT.device)[:, None]
    key_place = torch.arange(end, device=mask_BT.device)[None, :]
    visible = key_place <= query_place
    if window is not None:
        visible = visible & (key_place > query_place - window)
    # A query always sees itself: a row without any key would be NaN, and is masked out below if it is padding.
    allowed_BQK = (visible & mask_BT[:, None, :end]) | (key_place == query_place)

    def without_padding(states_BHTD: Tensor, begin: int) -> Tensor:
        return torch.where(mask_BT[:, None, begin:end, None], states_BHTD[:, :, begin:end], 0.0)

    student_log = _log_attention(without_padding(student_q, start), without_padding(student_k, 0), allowed_BQK, scale)
    target_log = _log_attention(without_padding(target_q, start), without_padding(target_k, 0), allowed_BQK, scale)
    # Where nothing is allowed both logs are -inf, and their difference is NaN: 0 there.
    difference = torch.where(allowed_BQK[:, None], target_log - student_log, 0.0)
    per_query_BQ = (target_log.exp() * difference).sum(dim=-1).mean(dim=1)
    return torch.where(mask_BT[:, start:end], per_query_BQ, 0.0).sum()


def _log_attention(q: Tensor, k: Tensor, allowed_BQK: Tensor, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = (
        torch.einsum(
            "bhgqd,bhkd->bhgqk", rearrange(q.float(), "b (h g) q d -> b h g q d", g=groups), k.float()
        ).flatten(1, 2)
        * scale
    )
    return scores.masked_fill(~allowed_BQK[:, None], -torch.inf).log_softmax(dim=-1)
