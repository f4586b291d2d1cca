"""The same texts are tokenised once; a damaged file is made again, and a folder that cannot be written costs nothing."""

import logging
import os
import stat

import numpy as np
import pytest

from kv_align.data import token_cache
from kv_align.data.arithmetic import Arithmetic
from kv_align.data.encode import Encoded, Written, encode, write
from kv_align.data.token_cache import tokenised
from tests.tiny_tokenizers import byte_level, pieces

EXAMPLES = Arithmetic(train_examples=20).examples("train")
TOKENIZER = byte_level()
WRITTEN = write(EXAMPLES, TOKENIZER)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KV_ALIGN_DATA_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(token_cache, "WORTH_KEEPING", 100)
    return tmp_path / "deep" / "cache"


@pytest.fixture
def tokenisations(monkeypatch) -> list[int]:
    """How many texts each call of the tokenizer was given."""
    calls: list[int] = []

    def counted(written, *rest):
        calls.append(len(written))
        return original(written, *rest)

    original = token_cache.tokenise
    monkeypatch.setattr(token_cache, "tokenise", counted)
    return calls


def same(ours: list[Encoded], theirs: list[Encoded]) -> bool:
    return ours == theirs and all(np.array_equal(a.spans, b.spans) for a, b in zip(ours, theirs, strict=True))


def test_the_same_texts_are_tokenised_once(tokenisations, folder):
    expected = encode(EXAMPLES, TOKENIZER, 100)
    first, second = (tokenised(WRITTEN, TOKENIZER, 100) for _ in range(2))
    assert tokenisations == [20]
    assert same(first, expected)
    assert same(second, expected)
    assert {type(second[0].ids[0]), type(second[0].segments[0]), type(second[0].cut)} == {int, bool}
    assert any(each.cut for each in second)
    assert len(list(folder.iterdir())) == 1


def test_other_texts_settings_and_tokenizers_are_others(tokenisations):
    changed = [Written([*WRITTEN[0].segments[:-1], (WRITTEN[0].segments[-1][0], "#### 9")], False), *WRITTEN[1:]]
    tokenised(WRITTEN, TOKENIZER, 100)
    ended = byte_level()
    ended.eos_token = "<unk>"
    for written, tokenizer, length in (
        (changed, TOKENIZER, 100),
        (WRITTEN[::-1], TOKENIZER, 100),
        ([Written(each.segments, True) for each in WRITTEN], TOKENIZER, 100),
        ([Written([(1, "".join(text for _, text in each.segments))], False) for each in WRITTEN], TOKENIZER, 100),
        (WRITTEN, TOKENIZER, 99),
        (WRITTEN, pieces(line_breaks=True), 100),
        (WRITTEN, ended, 100),
    ):
        tokenisations.clear()
        tokenised(written, tokenizer, length)
        assert tokenisations == [20]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_file_is_made_again(tokenisations, folder, damage, caplog):
    expected = tokenised(WRITTEN, TOKENIZER, 100)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        {
            "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            "cut": content[:-40],
            "empty": b"",
            "other": b"not what was written",
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert same(tokenised(WRITTEN, TOKENIZER, 100), expected)
    assert tokenisations == [20, 20]
    assert "is damaged" in caplog.text
    assert same(tokenised(WRITTEN, TOKENIZER, 100), expected)
    assert tokenisations == [20, 20]


def test_files_have_the_mode_of_the_umask(folder):
    before = os.umask(0o027)
    try:
        tokenised(WRITTEN, TOKENIZER, 100)
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KV_ALIGN_DATA_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert same(tokenised(WRITTEN, TOKENIZER, 100), encode(EXAMPLES, TOKENIZER, 100))
    assert "cannot be kept" in caplog.text


def test_few_texts_and_a_cache_that_is_off_leave_no_files(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(token_cache, "WORTH_KEEPING", 10**6)
    tokenised(WRITTEN, TOKENIZER, 100)
    monkeypatch.setattr(token_cache, "WORTH_KEEPING", 100)
    monkeypatch.setenv("KV_ALIGN_DATA_CACHE", "off")
    tokenised(WRITTEN, TOKENIZER, 100)
    assert not folder.exists()
