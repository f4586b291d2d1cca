"""How a structured map starts, for inits that look at nothing: `(given) -> (mix, width)`.

All but `identity` set the head mix alone: the width map is the seeded orthogonal matrix that they are given. Inits that are
fitted to states are in files of their own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kv_align.align.head_map import HeadInit, InitContext
from kv_align.align.structured import orthogonal as draw_orthogonal


def uniform(given: InitContext) -> HeadInit:
    """Each student head starts as the mean of its share of the teacher's heads, see `shares`."""
    return HeadInit(shares(given.shape.student_heads, given.shape.teacher_heads), given.width)


def random(given: InitContext) -> HeadInit:
    """Gaussian mixing weights, each row scaled to the Euclidean norm of `uniform`'s row."""
    shape = given.shape
    scale = shares(shape.student_heads, shape.teacher_heads).norm(dim=1, keepdim=True)
    drawn = torch.randn(shape.student_heads, shape.teacher_heads, generator=given.generator)
    return HeadInit(drawn * scale / drawn.norm(dim=1, keepdim=True), given.width)


def identity(given: InitContext) -> HeadInit:
    """Each student head starts as one teacher head, and each number of it as the number at its place.

    Sets mix and width map. Student head g takes the first teacher head of its share, floor(g H_t / H_s); a wider teacher
    head is cut, a narrower one is filled up with zeros. Between equal shapes the map starts as the identity. It reads no
    states: that places correspond is an assumption, good for a student that was cut out of its teacher.
    """
    shape = given.shape
    taken = torch.arange(shape.student_heads) * shape.teacher_heads // shape.student_heads
    mix = torch.nn.functional.one_hot(taken, shape.teacher_heads).float()
    return HeadInit(mix, torch.eye(shape.teacher_width, shape.student_width).expand_as(given.width))


def orthogonal(given: InitContext) -> HeadInit:
    """Random mixing weights whose rows or columns (the fewer) are orthonormal.

    Sets the head mix alone. Up to as many student as teacher heads every student head has a mix of norm 1, of no other's
    direction; with more of them the teacher's heads are spread over the student's, and inner products over all heads stay
    what they were. It reads no states.
    """
    shape = given.shape
    return HeadInit(draw_orthogonal(shape.student_heads, shape.teacher_heads, given.generator), given.width)


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
