"""Where a segment begins is a matter of characters, whatever a tokenizer does with spaces and line breaks."""

import pytest
from transformers import PreTrainedTokenizerFast

from kv_align.data.encode import Encoded, encode
from kv_align.data.example import Example, Segment
from kv_align.data.match import match_tokens
from tests.tiny_tokenizers import byte_level, pieces

TOKENIZERS = {
    "bytes": byte_level(),
    "line breaks become spaces": pieces(line_breaks=False),
    "line breaks begin the next token": pieces(line_breaks=True),
}
EXAMPLES = [
    Example("one step", "How many pens does Ana have now?", ("12 + 34 = 46.",), "46"),
    Example("steps", "How many?", ("12 + 34 = 46.", "60 - 5 = 55."), "55"),
    Example("no step", "How many pens?", (), "46"),
    Example("no question", "", ("12 + 34 = 46.",), "46"),
    Example("spaces", "  How many? \n ", (" 12 + 34 = 46. ",), " 46"),
    Example("only an answer", "", (), "46"),
]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))


def read(tokenizer: PreTrainedTokenizerFast, encoded: Encoded, segment: Segment) -> str:
    ids = [i for i, its in zip(encoded.ids, encoded.segments, strict=True) if its == segment]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


@every_tokenizer
@pytest.mark.parametrize("rationale", ["full", "none"])
def test_each_segment_has_its_own_words(tokenizer, rationale):
    examples = [example.with_rationale(rationale, 1) for example in EXAMPLES]
    for example, encoded in zip(examples, encode(examples, tokenizer, 200), strict=True):
        for segment, text in example.segments():
            assert read(tokenizer, encoded, segment) == " ".join(text.split()), (example.id, segment)
        # What a student has to write begins after the prompt, marker and all.
        written = tokenizer.decode(encoded.ids[len(encoded.prompt) :], skip_special_tokens=True)
        assert "####" in written
        assert "####" not in tokenizer.decode(encoded.prompt)


@every_tokenizer
def test_spans_are_counted_from_the_start_of_a_segment(tokenizer):
    for example, encoded in zip(EXAMPLES, encode(EXAMPLES, tokenizer, 200), strict=True):
        texts = dict(example.segments())
        for (start, end), segment in zip(encoded.spans[:-1], encoded.segments[:-1], strict=True):
            assert 0 <= start <= end <= len(texts[segment]), (example.id, segment)


def test_the_same_word_stands_at_itself_however_its_line_break_is_read():
    # "####" with the line break before it, and without.
    examples = EXAMPLES[:1]
    ours, theirs = (encode(examples, TOKENIZERS[name], 200)[0] for name in ("bytes", "line breaks become spaces"))
    places, was_read = match_tokens(ours, theirs, [Segment.ANSWER])
    answer = [place for place, segment in zip(places, ours.segments, strict=True) if segment == Segment.ANSWER]
    assert answer[0] == 0
    assert was_read.all()
