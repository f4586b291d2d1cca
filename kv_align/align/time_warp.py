"""Resamples the teacher's tokens onto the student's, segment by segment.

Axes: B batch, S student tokens, R teacher tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kv_align.config.options import NonNegativeFloat, PositiveFloat
from kv_align.data.correspondence import Correspondence
from kv_align.data.example import Segment


class SegmentWarp:
    """A resampling matrix from segment ids and, where two tokenizers have read the same text, from its characters.

    Student token j of n in a segment stands at (j + 1/2) / ratio - 1/2 among the segment's m teacher tokens, where ratio
    is n / m or declared; with two tokenizers it stands where its characters do (see `kv_align.data.match`). It takes the
    teacher tokens around that place by a triangular kernel of half-width 1 + `smoothness` tokens, normalised within the
    segment. So equal lengths, or equal tokens, and smoothness 0 are the identity.

    Parameters
    ----------
    smoothness
        Width of the kernel in teacher tokens, beyond the linear interpolation that 0 means.
    ratios
        Student tokens per teacher token by segment; that of the lengths, or the characters, where it is None or not given.
    """

    def __init__(
        self,
        *,
        smoothness: NonNegativeFloat,
        ratios: dict[Literal["question", "reasoning", "answer"], PositiveFloat | None],
    ) -> None:
        self._smoothness = smoothness
        self._ratios = {int(Segment[name.upper()]): ratio for name, ratio in ratios.items() if ratio is not None}

    def is_identity(self, correspondence: Correspondence) -> bool:
        """Whether the teacher's states come out as they were."""
        return correspondence.same_time and self._smoothness == 0 and not self._ratios

    def matrix(self, correspondence: Correspondence) -> Float[Tensor, "b s r"]:
        """Weights of the teacher's tokens in each student token.

        Returns
        -------
        Rows that sum to 1; a row of zeros where the student's token is padding or its segment is not in the teacher's.
        """
        student, teacher, places = (
            correspondence.student_segments,
            correspondence.teacher_segments,
            correspondence.places,
        )
        weights = torch.zeros(*student.shape, teacher.shape[1], device=student.device)
        for segment in (Segment.QUESTION, Segment.REASONING, Segment.ANSWER):
            in_student, in_teacher = student == segment, teacher == segment
            rank_BS, rank_BR = in_student.cumsum(1) - 1, in_teacher.cumsum(1) - 1
            student_length, teacher_length = in_student.sum(1, keepdim=True), in_teacher.sum(1, keepdim=True)
            ratio = self._ratios.get(int(segment))
            per_student_token = teacher_length / student_length.clamp(min=1) if ratio is None else 1 / ratio
            place_BS = (rank_BS + 0.5) * per_student_token - 0.5
            if places is not None and ratio is None:
                place_BS = torch.where(places.isnan(), place_BS, places)
            place_BS = torch.minimum(place_BS.clamp(min=0), (teacher_length - 1).to(place_BS.dtype))
            distance_BSR = (place_BS[:, :, None] - rank_BR[:, None, :]).abs()
            kernel = (1 - distance_BSR / (1 + self._smoothness)).clamp(min=0)
            kernel = kernel * (in_student[:, :, None] & in_teacher[:, None, :])
            weights = weights + kernel / kernel.sum(2, keepdim=True).clamp(min=torch.finfo(kernel.dtype).tiny)
        return weights


def resample(states: Float[Tensor, "b l h r d"], weights: Float[Tensor, "b s r"]) -> Float[Tensor, "b l h s d"]:
    """Apply a resampling matrix to keys, values or queries."""
    return torch.einsum("bsr,blhrd->blhsd", weights.to(states.dtype), states)
