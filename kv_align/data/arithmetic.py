"""Generated word problems in the manner of GSM8K: a name, a thing, two to five arithmetic steps, `#### answer`.

The generator is deterministic, and its three streams are disjoint by construction: a question belongs to the stream
that a hash of its text names, whichever stream it was drawn for. Imports no torch.
"""

from __future__ import annotations

import hashlib
import random

from kv_align.config.options import Count, PositiveInt
from kv_align.data.example import DataSource, Example, Split
from kv_align.runs.progress import progress_bar

# fmt: off
_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Umar", "Vera", "Will", "Yara", "Zoe",
)
_THINGS = (
    "apples", "beads", "books", "boxes", "cards", "coins", "cups", "eggs", "flowers", "keys", "lamps", "marbles",
    "nuts", "pears", "pens", "plums", "rings", "roses", "seeds", "shells", "songs", "stamps", "stones", "toys",
)
# fmt: on
_LARGEST = 200
_MOST_STEPS = 1000
_STREAM_OF_BUCKET: tuple[Split, ...] = ("train",) * 8 + ("validation", "test")


class Arithmetic(DataSource):
    """Word problems about how many things somebody has in the end.

    Parameters
    ----------
    train_examples, validation_examples, test_examples
        How many problems each split has. A larger split starts with the problems of a smaller one.
    min_steps, max_steps
        Arithmetic steps of a problem, drawn uniformly, both ends included.

    Raises
    ------
    ValueError
        If `min_steps` is above `max_steps`, or that is above a thousand.
    """

    def __init__(
        self,
        *,
        train_examples: Count = 8192,
        validation_examples: Count = 256,
        test_examples: Count = 256,
        min_steps: PositiveInt = 2,
        max_steps: PositiveInt = 5,
    ) -> None:
        if min_steps > max_steps:
            raise ValueError(f"data.min_steps={min_steps} is above data.max_steps={max_steps}: lower the first")
        if max_steps > _MOST_STEPS:
            raise ValueError(f"data.max_steps={max_steps} is above {_MOST_STEPS}, more than anybody reads: lower it")
        self._counts = {"train": train_examples, "validation": validation_examples, "test": test_examples}
        self._steps = (min_steps, max_steps)

    def examples(self, split: Split) -> list[Example]:
        """Return the problems of a split; their number is the only thing that depends on the settings' counts."""
        made = []
        with progress_bar(f"{split} problems", self._counts[split]) as advance:
            for index in range(self._counts[split]):
                made.append(self._example(split, index))
                advance(1)
        return made

    def _example(self, split: Split, index: int) -> Example:
        generator = random.Random(f"kv-align arithmetic {split} {index}")
        while True:
            question, steps, answer = _draw_problem(generator, generator.randint(*self._steps))
            if stream_of(question) == split:
                return Example(f"{split}-{index}", question, steps, str(answer))


def stream_of(question: str) -> Split:
    """Return the split that a question belongs to, by a hash of its text: 8 of 10 train, 1 validation, 1 test."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return _STREAM_OF_BUCKET[int.from_bytes(digest, "big") % len(_STREAM_OF_BUCKET)]


def _draw_problem(generator: random.Random, num_steps: int) -> tuple[str, tuple[str, ...], int]:
    name, thing = generator.choice(_NAMES), generator.choice(_THINGS)
    total = generator.randint(2, 40)
    sentences, steps = [f"{name} has {total} {thing}."], []
    for _ in range(num_steps):
        sentence, expression, total = _draw_step(generator, name, thing, total)
        sentences.append(sentence)
        steps.append(f"{expression} = {total}.")
    sentences.append(f"How many {thing} does {name} have now?")
    return " ".join(sentences), tuple(steps), total


def _draw_step(generator: random.Random, name: str, thing: str, total: int) -> tuple[str, str, int]:
    """Return the sentence of the story, the expression of the solution, and the new total (1 to `_LARGEST`)."""
    kinds = [kind for kind, possible in _possible(total).items() if possible]
    match generator.choice(kinds):
        case "add":
            amount = generator.randint(2, min(40, _LARGEST - total))
            verb = generator.choice(["buys", "finds", "gets", "wins"])
            return f"{name} {verb} {amount} more {thing}.", f"{total} + {amount}", total + amount
        case "subtract":
            amount = generator.randint(1, min(40, total - 1))
            verb = generator.choice(["gives away", "loses", "sells", "breaks"])
            return f"{name} {verb} {amount} of them.", f"{total} - {amount}", total - amount
        case "multiply":
            factor = generator.randint(2, min(4, _LARGEST // total))
            return f"A friend makes it {factor} times as many.", f"{total} * {factor}", total * factor
        case _:
            divisor = generator.choice([d for d in (2, 3, 4) if total % d == 0])
            return f"{name} keeps one of {divisor} equal parts.", f"{total} / {divisor}", total // divisor


def _possible(total: int) -> dict[str, bool]:
    return {
        "add": total <= _LARGEST - 2,
        "subtract": total >= 3,
        "multiply": total * 2 <= _LARGEST,
        "divide": any(total % divisor == 0 for divisor in (2, 3, 4)),
    }
