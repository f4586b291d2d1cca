"""What every loss has in common, and what it is given to compare.

A loss gives its *components* (masked sums), and says how their means make its *terms*, which are weighted in the total. It
says by `signal` what it needs of the teacher, so that the step computes that and nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from kv_align.losses.functional import Masked
from kv_align.losses.top_k import TopLogits, TopPredictions
from kv_align.models.capture.attention import AttentionSpec
from kv_align.models.capture.prepare import Geometry

Signal = (
    Literal["none", "keys_values", "keys_values_queries", "relations", "hidden_states", "logits", "token_losses"]
    | TopLogits
)
"""What is needed of the teacher; logits of the tokens that predict a scored one, elsewhere they mean nothing.

No loss asks for `token_losses`: these are what the teacher itself is measured by.
"""
Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class States:
    """Keys, values and (where asked for) queries, [B, L, H, T, D], at the student's layers, heads and tokens."""

    k: Float[Tensor, "b l hk t dk"]
    v: Float[Tensor, "b l hv t dv"]
    q: Float[Tensor, "b l hq t dk"] | None


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
        [L_s], of the teacher's hidden states at each student layer's teacher layer, fixed; None where no loss of the
        signal `hidden_states` is made.
    generator
        For what the loss draws; of no other purpose.
    vocabulary
        Tokens that both models give logits of.
    """

    teacher: Geometry
    student: Geometry
    teacher_hidden: int
    student_hidden: int
    hidden_variance: Float[Tensor, " ls"] | None
    generator: Generator
    vocabulary: int


@dataclass(frozen=True)
class Comparison:
    """All that a loss may look at, on one micro-batch.

    Attributes
    ----------
    logits, ids, scored
        The student's logits, its tokens, and which of them the cross-entropy scores.
    aligned
        [B, T], True at student tokens that have a target.
    student, target
        States as `conf/keys` says (before or after the rotary embedding); None where nothing is aligned.
    student_attention, target_attention
        (q, k) as attention uses them, after the student's rotary embedding; None where the loss needs no queries.
    key_variance, value_variance
        [L], of the teacher's raw keys and values, fixed before training and the same in all arms.
    forms
        How each student layer weighs keys.
    teacher_logits, teacher_top
        Whole, or as a `TopLogits` asks for; None where the loss needs none.
    source
        The teacher's own states, in its own heads and widths, at the student's layers and tokens; for a loss that
        compares them without an aligner.
    student_hidden, teacher_hidden
        What leaves each student layer, and the teacher's at the student's layers and tokens; as the library gives hidden
        states, so the last layer's after the final norm.
    """

    logits: Float[Tensor, "b t v"]
    ids: Int[Tensor, "b t"]
    scored: Bool[Tensor, "b t"]
    aligned: Bool[Tensor, "b t"]
    student: States | None = None
    target: States | None = None
    student_attention: tuple[Tensor, Tensor] | None = None
    target_attention: tuple[Tensor, Tensor] | None = None
    key_variance: Tensor | None = None
    value_variance: Tensor | None = None
    forms: tuple[AttentionSpec, ...] = ()
    teacher_logits: Tensor | None = None
    teacher_top: TopPredictions | None = None
    source: States | None = None
    student_hidden: Float[Tensor, "b l t i"] | None = None
    teacher_hidden: Float[Tensor, "b l t e"] | None = None


class Loss(ABC):
    """What `conf/loss/*.yaml` names: terms beside the cross-entropy.

    A subclass that has a positional parameter `pairing` is given a `Pairing`.

    Attributes
    ----------
    signal
        What it needs of the teacher; the class's own, a literal, says which choices concern it
        (`kv_align.config.signals`), an instance may ask for less.
    counted
        The tokens that its parts are means over: those the cross-entropy scores, or those that have a target.
    projection
        What it learns itself, with the aligner's rate; None where that is nothing.
    """

    signal: Signal
    counted: Literal["scored", "aligned"]
    projection: nn.Module | None = None

    @abstractmethod
    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """Masked sums by name (`key_loss`, ...)."""

    @abstractmethod
    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms by name (`kv_loss`, ...) from the means of the parts."""

    @abstractmethod
    def weights(self, step: int, num_steps: int) -> dict[str, float]:
        """Weight of each term at a step (from 0): `total = task + sum of weight * term`."""


def scheduled(value: float, decay: Decay, warmup_steps: int, step: int, num_steps: int) -> float:
    """Return a weight at a step: linear warm-up to `value`, then constant, or falling to 0 at the last step.

    Parameters
    ----------
    value
        The weight after the warm-up.
    decay, warmup_steps
        Shape of the fall (linear, or half a cosine) and length of the rise in steps.
    step, num_steps
        Steps count from 0 to num_steps - 1.
    """
    if step < warmup_steps:
        return value * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return value * factors[decay]
