"""The losses of states, as pure functions of tensors and masks.

Each returns a `Masked`: the sum over valid tokens of a per-token loss that is already a mean over layers, heads and head
width, and how many tokens were valid. Whoever calls divides, once, by the number of valid tokens in the whole optimizer
step; so neither micro-batches nor processes nor depth change the value. A batch without a valid token gives a sum of 0
that is still attached to the graph.

Axes: B batch, L student layers, H heads, T student tokens, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


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
