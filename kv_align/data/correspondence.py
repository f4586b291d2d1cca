"""Which of the teacher's tokens stand for which of the student's.

Axes: B batch, S student tokens, R teacher tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Correspondence:
    """How the student's tokens of a batch correspond to the teacher's, segment by segment.

    Attributes
    ----------
    student_segments, teacher_segments
        Values of `Segment` for both token sequences, 0 at padding; the tokens of a segment stand together.
    same_time
        Whether student and teacher tokens are known to stand at the same places, so that nothing needs resampling.
    places
        Where each student token stands among the teacher's tokens of its segment, by its characters; NaN where that is not
        known. None where both read with one tokenizer.
    """

    student_segments: Int[Tensor, "b s"]
    teacher_segments: Int[Tensor, "b r"]
    same_time: bool
    places: Float[Tensor, "b s"] | None = None
