"""What a loss is given to look at: the student's predictions, and for each signal what it compares.

Axes: B batch, L student layers, T student tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

from kv_align.losses.predictions.linear_head import Predictions
from kv_align.losses.predictions.top_k import TopPredictions
from kv_align.models.capture.attention import AttentionSpec
from kv_align.models.capture.states import States

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class StateComparison:
    """Signals `keys_values` and `keys_values_queries`: the student's states and the teacher's, projected by the aligner.

    Attributes
    ----------
    student, target
        As `conf/keys` says (before or after the rotary embedding).
    key_variance, value_variance
        [L], of the teacher's raw keys and values, fixed before training and the same in all arms.
    """

    student: States
    target: States
    key_variance: Float[Tensor, " l"]
    value_variance: Float[Tensor, " l"]


@dataclass(frozen=True)
class AttentionComparison:
    """Signal `keys_values_queries`: queries and keys as attention uses them, after the student's rotary embedding.

    Attributes
    ----------
    student_q, student_k, target_q, target_k
        Of the student, and projected from the teacher.
    forms
        How each student layer weighs keys.
    """

    student_q: Float[Tensor, "b l hq t d"]
    student_k: Float[Tensor, "b l hk t d"]
    target_q: Float[Tensor, "b l hq t d"]
    target_k: Float[Tensor, "b l hk t d"]
    forms: tuple[AttentionSpec, ...]


@dataclass(frozen=True)
class SourceComparison:
    """Signal `relations`: the student's states, and the teacher's own, which no aligner has changed.

    Attributes
    ----------
    student
        As `conf/keys` says (before or after the rotary embedding).
    source
        In the teacher's own heads and widths, at the student's layers and tokens.
    """

    student: States
    source: States


@dataclass(frozen=True)
class HiddenComparison:
    """Signal `hidden_states`: what leaves each student layer, and the teacher's at the student's layers and tokens.

    As the library gives hidden states, so the last layer's after the final norm.
    """

    student: Float[Tensor, "b l t i"]
    teacher: Float[Tensor, "b l t e"]


@dataclass(frozen=True)
class LogitComparison:
    """Signal `logits`: the teacher's predictions of the scored tokens; the student's are in every `Comparison`."""

    teacher: Predictions


@dataclass(frozen=True)
class TopLogitComparison:
    """Signal `TopLogits`: the teacher's likeliest tokens at the places that predict a scored one, as it asks for them."""

    teacher: TopPredictions


@dataclass(frozen=True)
class Comparison:
    """All that a loss may look at, on one micro-batch.

    Attributes
    ----------
    predictions
        The student's, of the tokens that the cross-entropy scores.
    aligned
        True at student tokens that have a target.
    parts
        What the loss's signals compare, one for each kind.
    """

    predictions: Predictions
    aligned: Bool[Tensor, "b t"]
    parts: tuple[object, ...] = ()

    def of(self, kind: type[Kind]) -> Kind:
        """Return what is compared of one kind (`StateComparison`, ...).

        Raises
        ------
        LookupError
            If the loss asks for no signal that gives it.
        """
        part = self.find(kind)
        if part is None:
            raise LookupError(
                f"there is no {kind.__name__}: the loss names no signal that gives it (kv_align/config/signals.py)"
            )
        return part

    def find(self, kind: type[Kind]) -> Kind | None:
        """Return what is compared of one kind; None where the loss asks for no such signal."""
        return next((part for part in self.parts if isinstance(part, kind)), None)
