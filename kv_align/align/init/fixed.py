"""How a structured map starts, for inits that look at nothing: `(given) -> (mix, width)`.

These two set the head mix alone: the width map is the seeded orthogonal matrix that they are given. The other inits are
in files of their own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kv_align.align.head_map import HeadInit, InitContext


def uniform(given: InitContext) -> HeadInit:
    """Each student head starts as the mean of its share of the teacher's heads, see `shares`."""
    return HeadInit(shares(given.shape.student_heads, given.shape.teacher_heads), given.width)


def random(given: InitContext) -> HeadInit:
    """Gaussian mixing weights, each row scaled to the Euclidean norm of `uniform`'s row."""
    shape = given.shape
    scale = shares(shape.student_heads, shape.teacher_heads).norm(dim=1, keepdim=True)
    drawn = torch.randn(shape.student_heads, shape.teacher_heads, generator=given.generator)
    return HeadInit(drawn * scale / drawn.norm(dim=1, keepdim=True), given.width)


def shares(num_student_heads: int, num_teacher_heads: int) -> Float[Tensor, "hs ht"]:
    """Share of each teacher head in each student head.

    Heads are laid side by side on a line of length 1, the student's over the teacher's; a student head weighs each
    teacher head by their overlap. So no head starts at zero, also with more student than teacher heads.

    Returns
    -------
    Rows that sum to 1.
    """
    teacher = torch.arange(num_teacher_heads + 1, dtype=torch.float64) * num_student_heads
    student = torch.arange(num_student_heads + 1, dtype=torch.float64) * num_teacher_heads
    begins = torch.maximum(student[:-1, None], teacher[None, :-1])
    ends = torch.minimum(student[1:, None], teacher[None, 1:])
    overlaps: Tensor = ((ends - begins).clamp(min=0) / num_teacher_heads).float()
    return overlaps
