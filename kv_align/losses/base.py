"""What every loss has in common.

A loss gives its *components* (masked sums of what it compares token by token, and losses of predictions, row by row, which
are summed by whoever makes the logits); of their means come its *terms*, which are weighted in the total, each by a
schedule. It says by `signals` what it asks of the teacher, so that the step computes that and nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from jaxtyping import Float
from torch import Generator, Tensor, nn

from kv_align.config.options import Decay
from kv_align.config.signals import SIGNALS, Signals
from kv_align.losses.comparison import Comparison
from kv_align.losses.functional import Masked
from kv_align.losses.predictions.linear_head import RowLoss
from kv_align.models.capture.prepare import Geometry
from kv_align.runs.errors import ConfigError


@dataclass(frozen=True)
class Pairing:
    """What a loss may have to know of the two models before training.

    Attributes
    ----------
    teacher, student
        The shapes of their attention.
    teacher_hidden, student_hidden
        Widths of their hidden states.
    hidden_variance
        Measures the variance [L_s] of the teacher's hidden states at each student layer's teacher layer; for a loss of
        the signal `hidden_states`.
    generator
        For what the loss draws; of no other purpose.
    vocabulary
        Tokens that both models give logits of.
    """

    teacher: Geometry
    student: Geometry
    teacher_hidden: int
    student_hidden: int
    hidden_variance: Callable[[], Float[Tensor, " ls"]]
    generator: Generator
    vocabulary: int


@dataclass(frozen=True)
class Schedule:
    """A term's weight from step to step: a linear warm-up to `value`, then constant, or falling to 0 at the last step.

    Attributes
    ----------
    value
        The weight after the warm-up.
    decay, warmup_steps
        Shape of the fall (linear, or half a cosine; None: constant) and length of the rise in steps (None: 0).
    """

    value: float
    decay: Decay | None = None
    warmup_steps: int | None = None

    def at(self, step: int, num_steps: int) -> float:
        """Return the weight at a step; steps count from 0 to num_steps - 1."""
        warmup_steps = self.warmup_steps or 0
        if step < warmup_steps:
            return self.value * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
        factors = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.value * factors[self.decay or "constant"]


class Loss(ABC):
    """What `conf/loss/*.yaml` names: terms beside the cross-entropy.

    A subclass says what it asks for and gives `components`. One whose components are its terms, each with a weight in
    `schedules`, needs no more. If it has a positional parameter `pairing`, it is given a `Pairing`.

    Attributes
    ----------
    signals
        Names of what it asks of the teacher, see `kv_align.config.signals.SIGNALS`; a literal, which is read from the
        source: it says which choices concern a run with this loss.
    counted
        The tokens that its components are means over: those the cross-entropy scores, or those that have a target.
    learns_projection
        Whether it has a `projection`; a literal as well.
    projection
        What it learns itself, with the aligner's rate; None where that is nothing.
    schedules
        The weight of each term.
    """

    signals: tuple[str, ...]
    counted: Literal["scored", "aligned"]
    learns_projection: bool = False
    projection: nn.Module | None = None
    schedules: Mapping[str, Schedule] = MappingProxyType({})

    @property
    def requests(self) -> Signals:
        """What it asks of the teacher; what it is, an instance may say more closely than its class does."""
        return tuple(SIGNALS[name] for name in self.signals)

    @property
    def parts(self) -> tuple[Loss, ...]:
        """The losses that it is composed of; itself where it is not composed."""
        return (self,)

    @abstractmethod
    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """Masked sums by name (`key_loss`, ...)."""

    def row_losses(self, comparison: Comparison) -> dict[str, RowLoss]:
        """Losses of the student's predictions of the scored tokens, by name (`logit_loss`); by default there are none."""
        return {}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms by name (`kv_loss`, ...) from the means of the components; by default the components of the same names."""
        if missing := self.schedules.keys() - means.keys():
            raise ConfigError(
                f"{type(self).__name__} has the terms {', '.join(self.schedules)} in its schedules and the components "
                f"{', '.join(means)}: give {', '.join(sorted(missing))} in components, or write a method terms."
            )
        return {term: means[term] for term in self.schedules}

    def weights(self, step: int, num_steps: int) -> dict[str, float]:
        """Weight of each term at a step (from 0): `total = task + sum of weight * term`."""
        return {term: schedule.at(step, num_steps) for term, schedule in self.schedules.items()}
