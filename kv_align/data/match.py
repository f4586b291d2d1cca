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
    Places [S], NaN where the segment is not among `segments` or the teacher has nothing of it; and whether what stands for
    each token was read, [S]: its own characters by the teacher, where its segment is among `segments`; else all of its
    segment by both, of which one would be stretched over a part of the other's where a text was cut.
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
    for cut in _cut_short(student, teacher).difference(segments):
        was_read[np.array(student.segments) == cut] = False
    return places, was_read


def _cut_short(student: Encoded, teacher: Encoded) -> set[int]:
    """Return segments of which one of the two may have read less than there is, and other tokens than the other."""
    texts = student, teacher
    if not (student.cut or teacher.cut):
        return set()
    # In a conversation, questions and replies alternate: more of each may come after the cut.
    in_order = all(text.segments == sorted(text.segments) for text in texts)
    cut = {text.segments[-1] for text in texts if text.cut} if in_order else {*student.segments, *teacher.segments}

    def tokens(text: Encoded, segment: int) -> list[int]:
        return [token for token, its in zip(text.ids, text.segments, strict=True) if its == segment]

    return {segment for segment in cut if tokens(student, segment) != tokens(teacher, segment)}


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
