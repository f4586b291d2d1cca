"""How an attention layer weighs keys, and the weights that follow from its queries and keys.

Axes: B batch, H query heads, K key heads, G query heads of a key head, T queries, R keys, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

_NOT_SEEN = -1e30
"""Score of a key that a query does not see: its exponential is exactly 0, and differences of it stay finite."""


@dataclass(frozen=True)
class AttentionSpec:
    """A causal softmax of scores; beyond scaled dot products only what is not None.

    Attributes
    ----------
    scaling
        What dot products of queries and keys are multiplied by.
    window
        How many tokens back a query sees, itself counted; None: all.
    cap
        Bends scores to `cap tanh(score / cap)` (Gemma 2).
    sinks
        Of each query head, a score of nothing: it takes its share in the softmax and gives no value (GPT-OSS). A constant
        here: whoever compares attention gives it no gradient.
    slopes
        Of each query head, what a score loses for each token from its key to its query (ALiBi).
    """

    scaling: float
    window: int | None = None
    cap: float | None = None
    sinks: Float[Tensor, " hq"] | None = None
    slopes: Float[Tensor, " hq"] | None = None

    def cooled(self, temperature: float) -> AttentionSpec:
        """Return the form whose scores are these divided by a temperature."""
        return replace(
            self,
            scaling=self.scaling / temperature,
            cap=None if self.cap is None else self.cap / temperature,
            sinks=None if self.sinks is None else self.sinks / temperature,
            slopes=None if self.slopes is None else self.slopes / temperature,
        )


def attention_of(
    q: Float[Tensor, "b hq t d"], k: Float[Tensor, "b hk r d"], mask: Bool[Tensor, "b r"], form: AttentionSpec
) -> Float[Tensor, "b hq t r"]:
    """Return how each query token weighs each key token; HK divides HQ. At padding it means nothing.

    The last query stands at the last key. Rows add up to 1, or to less where a sink has its share.
    """
    tokens = k.shape[2]
    hidden = ~visible(mask, slice(tokens - q.shape[2], tokens), form.window)[:, None, None]
    weights = log_attention(grouped(q, k.shape[1]), grouped(k, k.shape[1]), hidden, form)[0].exp()
    return rearrange(weights[..., : k.shape[2]], "b k g t r -> b (k g) t r")


def log_attention(
    q: Float[Tensor, "b k g t d"], k: Float[Tensor, "b k 1 r d"], hidden: Bool[Tensor, "b 1 1 t r"], form: AttentionSpec
) -> tuple[Float[Tensor, "b k g t s"], Float[Tensor, "b k g t r"] | None]:
    """Return the logarithm of attention weights, and the derivative of scores by scaled dot products where it is not 1.

    The last query stands at the last key, and a sink as one more key behind it. It works in place, for callers that do
    without autograd.
    """
    slope = None
    if form.cap is None:
        scores = torch.matmul(q * form.scaling, k.transpose(-1, -2))
    else:
        bent = torch.matmul(q * (form.scaling / form.cap), k.transpose(-1, -2)).tanh_()
        slope = 1 - bent.square()
        scores = bent.mul_(form.cap)
    if form.slopes is not None:
        places = torch.arange(k.shape[3], device=k.device, dtype=scores.dtype)
        scores -= _of_heads(form.slopes, scores) * (places[-q.shape[3] :, None] - places)
    scores.masked_fill_(hidden, _NOT_SEEN)
    if form.sinks is not None:
        scores = torch.cat((scores, _of_heads(form.sinks, scores).expand(*scores.shape[:-1], 1)), dim=-1)
    return scores.log_softmax(dim=-1), slope


def visible(mask_BT: Bool[Tensor, "b t"], queries: slice, window: int | None) -> Bool[Tensor, "b q r"]:
    """Which keys each query sees; always itself, since a row without a key would be NaN (padding is left out later)."""
    query_place = torch.arange(queries.start, queries.stop, device=mask_BT.device)[:, None]
    key_place = torch.arange(queries.stop, device=mask_BT.device)[None, :]
    seen = key_place <= query_place
    if window is not None:
        seen = seen & (key_place > query_place - window)
    return (seen & mask_BT[:, None, : queries.stop]) | (key_place == query_place)


def grouped(states: Float[Tensor, "b h t d"], num_key_heads: int) -> Float[Tensor, "b k g t d"]:
    """View heads as [B, K, G, T, D], the G query heads of each key head together; keys have G = 1."""
    return rearrange(states, "b (k g) t d -> b k g t d", k=num_key_heads)


def _of_heads(numbers_H: Tensor, scores_BKGTR: Tensor) -> Tensor:
    return numbers_H.to(scores_BKGTR).reshape(*scores_BKGTR.shape[1:3], 1, 1)
