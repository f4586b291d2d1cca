"""The attention operators that a GPU has, made for a CPU: by their own names and signatures, with whole matrices.

So what calls them is tested to the digits, and counted, where there is no GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

_CAUSAL = 1
_ROWS = 32
"""The logsumexp's length is a multiple of it."""


@contextmanager
def efficient_attention_on_cpu() -> Iterator[None]:
    """Context in which the memory-efficient attention takes tensors of a CPU, in any precision."""
    library = Library("aten", "IMPL")
    try:
        library.impl("_efficient_attention_forward", _forward, "CPU")
        library.impl("_efficient_attention_backward", _backward, "CPU")
        yield
    finally:
        library._destroy()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    max_seqlen_q: None,
    max_seqlen_k: None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    assert dropout_p == 0.0
    assert custom_mask_type == _CAUSAL
    assert compute_log_sumexp
    output, logsumexp = _attend(query, key, value, bias, **options)
    length = query.shape[1]
    # What stands behind the last query is not defined.
    padded = torch.nn.functional.pad(logsumexp, (0, -length % _ROWS), value=torch.nan)
    none = torch.empty((), dtype=torch.int64)
    return output.contiguous(), padded, none, none.clone(), length, length


def _backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    out: Tensor,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dropout_p == 0.0
    assert custom_mask_type == _CAUSAL
    assert not bias_requires_grad
    assert max_seqlen_q == max_seqlen_k == query.shape[1]
    scores = _scores(query, key, bias, **options)
    weights = (scores - logsumexp[..., : query.shape[1], None]).exp()
    by_output, q, k, v, output = (each.transpose(1, 2) for each in (grad_out_, query, key, value, out))
    by_value = weights.mT @ by_output
    own = (by_output * output).sum(dim=-1, keepdim=True)
    by_scores = weights * (by_output @ v.mT - own) * options["scale"]
    gradients = (by_scores @ k, by_scores.mT @ q, by_value)
    by_q, by_k, by_v = (each.transpose(1, 2).contiguous() for each in gradients)
    return by_q, by_k, by_v, torch.empty(0)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, bias, **options)
    return (scores.softmax(dim=-1) @ value.transpose(1, 2)).transpose(1, 2), scores.logsumexp(dim=-1)


def _scores(query: Tensor, key: Tensor, bias: Tensor, *, scale: float, window_size: int | None = None) -> Tensor:
    """Of all queries and keys, [N, H, T, T]; what the kernel wants of its inputs' strides holds."""
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    places = torch.arange(q.shape[2])
    distance = places[:, None] - places
    hidden = (distance < 0) | (distance >= (window_size or len(places)))
    assert query.stride(-1) == key.stride(-1) == bias.stride(-1) == 1
    assert bias.shape == (*q.shape[:3], k.shape[2])
    assert all(bias.stride(axis) % 16 == 0 for axis in range(3) if bias.shape[axis] > 1)
    return (scale * q @ k.mT + bias).masked_fill(hidden, -torch.inf)
