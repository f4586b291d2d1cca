"""The attention part of the structural loss: how far the student's attention is from the target's, in linear memory.

Attention matrices are made for some queries of one layer at a time and dropped again. The gradient of the divergence with
respect to both score matrices is known in closed form, so it is taken there and then, while they are at hand, and only its
products with queries and keys (linear in T) are kept for backward: nothing is computed twice.

Axes: B batch, L layers, H query heads, K key heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from kv_align.losses import Masked

_NOT_SEEN = -1e30
"""Score of a key that a query does not see: its exponential is exactly 0, and differences of it stay finite."""


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
    chunk: int | None = None,
) -> Masked:
    """tau² KL(target attention || student attention) of each query token, causal and padding-aware.

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
        Queries at a time; None: so few on a CPU that their scores stay in its cache, more on a GPU, where each has a price.

    Returns
    -------
    The sum over valid query tokens of the mean over layers and heads, and the number of valid tokens. It can be
    differentiated once.
    """
    if chunk is None:
        chunk = 32 if student_q.device.type == "cpu" else 128
    scales = tuple(each / temperature for each in scaling)
    divergence: Callable[..., Tensor] = cast(Any, _Divergence).apply
    # Mixed precision would make the scores in bf16, which rounds away what nearly equal attentions differ by.
    with torch.autocast(student_q.device.type, enabled=False):
        total = divergence(student_q, student_k, target_q, target_k, mask, scales, windows, chunk)
    return Masked(total * (temperature**2 / student_q.shape[1]), mask.sum())


def attention_of(
    q: Float[Tensor, "b hq t d"],
    k: Float[Tensor, "b hk t d"],
    mask: Bool[Tensor, "b t"],
    scaling: float,
    window: int | None,
) -> Float[Tensor, "b hq t t"]:
    """Return the attention of one layer that `attention_divergence` compares: how each query token weighs each key token.

    At padding it means nothing.
    """
    hidden = ~_visible(mask, slice(0, q.shape[2]), window)[:, None, None]
    weights = _log_attention(_grouped(q, k.shape[1]), _grouped(k, k.shape[1]), hidden, scaling).exp()
    return rearrange(weights, "b k g t r -> b (k g) t r")


class _Divergence(torch.autograd.Function):
    """Sum over layers and valid queries of the mean over heads of KL(target || student)."""

    @staticmethod
    def forward(
        ctx: Any,
        student_q: Tensor,
        student_k: Tensor,
        target_q: Tensor,
        target_k: Tensor,
        mask_BT: Tensor,
        scales: tuple[float, ...],
        windows: tuple[int | None, ...],
        chunk: int,
    ) -> Tensor:
        # A product with what stands at padding would carry its infinities to its neighbours.
        states = tuple(
            torch.where(mask_BT[:, None, None, :, None], each, 0.0)
            for each in (student_q, student_k, target_q, target_k)
        )
        dtype = torch.promote_types(student_q.dtype, torch.float32)
        wants_student, wants_target = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:4])
        wanted = (wants_student, wants_student, wants_target, wants_target)
        gradients = [
            torch.zeros_like(each, dtype=dtype) if want else None for each, want in zip(states, wanted, strict=True)
        ]
        total = torch.zeros((), dtype=dtype, device=student_q.device)
        length = student_q.shape[3]
        for layer, (scale, window) in enumerate(zip(scales, windows, strict=True)):
            here = [_grouped(each[:, layer].to(dtype), student_k.shape[2]) for each in states]
            there = [None if each is None else _grouped(each[:, layer], student_k.shape[2]) for each in gradients]
            for start in range(0, length, chunk):
                total += _chunk(here, there, mask_BT, slice(start, min(start + chunk, length)), scale, window)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [each.dtype for each in states]
        return total.to(dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what `forward` has kept."""
        kept = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = [None if each is None else (each * upstream[0]).to(dtype) for each, dtype in kept]
        return (*gradients, None, None, None, None)


def _chunk(
    states: list[Tensor],
    gradients: list[Tensor | None],
    mask_BT: Tensor,
    queries: slice,
    scale: float,
    window: int | None,
) -> Tensor:
    """Return the divergence of one layer's queries, and add its gradients in place."""
    student_q, student_k, target_q, target_k = states
    keys = slice(0, queries.stop)
    hidden = ~_visible(mask_BT, queries, window)[:, None, None]
    student_log = _log_attention(student_q[:, :, :, queries], student_k[:, :, :, keys], hidden, scale)
    target_log = _log_attention(target_q[:, :, :, queries], target_k[:, :, :, keys], hidden, scale)
    target = target_log.exp()
    difference = target_log.sub_(student_log)
    per_query = (target * difference).sum(dim=-1, keepdim=True)
    # A product with the mask: states at padding are zeros by now, and a query always sees itself.
    weight = mask_BT[:, None, None, queries, None].to(target.dtype) / (student_q.shape[1] * student_q.shape[2])
    total = (per_query * weight).sum()
    if gradients[0] is not None:
        _accumulate(gradients[:2], student_log.exp_().sub_(target), weight * scale, student_q, student_k, queries)
    if gradients[2] is not None:
        _accumulate(gradients[2:], difference.sub_(per_query).mul_(target), weight * scale, target_q, target_k, queries)
    return total


def _visible(mask_BT: Tensor, queries: slice, window: int | None) -> Tensor:
    """Which keys each query sees; always itself, since a row without a key would be NaN (padding is left out later)."""
    query_place = torch.arange(queries.start, queries.stop, device=mask_BT.device)[:, None]
    key_place = torch.arange(queries.stop, device=mask_BT.device)[None, :]
    seen = key_place <= query_place
    if window is not None:
        seen = seen & (key_place > query_place - window)
    return (seen & mask_BT[:, None, : queries.stop]) | (key_place == query_place)


def _log_attention(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    return scores.masked_fill_(hidden, _NOT_SEEN).log_softmax(dim=-1)


def _accumulate(
    gradients: list[Tensor | None], by_score: Tensor, weight: Tensor, q: Tensor, k: Tensor, queries: slice
) -> None:
    """Add what a gradient by scores means for queries and keys."""
    by_q, by_k = gradients
    assert by_q is not None
    assert by_k is not None
    # A query's weight is the same for all keys: on the narrow side of the products it costs next to nothing.
    by_q[:, :, :, queries] += torch.matmul(by_score, k[:, :, :, : queries.stop]) * weight
    by_group = torch.matmul(by_score.transpose(-1, -2), q[:, :, :, queries] * weight)
    by_k[:, :, :, : queries.stop] += by_group.sum(dim=2, keepdim=True)


def _grouped(states_BHTD: Tensor, num_key_heads: int) -> Tensor:
    """View heads as [B, K, G, T, D], the G query heads of each key head together; keys have G = 1."""
    return rearrange(states_BHTD, "b (k g) t d -> b k g t d", k=num_key_heads)
