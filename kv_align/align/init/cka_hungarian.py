"""`init=cka_hungarian`: each student head starts as the teacher head that is most like it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kv_align.align.cka import cka_matrix
from kv_align.align.head_map import HeadInit, InitContext
from kv_align.align.paired_states import Calibration, Pair


def cka_hungarian(given: InitContext, calibration: Calibration) -> HeadInit:
    """Teacher heads assigned to student heads by linear CKA, as the Hungarian method does (Kuhn, 1955).

    Sets the head mix alone, to zeros and ones. The assignment has the largest sum of similarities; no teacher head serves
    twice as long as there are enough. Keys and values are assigned together, by the sum of both similarities, since a
    head's attention weighs its own values; queries only within the group of their key/value head, so that under grouped
    queries nothing but groups permutes. Fitted to both models' states before training: with an untrained student, to
    noise.
    """
    groups = _assign(_similarity(calibration.key) + _similarity(calibration.value))
    taken = groups
    if given.kind == "query":
        similarity = _similarity(calibration.of("query"))
        student_size = given.shape.student_heads // len(groups)
        teacher_size = given.shape.teacher_heads // calibration.key.teacher.shape[2]
        taken = []
        for student_group, teacher_group in enumerate(groups):
            rows = slice(student_group * student_size, (student_group + 1) * student_size)
            first = teacher_group * teacher_size
            taken += [first + place for place in _assign(similarity[rows, first : first + teacher_size])]
    mix = torch.nn.functional.one_hot(torch.tensor(taken), given.shape.teacher_heads)
    return HeadInit(mix.to(given.width), given.width)


def _similarity(pair: Pair) -> Float[Tensor, "hs ht"]:
    teacher, student = pair.pooled()
    return cka_matrix(student.unbind(dim=1), teacher.unbind(dim=1))


def _assign(similarity: Float[Tensor, "hs ht"]) -> list[int]:
    """Teacher head of each student head; teacher heads are offered as many times as it takes."""
    num_student, num_teacher = similarity.shape
    offered = similarity.repeat(1, -(-num_student // num_teacher))
    _, chosen = linear_sum_assignment(offered.cpu().numpy(), maximize=True)
    return [int(place) % num_teacher for place in chosen]
