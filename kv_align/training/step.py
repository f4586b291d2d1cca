"""The one training step: a batch in, the loss and its parts out; the same lines for every arm.

`Distiller` is the one module that learns (student, aligner, and what the loss learns itself), with one `forward`, so
that whatever wraps it sees every use of its parameters. The other side is `kv_align.teacher.teacher`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from kv_align.align.aligner import Aligner
from kv_align.align.layer_time_map import LayerTimeMap
from kv_align.align.schedule import Phase
from kv_align.data.batch import Batch
from kv_align.losses.base import Loss
from kv_align.losses.comparison import (
    AttentionComparison,
    Comparison,
    HiddenComparison,
    LogitComparison,
    SourceComparison,
    StateComparison,
    TopLogitComparison,
)
from kv_align.losses.predictions.linear_head import predictions_of, row_losses
from kv_align.losses.predictions.next_token import CrossEntropy
from kv_align.models.capture.recorder import Recorder, record
from kv_align.models.capture.states import States
from kv_align.models.head import find_head
from kv_align.runs.errors import ConfigError
from kv_align.teacher.teacher import TeacherStates, above


@dataclass(frozen=True)
class Counts:
    """Tokens of a whole optimizer step, over all micro-batches and processes: what sums are divided by."""

    scored: int
    aligned: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Counts:
        """Count the tokens of micro-batches from their masks, before any forward."""
        return cls(sum(int(b.scored.sum()) for b in batches), sum(int(b.aligned.sum()) for b in batches))


@dataclass(frozen=True)
class StepResult:
    """One micro-batch's share of an optimizer step.

    Attributes
    ----------
    total
        What is minimised; the shares of all micro-batches add up to the step's loss.
    alignment
        The weighted terms that compare states: what is left of `total` without the cross-entropy and terms on predictions.
    losses
        All parts and terms by name, unweighted and detached; shares as well.
    token_losses
        Cross-entropy in nats of each scored token, in the order of `Tokens.predicting`.
    comparison
        What was compared, for diagnostics.
    """

    total: Float[Tensor, ""]
    alignment: Float[Tensor, ""]
    losses: dict[str, Tensor]
    token_losses: Float[Tensor, " n"]
    comparison: Comparison


class Distiller(nn.Module):
    """Student and aligner, and the loss between them and a teacher.

    Parameters
    ----------
    student
        Prepared by `kv_align.models.capture.prepare.prepare`.
    aligner
        None where nothing is aligned.
    loss
        The terms beside the cross-entropy.
    rotated
        Whether keys are compared after the rotary embedding.
    key_variance, value_variance
        [L], fixed; ones where nothing is aligned.
    layer_time_map
        For a loss that compares the teacher's own states, without an aligner; None for the others.

    Attributes
    ----------
    state_terms
        Names of the loss's terms that compare states, beside those that compare predictions.
    """

    key_variance: Tensor
    value_variance: Tensor

    def __init__(
        self,
        student: PreTrainedModel,
        aligner: Aligner | None,
        loss: Loss,
        *,
        rotated: bool,
        key_variance: Tensor,
        value_variance: Tensor,
        layer_time_map: LayerTimeMap | None = None,
    ) -> None:
        super().__init__()
        self.student, self.aligner, self.loss = student, aligner, loss
        self.layer_time_map, self.projection = layer_time_map, loss.projection
        self._rotated, self._head = rotated, find_head(student)
        self.state_terms = frozenset(
            term for part in loss.parts if any(signal.concerns for signal in part.requests) for term in part.schedules
        )
        self.register_buffer("key_variance", key_variance)
        self.register_buffer("value_variance", value_variance)

    @property
    def body(self) -> nn.Module:
        """What of the student is run: all of it, or what its head's logits are made of some rows at a time."""
        body: nn.Module = self.student if self._head is None else self.student.base_model
        return body

    @property
    def compares_states(self) -> bool:
        """Whether the student is taught by the teacher's states, through an aligner or without."""
        return self.aligner is not None or self.layer_time_map is not None

    @property
    def trainable_projection(self) -> nn.Module | None:
        """What learns beside the student, with a rate and a norm of its own: the aligner, the loss's projection, or both."""
        if self.aligner is not None and self.projection is not None:
            return nn.ModuleList((self.aligner, self.projection))
        return self.projection if self.aligner is None else self.aligner

    def forward(
        self, batch: Batch, teacher: TeacherStates, counts: Counts, weights: dict[str, float], phase: Phase
    ) -> StepResult:
        """Compute one micro-batch's share of the loss.

        Parameters
        ----------
        batch, teacher
            A micro-batch, and what the teacher made of it.
        counts
            Of the whole optimizer step.
        weights
            Of each term, at this step.
        phase
            Whether what is compared through the aligner moves the student and the aligner at this step.
        """
        comparison = self.compare(batch, teacher, phase)
        scored, aligned = max(1, counts.scored), max(1, counts.aligned)
        components = {
            name: component.total / (scored if part.counted == "scored" else aligned)
            for part in self.loss.parts
            for name, component in part.components(comparison).items()
        }
        of_rows = {name: loss for part in self.loss.parts for name, loss in part.row_losses(comparison).items()}
        task = CrossEntropy(batch.student.predicted)
        token_losses, *others = row_losses(comparison.predictions, [task, *of_rows.values()])
        components |= {name: each.sum() / scored for name, each in zip(of_rows, others, strict=True)}
        terms = self.loss.terms(components)
        task_loss = token_losses.sum() / scored
        nothing, of_states = torch.zeros_like(task_loss), self.state_terms
        alignment = sum((weights[name] * term for name, term in terms.items() if name in of_states), start=nothing)
        beside = sum((weights[name] * term for name, term in terms.items() if name not in of_states), start=nothing)
        total = task_loss + alignment + beside
        losses = {"task_loss": task_loss, **components, **terms, "total_loss": total}
        detached = {name: loss.detach() for name, loss in losses.items()}
        return StepResult(total, alignment, detached, token_losses.detach(), comparison)

    def compare(self, batch: Batch, teacher: TeacherStates, phase: Phase) -> Comparison:
        """Run the student, and lay beside it what the loss's signals compare."""
        tokens, parts = batch.student, list[object]()
        wants_hidden = {"output_hidden_states": True} if "hidden" in teacher else {}
        with record() as recorder:
            output = self.body(**tokens.inputs, use_cache=False, **wants_hidden)
        if self.aligner is not None:
            parts += self._projected(recorder, self._target(self.aligner, batch, teacher, phase), phase)
        parts += self._unprojected(recorder, output.hidden_states, batch, teacher, phase)
        predicting = tokens.predicting
        by_token = teacher.predictions is not None or "top_indices" in teacher
        assert not by_token or tokens.ids.shape == batch.teacher.ids.shape, "predictions are compared token by token"
        if teacher.predictions is not None:
            parts.append(LogitComparison(teacher.predictions.at(predicting)))
        if "top_indices" in teacher:
            parts.append(TopLogitComparison(teacher.top.at(predicting)))
        return Comparison(predictions_of(output, self._head).at(predicting), batch.aligned, tuple(parts))

    def _target(self, aligner: Aligner, batch: Batch, teacher: TeacherStates, phase: Phase) -> States:
        """The teacher's states in the student's shape, as they came or through the aligner."""
        if teacher.target is not None:
            return teacher.target
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase.aligner_learns):
            return aligner(teacher.raw, batch.correspondence)

    def _projected(self, recorder: Recorder, target: States, phase: Phase) -> list[object]:
        """Compare the student's states with the projected teacher's and, where there are queries, their attention."""
        student = recorder.states(rotated=self._rotated, queries=target.q is not None)
        for name, own in student.tensors().items():
            if own.shape != target.tensors()[name].shape:  # broadcasting would compare them all the same
                raise ConfigError(
                    f"the aligner gives {name} of the shape {list(target.tensors()[name].shape)} where the student's have "
                    f"{list(own.shape)} (batch, layers, heads, tokens, width): correct what its map returns."
                )
        layers = recorder.ordered()
        attention = []
        if target.q is not None:
            q, k = recorder.queries(rotated=True), recorder.keys(rotated=True)
            pair = (target.q, target.k)
            target_q, target_k = pair if self._rotated else (recorder.rotated(each) for each in pair)
            if not phase.student_learns:
                q, k = q.detach(), k.detach()
            forms = tuple(layer.form for layer in layers if layer.form is not None)
            attention = [AttentionComparison(q, k, target_q, target_k, forms)]
        if not phase.student_learns:
            student = States(student.k.detach(), student.v.detach())
        return [StateComparison(student, target, self.key_variance, self.value_variance), *attention]

    def _unprojected(
        self,
        recorder: Recorder,
        hidden_states: tuple[Tensor, ...] | None,
        batch: Batch,
        teacher: TeacherStates,
        phase: Phase,
    ) -> list[object]:
        """Compare what the teacher has itself, in its own heads and widths, at the student's layers and tokens."""
        layer_time_map = self.layer_time_map if self.aligner is None else self.aligner.placement
        wanted = [signal for signal in self.loss.requests if signal.concerns and not signal.through_aligner]
        if layer_time_map is None or not wanted:
            return []
        raw = {name: teacher[name] for signal in wanted for name in signal.fields}
        if hidden_states is not None:
            raw["hidden"] = raw["hidden"][:, :, None]  # an axis of heads
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase.aligner_learns):
            mapped = layer_time_map(raw, batch.correspondence)
        compared: list[object] = []
        if hidden_states is not None:
            own = above(hidden_states, range(len(recorder.layers)))
            compared.append(HiddenComparison(own, mapped.pop("hidden")[:, :, 0]))
        if mapped:
            source = States(**mapped)
            student = recorder.states(rotated=self._rotated, queries=source.q is not None)
            compared.append(SourceComparison(student, source))
        return compared
