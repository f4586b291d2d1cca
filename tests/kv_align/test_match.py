"""Which tokens stand for which by their characters: by hand where there are few, against a walk along the text."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_align.data.encode import Encoded
from kv_align.data.example import Segment
from kv_align.data.match import match_tokens

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
Q, R, A = Segment.QUESTION, Segment.REASONING, Segment.ANSWER
Spans = list[tuple[int, int]]


def text(*segments: tuple[Segment, Spans], cut: bool = False) -> Encoded:
    """A text of these tokens."""
    spans = [span for _, each in segments for span in each]
    kinds = [int(segment) for segment, each in segments for _ in each]
    return Encoded(list(range(len(spans))), kinds, cut, np.array(spans, dtype=np.int32).reshape(-1, 2))


def places(student: Spans, teacher: Spans) -> list[float]:
    """Of a text of one segment."""
    found, covered = match_tokens(text((Q, student)), text((Q, teacher)), [Q])
    assert covered.all()
    return found.tolist()


def test_characters_within_longer_tokens_by_hand():
    # a b c d within ab cd: quarters of the tokens' widths beside their middles.
    assert places([(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 2), (2, 4)]) == [-0.25, 0.25, 0.75, 1.25]
    assert places([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]) == [0.5, 2.5]


def test_tokens_that_have_the_same_characters_stand_at_each_other_exactly():
    student = [(0, 3), (3, 4), (4, 5), (5, 9), (9, 10)]
    teacher = [(0, 1), (1, 3), (3, 5), (5, 9), (9, 10)]
    assert places(student, teacher) == [0.5, 1.75, 2.25, 3, 4]
    assert places(teacher, student) == pytest.approx([-1 / 3, 1 / 6, 1.5, 3, 4])


def test_characters_that_no_teacher_token_has_lie_between_its_neighbours():
    # "ab cd" by words, which leave out the space, and by characters.
    words, characters = [(0, 2), (3, 5)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert places(characters, words) == [-0.25, 0.25, 0.5, 0.75, 1.25]
    assert places(words, characters) == [0.5, 3.5]


def test_tokens_of_one_character_share_it_evenly():
    # A character of four bytes: four tokens of one side, one or two of the other.
    four, two, one = [(0, 1), *[(1, 2)] * 4, (2, 3)], [(0, 1), *[(1, 2)] * 2, (2, 3)], [(0, 1), (1, 2), (2, 3)]
    assert places(four, one) == [0, 0.625, 0.875, 1.125, 1.375, 2]
    assert places(two, four) == [0, 1.5, 3.5, 5]
    assert places(one, four) == [0, 2.5, 5]
    assert places(four, four) == [0, 1, 2, 3, 4, 5]


def test_tokens_that_share_a_part_of_a_character_meet_in_its_middle():
    # The second character's bytes are split between two tokens that have more than it.
    assert places([(0, 2), (1, 3)], [(0, 1), (1, 2), (2, 3)]) == [0.25, 1.75]
    assert places([(0, 1), (1, 2), (2, 3)], [(0, 2), (1, 3)]) == pytest.approx([-1 / 6, 0.5, 1 + 1 / 6])


def test_special_tokens_stand_before_and_after_the_text():
    begin, end = (-1, 0), (2, 3)
    assert places([begin, (0, 2), end], [begin, (0, 1), (1, 2), end]) == [0, 1.5, 3]
    # Where the teacher has none, at the text's ends.
    assert places([begin, (0, 2)], [(0, 1), (1, 2)]) == [-0.5, 0.5]
    assert places([(0, 1), (1, 2)], [begin, (0, 2)]) == [0.75, 1.25]


def test_each_segment_is_counted_by_itself_and_only_those_asked_for():
    student = text((Q, [(0, 2)]), (R, [(0, 1), (1, 2)]), (A, [(0, 4)]))
    teacher = text((Q, [(0, 1), (1, 2)]), (R, [(0, 2)]), (A, [(0, 4)]))
    found, _ = match_tokens(student, teacher, [Q, R, A])
    assert found.tolist() == [0.5, -0.25, 0.25, 0]
    found, covered = match_tokens(student, teacher, [Q, A])
    assert np.isnan(found).tolist() == [False, True, True, False]
    assert covered.all()
    found, _ = match_tokens(student, text((Q, [(0, 2)])), [Q, R, A])
    assert np.isnan(found).tolist() == [False, True, True, True]


def test_what_was_cut_off_the_teachers_text_has_no_target():
    student = text((Q, [(0, 1), (1, 2), (2, 3), (3, 4)]))
    for spans, read in (([(0, 2)], [True, True, False, False]), ([(0, 2), (2, 4)], [True] * 4)):
        assert match_tokens(student, text((Q, spans), cut=True), [Q])[1].tolist() == read
    # Not so where it ends by itself: the last word of a tokenizer that leaves out what follows it.
    assert match_tokens(student, text((Q, [(0, 2)])), [Q])[1].all()


@st.composite
def tokenisations(draw: st.DrawFn) -> tuple[int, Spans, Spans]:
    """A text's length, and two ways to cut it into tokens; some characters may belong to none."""
    length = draw(st.integers(1, 12))
    ways = []
    for _ in range(2):
        cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=8))})
        spans = list(pairwise(cuts))
        kept = draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans)))
        ways.append([span for span, keep in zip(spans, kept, strict=True) if keep] or spans)
    return length, *ways


