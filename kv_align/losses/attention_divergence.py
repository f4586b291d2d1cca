"""The attention part of the structural loss: how far the student's attention is from the target's, in linear memory.

On a GPU attention kernels do it (`kv_align.losses.attention_kernels`), where they know all that the attention is. Elsewhere
attention matrices are made for some queries of one layer at a time and dropped again. The gradient of the divergence with
respect to both score matrices is known in closed form, so it is taken there and then, while they are at hand, and only its
products with queries and keys (linear in T) are kept for backward: nothing is computed twice.

Axes: B batch, L layers, H query heads, K key heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kv_align.losses.attention_kernels import divergence_by_kernel, kernel_for
from kv_align.losses.functional import Masked
from kv_align.models.capture.attention import AttentionSpec, grouped, log_attention, visible


def attention_divergence(
    student_q: Float[Tensor, "b l hq t d"],
    student_k: Float[Tensor, "b l hk t d"],
    target_q: Float[Tensor, "b l hq t d"],
    target_k: Float[Tensor, "b l hk t d"],
    mask: Bool[Tensor, "b t"],
    *,
    forms: tuple[AttentionSpec, ...],
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
    forms
        How each of the student's layers weighs keys; the target's queries and keys are weighed so too.
    temperature
        tau, which divides the scores of both.
    chunk
        Queries at a time, by the general way; None: by kernels where there are any, else so few on a CPU that their scores
        stay in its cache, and more on a GPU, where each has a price.

    Returns
    -------
    The sum over valid query tokens of the mean over layers and heads, and the number of valid tokens. It can be
    differentiated once.
    """
    cooled = tuple(form.cooled(temperature) for form in forms)
    kernel = kernel_for(student_q.device, cooled) if chunk is None else None
    if kernel is not None:
        compute: _Compute = partial(divergence_by_kernel, kernel)
    else:
        compute = partial(_in_chunks, chunk or (32 if student_q.device.type == "cpu" else 128))
    divergence: Callable[..., Tensor] = cast(Any, _Divergence).apply
    # Mixed precision would make the scores in bf16, which rounds away what nearly equal attentions differ by.
    with torch.autocast(student_q.device.type, enabled=False):
        total = divergence(student_q, student_k, target_q, target_k, mask, cooled, compute)
    return Masked(total * (temperature**2 / student_q.shape[1]), mask.sum())


_Compute = Callable[
    [Sequence[Tensor], Tensor, tuple[AttentionSpec, ...], tuple[bool, bool]], tuple[Tensor, list[Tensor | None]]
]


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
        forms: tuple[AttentionSpec, ...],
        compute: _Compute,
    ) -> Tensor:
        states = student_q, student_k, target_q, target_k
        wanted = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:4])
        total, gradients = compute(states, mask_BT, forms, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [each.dtype for each in states]
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what `forward` has kept."""
        kept = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = [None if each is None else (each * upstream[0]).to(dtype) for each, dtype in kept]
        return (*gradients, None, None, None)


def _in_chunks(
    chunk: int,
    states: Sequence[Tensor],
    mask_BT: Tensor,
    forms: tuple[AttentionSpec, ...],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the sum, and its gradients by the states of those that want them, some queries of a layer at a time."""
    student_q, student_k = states[:2]
    seen = mask_BT[:, None, :, None]
    dtype = torch.promote_types(student_q.dtype, torch.float32)
    gradients = [
        torch.empty_like(each, dtype=dtype) if wanted[place // 2] else None for place, each in enumerate(states)
    ]
    total = torch.zeros((), dtype=dtype, device=student_q.device)
    length = student_q.shape[3]
    for layer, form in enumerate(forms):
        # A product with what stands at padding would carry its infinities to its neighbours.
        known = (torch.where(seen, each[:, layer], 0.0).to(dtype) for each in states)
        of_layer = [grouped(each, student_k.shape[2]) for each in known]
        by_layer = [None if each is None else grouped(each[:, layer], student_k.shape[2]) for each in gradients]
        for by_k in (by_layer[1], by_layer[3]):
            if by_k is not None:
                by_k.zero_()  # every chunk adds to it; of queries, each has its own
        for start in range(0, length, chunk):
            total += _chunk(of_layer, by_layer, mask_BT, slice(start, min(start + chunk, length)), form)
    return total, gradients


def _chunk(
    states: list[Tensor],
    gradients: list[Tensor | None],
    mask_BT: Tensor,
    queries: slice,
    form: AttentionSpec,
) -> Tensor:
    """Return the divergence of one layer's queries, and put its gradients in place."""
    student_q, student_k, target_q, target_k = states
    keys = slice(0, queries.stop)
    hidden = ~visible(mask_BT, queries, form.window)[:, None, None]
    student_log, student_slope = log_attention(student_q[:, :, :, queries], student_k[:, :, :, keys], hidden, form)
    target_log, target_slope = log_attention(target_q[:, :, :, queries], target_k[:, :, :, keys], hidden, form)
    target = target_log.exp()
    difference = target_log.sub_(student_log)
    per_query = (target * difference).sum(dim=-1, keepdim=True)
    # A product with the mask: states at padding are zeros by now, and a query always sees itself.
    weight = mask_BT[:, None, None, queries, None].to(target.dtype) / (student_q.shape[1] * student_q.shape[2])
    total = (per_query * weight).sum()
    weight = weight * form.scaling
    if gradients[0] is not None:
        by_score = student_log.exp_().sub_(target)
        _accumulate(gradients[:2], by_score, student_slope, weight, student_q, student_k, queries)
    if gradients[2] is not None:
        by_score = difference.sub_(per_query).mul_(target)
        _accumulate(gradients[2:], by_score, target_slope, weight, target_q, target_k, queries)
    return total


def _accumulate(
    gradients: list[Tensor | None],
    by_score: Tensor,
    slope: Tensor | None,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
    queries: slice,
) -> None:
    """Set what a gradient by scores means for its queries, and add what it means for keys."""
    by_q, by_k = gradients
    assert by_q is not None
    assert by_k is not None
    by_score = by_score[..., : queries.stop]  # a sink, which stands behind the keys, learns nothing
    if slope is not None:
        by_score = by_score.mul_(slope)
    # A query's weight is the same for all keys: on the narrow side of the products it costs next to nothing.
    torch.mul(torch.matmul(by_score, k[:, :, :, : queries.stop]), weight, out=by_q[:, :, :, queries])
    by_group = torch.matmul(by_score.transpose(-1, -2), q[:, :, :, queries] * weight)
    by_k[:, :, :, : queries.stop] += by_group.sum(dim=2, keepdim=True)
