"""`init=least_squares`: the structured map that predicts the student's states best."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kv_align.align.head_map import HeadInit, InitContext
from kv_align.align.init.fixed import shares
from kv_align.align.paired_states import Calibration
from kv_align.config.options import NonNegativeFloat

_SWEEPS = 20


def least_squares(given: InitContext, calibration: Calibration, *, ridge: NonNegativeFloat) -> HeadInit:
    """Head mix and width map with the least squared error between projected teacher and student.

    Sets mix and width map. In closed form: ridge regression of the student's states on all of the teacher's heads, and of
    its coefficients the nearest product of a mix and a width map (Van Loan and Pitsianis, 1993). Where the relation is
    such a product, that is it. Where it is not, mix and width map are then solved for in turn, each with the other held,
    since the nearest coefficients do not make the nearest predictions. The mix is scaled to the norm of `uniform`'s, the
    width map carries the rest. Without intercept, since the map has none. Fitted to both models' states before training:
    with an untrained student, to noise, and the target then starts near zero.

    Parameters
    ----------
    given, calibration
        What is mapped, and both models' states.
    ridge
        Penalty on squared coefficients, in units of the mean eigenvalue of the teacher's second moment.
    """
    teacher_NHD, student_NGE = calibration.of(given.kind).pooled()
    shape = given.shape
    dense = _solve(rearrange(teacher_NHD, "n h d -> n (h d)"), rearrange(student_NGE, "n g e -> n (g e)"), ridge)
    dense_GHDE = rearrange(dense, "(h d) (g e) -> g h d e", h=shape.teacher_heads, g=shape.student_heads)
    heads = [slice(None)] if len(given.width) == 1 else [slice(g, g + 1) for g in range(shape.student_heads)]
    mixes, widths = [], []
    for each in heads:  # those that share a width map
        mix, width = _nearest_product(dense_GHDE[each])
        for _ in range(_SWEEPS):
            mix, width = _improved(teacher_NHD, student_NGE[:, each], mix, width, ridge)
        scale = shares(shape.student_heads, shape.teacher_heads)[each].norm().to(mix) / mix.norm().clamp(min=1e-30)
        mixes.append(mix * scale)
        widths.append(width / scale)
    return HeadInit(torch.cat(mixes).to(given.width), torch.stack(widths).to(given.width))


def _nearest_product(dense_GHDE: Float[Tensor, "g h d e"]) -> tuple[Float[Tensor, "g h"], Float[Tensor, "d e"]]:
    """Nearest `mix[g, h] width[d, e]`: the first singular pair, once (g, h) and (d, e) are rows and columns."""
    left, values, right = torch.linalg.svd(rearrange(dense_GHDE, "g h d e -> (g h) (d e)"), full_matrices=False)
    mix = rearrange(left[:, 0] * values[0], "(g h) -> g h", g=len(dense_GHDE))
    return mix, right[0].reshape(dense_GHDE.shape[2:])


def _improved(
    teacher_NHD: Tensor, student_NGE: Tensor, mix_GH: Tensor, width_DE: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Solve for the width map with the mix held, then for the mix with the width map held."""
    mixed = torch.einsum("gh,nhd->ngd", mix_GH, teacher_NHD)
    width = _solve(rearrange(mixed, "n g d -> (n g) d"), rearrange(student_NGE, "n g e -> (n g) e"), ridge)
    projected = torch.einsum("nhd,de->nhe", teacher_NHD, width)
    mix = _solve(rearrange(projected, "n h e -> (n e) h"), rearrange(student_NGE, "n g e -> (n e) g"), ridge)
    return mix.T, width


def _solve(x: Float[Tensor, "n i"], y: Float[Tensor, "n o"], ridge: float) -> Float[Tensor, "i o"]:
    second = x.T @ x
    # Never quite zero: what the teacher leaves empty must not make the system singular.
    penalty = max(ridge, 1e-12) * second.diagonal().mean().clamp(min=1e-30)
    solved: Tensor = torch.linalg.solve(second + penalty * torch.eye(len(second)).to(second), x.T @ y)
    return solved