def place_of(character: float, tokens: Spans) -> float:
    """Where a point of the text stands among tokens, by walking along them."""
    for number, (start, end) in enumerate(tokens):
        if character < start:
            return number - 0.5
        if character <= end:
            return number - 0.5 + (character - start) / (end - start)
    return len(tokens) - 0.5


@PROPERTY
@given(tokenisations())
def test_any_tokenisation_is_a_walk_along_the_text(ways):
    _, student, teacher = ways
    expected = [(place_of(start, teacher) + place_of(end, teacher)) / 2 for start, end in student]
    assert places(student, teacher) == pytest.approx(expected, abs=1e-5)


@PROPERTY
@given(tokenisations())
def test_places_are_in_order_and_the_same_tokens_are_the_identity(ways):
    _, student, teacher = ways
    found = places(student, teacher)
    assert found == sorted(found)
    assert -0.5 <= found[0] <= found[-1] <= len(teacher) - 0.5
    assert places(student, student) == list(range(len(student)))
    for number, span in enumerate(student):
        if span in teacher:
            assert found[number] == teacher.index(span)


def read_of(student: Encoded, teacher: Encoded, *segments: Segment) -> str:
    """The student's tokens, + where what stands for one was read and . where it was not."""
    return "".join("+" if each else "." for each in match_tokens(student, teacher, segments)[1])


def ids(text: str, *, cut: bool = False) -> Encoded:
    """A text as `Qa Qb Rc`: of each token the segment and a letter."""
    kinds = {"Q": Q, "R": R, "A": A}
    tokens = text.split()
    spans = np.array([(at, at + 1) for at in range(len(tokens))], dtype=np.int32)
    return Encoded([ord(each[1]) for each in tokens], [int(kinds[each[0]]) for each in tokens], cut, spans)


def test_no_part_of_a_segment_stands_for_all_of_it():
    short, whole = ids("Qa Qb Ra Rb Aa"), ids("Qa Qb Ra Rx Ry Rb Aa")
    assert read_of(short, whole) == "+++++"
    # The last segment that the teacher has left may be a part of it, those before are whole.
    assert read_of(short, ids("Qa Qb Ra Rx", cut=True)) == "++..+"
    assert read_of(short, ids("Qa Qb Ra Rx Ry Rb Aa", cut=True)) == "+++++"
    assert read_of(short, ids("Qa Qb Ra Rx Ry Rb Ab", cut=True)) == "++++."
    assert read_of(short, ids("Qa", cut=True)) == "..+++"
    # As the student's: both ways one would be stretched over a part of the other.
    assert read_of(ids("Qa Qb Ra", cut=True), whole) == "++."
    assert read_of(ids("Qa Qb Ra", cut=True), ids("Qa Qb Ra Rx", cut=True)) == "++."
    # The same tokens stand for each other wherever both were cut.
    assert read_of(ids("Qa Qb Ra", cut=True), ids("Qa Qb Ra", cut=True)) == "+++"


def test_after_a_cut_more_of_each_part_of_a_conversation_may_come():
    whole = ids("Qa Ra Qb Rb Qc")
    assert read_of(whole, ids("Qx Qa Ra Qb Rb Qc")) == "+++++"
    assert read_of(whole, ids("Qx Qa Ra Qb", cut=True)) == "....."
    assert read_of(whole, ids("Qx Qa Ra Qb Rb", cut=True)) == ".+.+."
    assert read_of(whole, ids("Qx Qa Ra", cut=True)) == "....."


def test_what_is_matched_by_its_characters_is_read_as_far_as_they_were():
    student, teacher = ids("Qa Ra Rb Rc"), ids("Qa Ra Rb", cut=True)
    student.spans[:], teacher.spans[:] = [(0, 1), (0, 1), (1, 2), (2, 3)], [(0, 1), (0, 1), (1, 2)]
    assert read_of(student, teacher, Q, R) == "+++."
    assert read_of(student, teacher, Q) == "+..."
