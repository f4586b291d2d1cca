"""Which tokens of one tokenizer stand for which of another: by the characters of the text that both have read.

Axes: S student tokens, R teacher tokens.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from kv_align.data.encode import Encoded
from kv_align.data.example import Segment


def match_tokens(
    student: Encoded, teacher: Encoded, segments: Collection[Segment]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Find where each student token stands among the teacher's tokens of its segment.

    Teacher token r reaches from r - 1/2 to r + 1/2, evenly over its characters; a student token stands in the middle
    between the places of its two ends. So one that has the same characters as teacher token r stands at r, and one that
    has those of tokens 1 and 2 at 1.5.

    Parameters
    ----------
    student, teacher
        The same text, by two tokenizers.
    segments
        Those whose text both have read alike.

    Returns
    -------
    Places [S], NaN where the segment is not among `segments` or the teacher has nothing of it; and whether each token's
    text was read by the teacher, [S], which was not so where the teacher's text was cut before it.
    """
    places = np.full(len(student.ids), np.nan, dtype=np.float32)
    was_read = np.ones(len(student.ids), dtype=bool)
    for segment in segments:
        ours, theirs = (np.array(text.segments) == segment for text in (student, teacher))
        if not (ours.any() and theirs.any()):
            continue
        ends, knots = _parted(student.spans[ours]), _parted(teacher.spans[theirs])
        numbers = np.arange(len(knots))[:, None] + np.array([-0.5, 0.5])
        alike = np.array_equal(student.spans[ours], teacher.spans[theirs])
        places[ours] = numbers.mean(axis=1) if alike else np.interp(ends, knots.ravel(), numbers.ravel()).mean(axis=1)
        if teacher.cut:
            was_read[ours] = ends[:, 0] < knots[-1, 1]
    return places, was_read


def _parted(spans: NDArray[np.int32]) -> NDArray[np.float64]:
    """Ends of tokens that follow each other without sharing anything; tokens of one character share it evenly."""
    begins = np.flatnonzero(np.r_[True, (spans[1:] != spans[:-1]).any(axis=1)])
    sizes = np.diff(np.r_[begins, len(spans)])
    number, size = np.arange(len(spans)) - np.repeat(begins, sizes), np.repeat(sizes, sizes)
    first, width = spans[:, 0].astype(np.float64), spans[:, 1] - spans[:, 0]
    ends = np.stack((first + width * (number / size), first + width * ((number + 1) / size)), axis=1)
    # Tokens that share a part of a character meet in the middle of it.
    shares = ends[:-1, 1] > ends[1:, 0]
    ends[:-1, 1][shares] = ends[1:, 0][shares] = ((ends[:-1, 1] + ends[1:, 0]) / 2)[shares]
    return np.maximum.accumulate(ends.ravel()).reshape(-1, 2)
