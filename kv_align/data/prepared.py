"""A data source, read by both models: what training and evaluation draw from."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from kv_align.config.config import DataConfig
from kv_align.data.batch import Collator
from kv_align.data.encode import Encoded, encode
from kv_align.data.example import DataSource, Example, Segment, Split
from kv_align.models.load import LanguageModel
from kv_align.runs.errors import ConfigError


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
    dropped, cut
        Examples left out because nothing of them would be scored, and student texts longer than the limit.
    """

    examples: list[Example]
    student: list[Encoded]
    teacher: list[Encoded]
    collate: Collator
    dropped: int
    cut: int

    @property
    def ids(self) -> list[str]:
        """The examples' ids."""
        return [example.id for example in self.examples]


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
    try:
        examples = source.examples(split)
    except (ValueError, OSError) as error:  # the second where the hub cannot be reached
        raise ConfigError(f"data={config.name} cannot be read: {error}.") from error
    every = config.rationale_every or 1
    seen = encode((e.with_rationale(config.rationale, every) for e in examples), student.tokenizer, config.max_length)
    kept = [place for place, encoded in enumerate(seen) if _is_scored(encoded)]
    if not kept:
        raise ConfigError(
            f"data.max_length={config.max_length} leaves no token to score in the {len(examples)} texts of the {split} "
            "split: raise it."
        )
    alike = same_tokenizer(student.tokenizer, teacher.tokenizer)
    read = seen if config.rationale == "full" and alike else encode(examples, teacher.tokenizer, config.max_length)
    same_text = [Segment.QUESTION, Segment.ANSWER, *([Segment.REASONING] if config.rationale == "full" else [])]
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
        dropped=len(examples) - len(kept),
        cut=sum(encoded.cut for encoded in student_kept),
    )


def same_tokenizer(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers cut every text alike."""
    special = (a.bos_token_id, a.eos_token_id) == (b.bos_token_id, b.eos_token_id)
    return bool(special and a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str())


def _is_scored(encoded: Encoded) -> bool:
    return any(segment in (Segment.REASONING, Segment.ANSWER) for segment in encoded.segments[1:])
