"""How alike two representations of the same tokens are, whatever their widths: linear CKA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def cka_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Float[Tensor, "x y"]:
    """Linear centred kernel alignment of each x with each y (Kornblith et al., 2019, arXiv:1905.00414).

    `|X' Y|² / (|X' X| |Y' Y|)`, Frobenius norms, columns centred: 1 where one is the other, rotated and scaled; near 0
    where neither tells anything of the other. With fewer tokens than numbers it is too high.

    Parameters
    ----------
    xs, ys
        [N, I] and [N, O] each, of the same tokens.

    Returns
    -------
    Between 0 and 1; 0 beside what does not vary.
    """
    xs, ys = ([each.double() - each.double().mean(dim=0) for each in side] for side in (xs, ys))
    x_norms, y_norms = (torch.stack([(each.T @ each).norm() for each in side]) for side in (xs, ys))
    cross = torch.stack([torch.stack([(x.T @ y).square().sum() for y in ys]) for x in xs])
    return cross / (x_norms[:, None] * y_norms[None, :]).clamp(min=torch.finfo(cross.dtype).tiny)
