"""`init=orthogonal`: random mixing that loses nothing."""

from __future__ import annotations

import torch

from kv_align.align.head_map import HeadInit, InitContext
from kv_align.align.structured import orthogonal as draw_orthogonal


def orthogonal(given: InitContext) -> HeadInit:
    """Random mixing weights whose rows are orthonormal.

    Sets the head mix alone. With more student than teacher heads, rows are orthonormal in blocks of H_t, each block drawn
    anew; so every student head has a mix of norm 1. It reads no states.
    """
    shape, rows = given.shape, []
    for start in range(0, shape.student_heads, shape.teacher_heads):
        count = min(shape.teacher_heads, shape.student_heads - start)
        rows.append(draw_orthogonal(count, shape.teacher_heads, given.generator))
    return HeadInit(torch.cat(rows), given.width)
