"""`init=procrustes`: the rotation of the teacher's heads that is nearest to the student's."""

from __future__ import annotations

import torch

from kv_align.align.head_map import HeadInit, InitContext
from kv_align.align.init.fixed import shares
from kv_align.align.paired_states import Calibration


def procrustes(given: InitContext, calibration: Calibration) -> HeadInit:
    """Width map that turns the uniform head mix onto the student's states: orthogonal Procrustes (Schönemann, 1966).

    Sets the width map; the mix is that of `uniform`. With X the mixed teacher heads and Y the student's, of all student
    heads that share the map, and X' Y = P S Q', it is P Q': of all matrices with orthonormal rows or columns (the fewer)
    the one whose image has the largest inner product with Y, for equal widths also the nearest. States are not centred
    and nothing is scaled, since the map can do neither. Fitted to both models' states before training: with an untrained
    student, to noise.
    """
    teacher_NHD, student_NGE = calibration.of(given.kind).pooled()
    mix = shares(given.shape.student_heads, given.shape.teacher_heads)
    mixed_NGD = torch.einsum("gh,nhd->ngd", mix.to(teacher_NHD), teacher_NHD)
    products_GDE = torch.einsum("ngd,nge->gde", mixed_NGD, student_NGE)
    if len(given.width) == 1:
        products_GDE = products_GDE.sum(dim=0, keepdim=True)
    left, _, right = torch.linalg.svd(products_GDE, full_matrices=False)
    return HeadInit(mix, (left @ right).to(given.width))
