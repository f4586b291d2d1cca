"""How the head mix of a structured map starts: `(H_s, H_t, generator) -> [H_s, H_t]`.

Only the mix: the width map starts from the same seeded orthogonal matrix whatever the init.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def uniform(num_student_heads: int, num_teacher_heads: int, generator: Generator) -> Float[Tensor, "hs ht"]:
    """Each student head is the mean of its share of the teacher's heads.

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
    shares: Tensor = ((ends - begins).clamp(min=0) / num_teacher_heads).float()
    return shares


def random(num_student_heads: int, num_teacher_heads: int, generator: Generator) -> Float[Tensor, "hs ht"]:
    """Gaussian mixing weights, each row scaled to the Euclidean norm of `uniform`'s row."""
    scale = uniform(num_student_heads, num_teacher_heads, generator).norm(dim=1, keepdim=True)
    drawn = torch.randn(num_student_heads, num_teacher_heads, generator=generator)
    scaled: Tensor = drawn * scale / drawn.norm(dim=1, keepdim=True)
    return scaled
