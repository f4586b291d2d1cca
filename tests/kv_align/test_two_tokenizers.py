"""Teacher and student with tokenizers of their own: what the batches hold, and whole runs of a few steps."""

import json
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from kv_align.align.schedule import Phase
from kv_align.align.time_warp import SegmentWarp
from kv_align.config.config import ModelConfig
from kv_align.config.model_card import EMBEDDED
from kv_align.config.signals import KEYS_VALUES_QUERIES
from kv_align.data.arithmetic import Arithmetic
from kv_align.data.batch import Batch, Collator
from kv_align.data.encode import Encoded, encode
from kv_align.data.example import Example, Segment
from kv_align.experiment.assembly import assemble
from kv_align.experiment.experiment import run as do_run
from kv_align.models.load import load_teacher
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_rows
from tests.short_runs import short_config
from tests.tiny import make_llama

Q, R, A = Segment.QUESTION, Segment.REASONING, Segment.ANSWER
EXAMPLES = Arithmetic(train_examples=12).examples("train")
TEXTS = ["".join(text for _, text in example.segments()) for example in EXAMPLES]
CHARACTERS = sorted(set("".join(TEXTS)) | set("Äé🍎 "))
WARP = SegmentWarp(smoothness=0.0, ratios={})


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="?")


def characters(alphabet: list[str]) -> PreTrainedTokenizerFast:
    """A token for each character."""
    tokenizer = Tokenizer(models.WordLevel({token: at for at, token in enumerate(["</s>", "?", *alphabet])}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return fast(tokenizer)


def words() -> PreTrainedTokenizerFast:
    """A token for each word and sign; no token has a space or a line break."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["</s>", "?"], show_progress=False))
    return fast(tokenizer)


def bytes_of(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Byte pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=["</s>", "?"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return fast(tokenizer)


TOKENIZERS = {
    "characters": characters(CHARACTERS),
    "words": words(),
    "few bytes": bytes_of(270),
    "many bytes": bytes_of(420),
    "embedded": AutoTokenizer.from_pretrained(EMBEDDED / "student"),
}
PAIRS = [(a, b) for a in TOKENIZERS for b in TOKENIZERS if a != b]


def batch(
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    examples: list[Example] = EXAMPLES,
    *,
    teacher_length: int = 600,
    shuffle: bool = False,
) -> tuple[Batch, list[Encoded], list[Encoded]]:
    """All examples as two tokenizers read them."""
    read = encode(examples, student, 600), encode(examples, teacher, teacher_length)
    collate = Collator(*read, student_pad_id=0, teacher_pad_id=0, matched=[Q, R, A], shuffle_teacher=shuffle)
    return collate(list(range(len(examples)))), *read


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spans_are_the_characters_of_each_token_within_its_segment(name):
    awkward = Example("letters", "Äé 🍎  und\nnoch?", ("🍎é",), "3")
    examples = [*EXAMPLES, awkward]
    for example, encoded in zip(examples, encode(examples, TOKENIZERS[name], 600), strict=True):
        parts = dict(example.segments())
        assert len(encoded.spans) == len(encoded.ids)
        assert encoded.spans[-1].tolist() == [len(parts[A]), len(parts[A]) + 1]
        covered = {segment: set() for segment in parts}
        for token, segment, (start, end) in zip(encoded.ids, encoded.segments, encoded.spans.tolist(), strict=True):
            covered[segment] |= set(range(start, end))
            if name != "words" and token > 1 and example is not awkward:
                assert TOKENIZERS[name].decode([token]) == parts[segment][start:end]
        for segment, text in parts.items():
            extra = {len(text)} if segment == A else set()
            spaces = {at for at, letter in enumerate(text) if letter.isspace()} if name == "words" else set()
            assert covered[segment] == set(range(len(text))) - spaces | extra


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_token_takes_its_own_characters_of_its_own_segment(student, teacher):
    both, ours, theirs = batch(TOKENIZERS[student], TOKENIZERS[teacher])
    assert not both.correspondence.same_time
    assert torch.equal(both.aligned, both.student.mask)
    weights = WARP.matrix(both.correspondence)
    torch.testing.assert_close(weights.sum(dim=2), both.student.mask.float(), atol=1e-6, rtol=0)
    exact = 0
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        other_places = {
            (s, *span): at for at, (s, span) in enumerate(zip(other.segments, other.spans.tolist(), strict=True))
        }
        assert len(other_places) == len(other.ids)
        for at, (segment, span) in enumerate(zip(mine.segments, mine.spans.tolist(), strict=True)):
            taken = weights[row, at].nonzero().flatten().tolist()
            assert {other.segments[each] for each in taken} == {segment}
            same = other_places.get((segment, *span))
            if same is not None:
                exact += 1
                assert weights[row, at, same] == 1
            # What it takes from reaches to its text, or as near as the segment does.
            inside = [each for each, kind in enumerate(other.segments) if kind == segment]
            before, after = max(inside[0], taken[0] - 1), min(inside[-1], taken[-1] + 1)
            assert before == inside[0] or other.spans[before, 0] <= span[1]
            assert after == inside[-1] or other.spans[after, 1] >= span[0]
    assert exact > len(EXAMPLES) * 10


def test_by_characters_is_not_by_proportion():
    # Long words first, short ones last: a proportional warp is out of step in the middle.
    example = Example("x", "", ("extraordinarily uncharacteristically a b c d e f",), None)
    alphabet = characters(sorted(set(CHARACTERS) | set("extraordinarily uncharacteristically a b c d e f")))
    one, _, (other,) = batch(alphabet, TOKENIZERS["words"], [example])
    text = example.steps[0]
    at = text.index(" b ") + 1
    assert other.spans[3].tolist() == [at, at + 1]
    by_characters, by_length = one.correspondence, replace(one.correspondence, places=None)
    assert WARP.matrix(by_characters)[0, at].argmax() == 3
    assert WARP.matrix(by_characters)[0, at, 3] == 1
    assert WARP.matrix(by_length)[0, at].argmax() > 3
    # A declared ratio is what it says, whatever the characters.
    declared = SegmentWarp(smoothness=0.0, ratios={"reasoning": 2.0})
    assert torch.equal(declared.matrix(by_characters), declared.matrix(by_length))


def test_a_text_that_both_tokenise_alike_gives_the_identity_exactly():
    other = characters(CHARACTERS[::-1])
    both, ours, theirs = batch(TOKENIZERS["characters"], other)
    assert [text.ids for text in ours] != [text.ids for text in theirs]
    assert both.correspondence.same_time
    weights = WARP.matrix(both.correspondence)
    assert torch.equal(weights, torch.diag_embed(both.student.mask.float()))
    # The words that both have as one token, in a text that they cut otherwise.
    both, ours, theirs = batch(TOKENIZERS["few bytes"], TOKENIZERS["many bytes"])
    assert not both.correspondence.same_time
    alike = [
        (row, at, theirs[row].spans.tolist().index(span))
        for row, mine in enumerate(ours)
        for at, (segment, span) in enumerate(zip(mine.segments, mine.spans.tolist(), strict=True))
        if segment == Q and span in theirs[row].spans.tolist()[: theirs[row].segments.count(Q)]
    ]
    assert len(alike) > 100
    weights = WARP.matrix(both.correspondence)
    assert all(weights[row, at, to] == 1 for row, at, to in alike)


def test_the_same_places_by_chance_are_not_the_same_tokens():
    # As many tokens, cut elsewhere: ab|c and a|bc.
    student = Encoded([1, 2], [2, 2], cut=False, spans=torch.tensor([[0, 2], [2, 3]]).int().numpy())
    teacher = Encoded([3, 4], [2, 2], cut=False, spans=torch.tensor([[0, 1], [1, 3]]).int().numpy())
    both = Collator([student], [teacher], student_pad_id=0, teacher_pad_id=0, matched=[R])([0])
    assert torch.equal(both.student.segments, both.teacher.segments)
    assert not both.correspondence.same_time
    assert both.correspondence.places.tolist() == [[0.25, 1.25]]
    assert Collator([student], [teacher], student_pad_id=0, teacher_pad_id=0)([0]).correspondence.same_time


def test_tokens_beyond_what_the_teacher_read_have_no_target():
    both, ours, theirs = batch(TOKENIZERS["words"], TOKENIZERS["characters"], teacher_length=60)
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert other.cut
        last = other.segments[-1]
        expected = [
            segment < last or (segment == last and start < other.spans[-1, 1])
            for segment, (start, _) in zip(mine.segments, mine.spans.tolist(), strict=True)
        ]
        assert both.aligned[row, : len(expected)].tolist() == expected
        assert not all(expected)


def test_another_examples_text_is_not_matched_by_characters():
    both, *_ = batch(TOKENIZERS["words"], TOKENIZERS["characters"], shuffle=True)
    assert both.correspondence.places is None
    moved = batch(TOKENIZERS["words"], TOKENIZERS["characters"])[0]
    by_characters, copied = moved.correspondence, moved.to(torch.device("cpu")).correspondence
    assert by_characters.places is not None
    assert torch.equal(copied.places.nan_to_num(-9), by_characters.places.nan_to_num(-9))
    assert not torch.equal(WARP.matrix(replace(by_characters, places=None)), WARP.matrix(by_characters))


# Whole runs


@pytest.fixture(scope="module")
def teacher_of_characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    tokenizer = TOKENIZERS["characters"]
    model = make_llama(vocab_size=len(tokenizer))
    model.config.max_position_embeddings = 600
    model.config._attn_implementation_internal = "sdpa"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pair(teacher: Path) -> list[str]:
    return [
        "model=pair",
        f"model.teacher={teacher}",
        "model.student=embedded",
        "model.student_start=pretrained",
        "data.max_length=300",
        "trainer.max_steps=3",
        "trainer.warmup_steps=1",
    ]


@pytest.mark.parametrize("rationale", ["full", "short"])
def test_each_model_of_a_run_reads_its_own_tokens(teacher_of_characters, tmp_path, rationale):
    config = short_config(*pair(teacher_of_characters), f"data.rationale={rationale}", "loss=kv+struct")
    built = assemble(config, RunDirectory(tmp_path), tmp_path)
    found = built.splits.train.collate([0, 1, 2])
    text = "".join(part for _, part in built.splits.train.examples[0].segments())
    shown = built.splits.train.examples[0].with_rationale(rationale, 2)
    tokenizers = built.student_model.tokenizer, built.teacher_model.tokenizer
    assert tokenizers[1].decode(found.teacher.ids[0][found.teacher.mask[0]][:-1]) == text
    assert tokenizers[0].decode(found.student.ids[0][found.student.mask[0]][:-1]) == "".join(
        part for _, part in shown.segments()
    )
    by_characters = ~found.correspondence.places.isnan() & found.student.mask
    expected = found.student.mask if rationale == "full" else found.student.mask & (found.student.segments != R)
    assert torch.equal(by_characters, expected)
    seen = []
    hook = built.teacher_model.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    states = built.teacher.read(found, (KEYS_VALUES_QUERIES,))
    hook.remove()
    assert torch.equal(seen[0], found.teacher.ids)
    assert states["k"].shape[3] == found.teacher.ids.shape[1]


@pytest.mark.parametrize("choices", [["loss=kv+struct", "init=least_squares"], ["loss=relations"]], ids=str)
def test_a_run_with_two_tokenizers_ends_and_generates_with_the_students(
    teacher_of_characters, tmp_path, monkeypatch, choices
):
    config = short_config(*pair(teacher_of_characters), *choices)
    callers, matrix = set(), SegmentWarp.matrix

    def watched(self, correspondence):
        assert correspondence.places is not None, "a warp by proportion"
        names = {frame.filename.rpartition("/")[2] for frame in traceback.extract_stack()}
        callers.update(names & {"step.py", "calibration.py", "evaluate.py"})
        return matrix(self, correspondence)

    monkeypatch.setattr(SegmentWarp, "matrix", watched)
    assert do_run(config, tmp_path / "run") == "finished"
    assert callers == {"step.py", "evaluate.py", *(["calibration.py"] if len(choices) > 1 else [])}
    run = RunDirectory(tmp_path / "run")
    rows = read_rows(run.metrics_file)
    parts = ("key_loss", "attention_loss") if len(choices) > 1 else ("relation_loss",)
    assert all(0 < row[part] < 1e3 for row in rows for part in parts)
    assert all(row["kv_grad_norm"] > 0 for row in rows)
    student = AutoTokenizer.from_pretrained(run.student)
    assert student("How many apples?")["input_ids"] == TOKENIZERS["embedded"]("How many apples?")["input_ids"]


def test_logits_over_two_vocabularies_are_refused(teacher_of_characters):
    with pytest.raises(ConfigError, match=r"loss=logit_kd is not allowed .* its vocabulary is another") as caught:
        short_config(*pair(teacher_of_characters), "experiment=logit_kd")
    assert "\n" not in str(caught.value)


def as_an_older_library_wrote(file: Path) -> None:
    """Pairs as strings, nothing of what was added to the format since, in another order."""
    whole = json.loads(file.read_text())
    model = whole["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    for new in ("type", "fuse_unk", "byte_fallback", "ignore_merges"):
        model.pop(new)
    file.write_text(json.dumps(whole, sort_keys=True))


def for_batches(file: Path) -> None:
    """With the length and padding of whoever used it last."""
    whole = json.loads(file.read_text())
    whole["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    whole["padding"] = {
        **{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"},
    }
    file.write_text(json.dumps(whole))


def merged_otherwise(file: Path) -> None:
    whole = json.loads(file.read_text())
    whole["model"]["merges"][:2] = whole["model"]["merges"][1::-1]
    file.write_text(json.dumps(whole))


@pytest.fixture
def saved_twice(tmp_path) -> list[Path]:
    model, tokenizer = (kind.from_pretrained(EMBEDDED / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    folders = [tmp_path / name for name in ("theirs", "ours")]
    for folder in folders:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@pytest.mark.parametrize("change", [as_an_older_library_wrote, for_batches])
def test_logits_over_one_vocabulary_written_in_two_ways_are_compared(saved_twice, tmp_path, change):
    change(saved_twice[0] / "tokenizer.json")
    one, other = (folder / "tokenizer.json" for folder in saved_twice)
    assert one.read_bytes() != other.read_bytes()
    config = short_config(*pair(saved_twice[0]), f"model.student={saved_twice[1]}", "loss=logit_kd")
    splits = assemble(config, RunDirectory(tmp_path / "run"), tmp_path).splits
    assert splits.train.teacher is splits.train.student
    assert not any(text.cut for text in splits.train.student)


def test_logits_over_one_vocabulary_merged_in_two_ways_are_refused(saved_twice):
    merged_otherwise(saved_twice[0] / "tokenizer.json")
    with pytest.raises(ConfigError, match="its vocabulary is another"):
        short_config(*pair(saved_twice[0]), f"model.student={saved_twice[1]}", "loss=logit_kd")


@pytest.mark.parametrize("top_k", ["null", "5"])
def test_logits_over_one_vocabulary_padded_differently_are_compared_where_both_are(tmp_path, top_k):
    padded = AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher")
    padded.resize_token_embeddings(padded.config.vocab_size + 31)
    for name, model in (("padded", padded), ("plain", AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher"))):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(EMBEDDED / "student").save_pretrained(tmp_path / name)
    rows = {}
    for name in ("padded", "plain"):
        models = (*pair(tmp_path / name), f"model.student={tmp_path / 'plain'}")
        config = short_config(*models, "experiment=logit_kd", f"loss.top_k={top_k}")
        assert do_run(config, tmp_path / f"run {name}") == "finished"
        rows[name] = [row["logit_loss"] for row in read_rows(RunDirectory(tmp_path / f"run {name}").metrics_file)]
    assert rows["padded"] == rows["plain"]
    assert min(rows["plain"]) > 0


LINES = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
CHAT = [
    "data=text",
    "data.column=messages",
    "data.validation_examples=2",
    "data.test_examples=2",
    "data.train_examples=null",
    "evaluation.exact_match_examples=0",
]


@pytest.fixture
def conversations(tmp_path) -> Callable[..., list[str]]:
    """Makes one model twice, the teacher with a chat template of its own, and texts that both read; how to use them."""

    def of(template: str, with_system: str = "none") -> list[str]:
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "student")
        for name, its in (("theirs", template), ("ours", LINES)):
            tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "student")
            tokenizer.chat_template = its
            for each in (model, tokenizer):
                each.save_pretrained(tmp_path / name)
        for split, count in (("train", 6), ("validation", 2), ("test", 2)):
            rows = [
                {
                    "messages": [
                        *([{"role": "system", "content": "Count."}] if with_system == f"{split}-{number}" else []),
                        {"role": "user", "content": f"How many of {split}?"},
                        {"role": "assistant", "content": f"{number} of them."},
                    ]
                }
                for number in range(count)
            ]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        models = (*pair(tmp_path / "theirs"), f"model.student={tmp_path / 'ours'}")
        return [*models, *CHAT, f"data.path={tmp_path}"]

    return of


@pytest.mark.parametrize(
    ("template", "unlike"),
    [
        ("You are a helpful assistant.\n" + LINES, "train text train-[0-5]"),
        (LINES.replace("<{{ m", "<{{ 'the ' if m['role'] == 'system' }}{{ m"), "train text train-2"),
        (LINES.replace("<{{ m", "<{{ 'the ' if m['role'] == 'system' }}{{ m"), "validation text validation-1"),
    ],
    ids=["all", "one", "one of validation"],
)
@pytest.mark.parametrize("loss", [["loss=logit_kd"], ["loss=logit_kd", "loss.top_k=3"], ["loss=kv+logit"]], ids=str)
def test_predictions_of_texts_that_two_templates_write_otherwise_are_refused(
    conversations, tmp_path, loss, template, unlike
):
    choices = conversations(template, with_system=unlike.rpartition(" ")[2])
    with pytest.raises(ConfigError) as caught:
        assemble(short_config(*choices, *loss), RunDirectory(tmp_path / "run"), tmp_path)
    assert re.fullmatch(
        rf"{re.escape(loss[0])} is not allowed with model.teacher={tmp_path / 'theirs'}: its chat template writes {unlike} "
        rf"otherwise than that of model.student={tmp_path / 'ours'}; save both with one chat_template, or use another loss\.",
        str(caught.value),
    )


def test_predictions_of_one_model_by_one_template_are_its_own(conversations, tmp_path):
    config = short_config(*conversations(LINES), "loss=logit_kd", "trainer.lr=1e-12")
    assert do_run(config, tmp_path / "run") == "finished"
    rows = read_rows(RunDirectory(tmp_path / "run").metrics_file)
    assert all(row["logit_loss"] == pytest.approx(0, abs=1e-6) for row in rows)


def test_states_of_texts_that_two_templates_write_otherwise_are_aligned_by_segments(conversations, tmp_path):
    config = short_config(*conversations("You are a helpful assistant.\n" + LINES), "loss=relations")
    assert assemble(config, RunDirectory(tmp_path / "run"), tmp_path).splits.train.unlike == 0


@pytest.mark.parametrize("top_k", ["null", "3"])
def test_predictions_at_other_places_are_never_compared(tmp_path, top_k):
    built = assemble(short_config("loss=logit_kd", f"loss.top_k={top_k}"), RunDirectory(tmp_path), tmp_path)
    batch, longer = (built.splits.train.collate(places) for places in ([0, 1], [2, 3]))
    assert batch.teacher.ids.shape != longer.teacher.ids.shape
    other = replace(batch, teacher=longer.teacher)
    states = built.teacher.read(other, built.distiller.loss.requests)
    with pytest.raises(AssertionError, match="token by token"):
        built.distiller.compare(other, states, Phase(student_learns=True, aligner_learns=True))


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    make_llama(vocab_size=400).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    model = ModelConfig(
        name="pair",
        teacher=str(tmp_path),
        student="embedded",
        student_start="scratch",
        teacher_dtype="float32",
        gradient_checkpointing=False,
        remote_code=[],
    )
    with pytest.raises(ConfigError, match="its tokenizer gives no character offsets") as caught:
        load_teacher(model, torch.device("cpu"))
    assert str(caught.value).startswith(f"model.teacher={tmp_path} is not allowed: ")
