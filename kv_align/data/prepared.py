"""A data source, read by both models: what training and evaluation draw from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from kv_align.config.config import Config, DataConfig
from kv_align.data.batch import Collator
from kv_align.data.encode import Encoded, Written, write
from kv_align.data.example import DataSource, Example, Segment, Split
from kv_align.data.token_cache import tokenised
from kv_align.models.load import LanguageModel
from kv_align.runs.errors import ConfigError
from kv_align.runs.progress import progress_bar


@dataclass(frozen=True)
class PreparedSplit:
    """The examples of a split, as the student and as the teacher reads each.

    Attributes
    ----------
    examples
        As the source gave them, without those that leave the student nothing to be scored on.
    student, teacher
        Their tokens; the same list object where both read the same.
    collate
        Puts examples, by their places here, into a batch (matched pairs, also where training shuffles them).
    answers
        What the examples' answers are: numbers or texts.
    dropped
        Examples left out because nothing of them would be scored.
    cut, teacher_cut
        Texts longer than the limit, as the student and as the teacher reads them.
    """

    examples: list[Example]
    student: list[Encoded]
    teacher: list[Encoded]
    collate: Collator
    answers: Literal["number", "text"]
    dropped: int
    cut: int
    teacher_cut: int

    @property
    def ids(self) -> list[str]:
        """The examples' ids."""
        return [example.id for example in self.examples]

    @property
    def unlike(self) -> int | None:
        """The place of the first text of which the two models read other tokens or segments; None where there is none."""
        if self.teacher is self.student:
            return None
        both = zip(self.student, self.teacher, strict=True)
        return next((place for place, (ours, theirs) in enumerate(both) if ours != theirs), None)


def prepare_split(
    source: DataSource,
    split: Split,
    config: DataConfig,
    student: LanguageModel,
    teacher: LanguageModel,
    *,
    shuffle: bool,
) -> PreparedSplit:
    """Read a split.

    Parameters
    ----------
    source, split, config
        Where the texts come from and how they are read.
    student, teacher
        Each reads with its own tokenizer; the student may be shown a shortened reasoning.
    shuffle
        Whether the teacher reads another example's text (control; in training alone).

    Raises
    ------
    ConfigError
        If the source cannot be read, or nothing is left.
    """
    every = config.rationale_every or 1
    try:
        examples = source.examples(split)
        shown = write((example.with_rationale(config.rationale, every) for example in examples), student.tokenizer)
        all_of_it = write(examples, teacher.tokenizer)
    except (ValueError, OSError) as error:  # the second where the hub cannot be reached
        raise ConfigError(f"data={config.name} cannot be read: {error}.") from error

    def tokens(written: list[Written], reader: LanguageModel, role: str) -> list[Encoded]:
        with progress_bar(f"{split} texts of the {role}", len(written)) as advance:
            return tokenised(written, reader.tokenizer, config.max_length, advance)

    seen = tokens(shown, student, "student")
    kept = [place for place, encoded in enumerate(seen) if _is_scored(encoded)]
    if not kept:
        raise ConfigError(
            f"data.max_length={config.max_length} leaves no token to score in the {len(examples)} texts of the {split} "
            "split: raise it."
        )
    alike = same_tokenizer(student.tokenizer, teacher.tokenizer)
    read = seen if alike and shown == all_of_it else tokens(all_of_it, teacher, "teacher")
    same_text = _written_alike(shown, all_of_it)
    student_kept = [seen[place] for place in kept]
    teacher_kept = student_kept if read is seen else [read[place] for place in kept]
    collate = Collator(
        student_kept,
        teacher_kept,
        student_pad_id=student.pad_id,
        teacher_pad_id=teacher.pad_id,
        shuffle_teacher=shuffle,
        matched=() if alike else same_text,
    )
    return PreparedSplit(
        [examples[place] for place in kept],
        student_kept,
        teacher_kept,
        collate,
        answers=config.answers,
        dropped=len(examples) - len(kept),
        cut=sum(encoded.cut for encoded in student_kept),
        teacher_cut=sum(encoded.cut for encoded in teacher_kept),
    )


def _written_alike(shown: list[Written], all_of_it: list[Written]) -> list[Segment]:
    """Return the segments that both models are given in the same words, in every text."""
    different = {
        segment
        for ours, theirs in zip(shown, all_of_it, strict=True)
        if ours != theirs
        for segment in Segment
        if [text for its, text in ours.segments if its == segment]
        != [text for its, text in theirs.segments if its == segment]
    }
    return [segment for segment in (Segment.QUESTION, Segment.ANSWER, Segment.REASONING) if segment not in different]


def check_read_alike(config: Config, splits: dict[str, PreparedSplit]) -> None:
    """Refuse texts that chat templates write otherwise for each model, where predictions are compared token by token.

    Raises
    ------
    ConfigError
        If there is one in these splits, by name.
    """
    for name, split in splits.items():
        if split.unlike is not None:
            raise ConfigError(
                f"loss={config.loss.name} is not allowed with model.teacher={config.model.teacher}: its chat template writes "
                f"{name} text {split.ids[split.unlike]} otherwise than that of model.student={config.model.student}; save "
                "both with one chat_template, or use another loss."
            )


def same_tokenizer(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers cut every text alike."""
    special = (a.bos_token_id, a.eos_token_id) == (b.bos_token_id, b.eos_token_id)
    written = a.backend_tokenizer.to_str(), b.backend_tokenizer.to_str()
    return bool(special and (written[0] == written[1] or _rules(written[0]) == _rules(written[1])))


def _rules(written: str) -> dict[str, Any]:
    """What a tokenizer does with a text; how long it may be and how it is padded, each call says anew."""
    rules: dict[str, Any] = json.loads(written)
    return rules | {"truncation": None, "padding": None}


def _is_scored(encoded: Encoded) -> bool:
    return any(segment in (Segment.REASONING, Segment.ANSWER) for segment in encoded.segments[1:])
