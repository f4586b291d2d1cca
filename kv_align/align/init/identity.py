"""`init=identity`: heads and numbers keep their places."""

from __future__ import annotations

import torch

from kv_align.align.head_map import HeadInit, InitContext


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
