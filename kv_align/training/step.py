"""The one training step: a batch in, the loss and its parts out; the same lines for every arm.

`Distiller` is the one module that learns (student, aligner, and what the loss learns itself), with one `forward`, so
that whatever wraps it sees every use of its parameters. The other side is `kv_align.teacher.teacher`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from kv_align.align.aligner import Aligner
from kv_align.align.correspondence import Placement
from kv_align.align.schedule import Phase
from kv_align.data.batch import Batch
from kv_align.losses.base import Comparison, Loss, States
from kv_align.losses.functional import Masked, causal_cross_entropy
from kv_align.models.capture.prepare import Layer, Recorder, record
from kv_align.teacher.teacher import Teacher, TeacherStates, above

__all__ = ["Counts", "Distiller", "StepResult", "Teacher", "TeacherStates"]


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
        The weighted terms beside the cross-entropy: what the teacher adds to `total`.
    losses
        All parts and terms by name, unweighted and detached; shares as well.
    comparison
        What was compared, for diagnostics.
    """

    total: Float[Tensor, ""]
    alignment: Float[Tensor, ""]
    losses: dict[str, Tensor]
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
    placement
        For a loss that compares the teacher's own states, without an aligner; None for the others.
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
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.student, self.aligner, self.loss = student, aligner, loss
        self.placement, self.projection = placement, loss.projection
        self._rotated = rotated
        self.register_buffer("key_variance", key_variance)
        self.register_buffer("value_variance", value_variance)

    @property
    def compares_states(self) -> bool:
        """Whether the student is taught by the teacher's states, through an aligner or without."""
        return self.aligner is not None or self.placement is not None

    @property
    def trainable_projection(self) -> nn.Module | None:
        """What learns beside the student, with a rate and a norm of its own: the aligner, or the loss's projection."""
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
            Whether the terms move the student and the aligner at this step.
        """
        comparison = self.compare(batch, teacher, phase)
        task = causal_cross_entropy(comparison.logits, comparison.ids, comparison.scored)
        components = {name: self._share(part, counts) for name, part in self.loss.components(comparison).items()}
        terms = self.loss.terms(components)
        task_loss = task.total / max(1, counts.scored)
        alignment = sum((weights[name] * term for name, term in terms.items()), start=torch.zeros_like(task_loss))
        total = task_loss + alignment
        losses = {"task_loss": task_loss, **components, **terms, "total_loss": total}
        return StepResult(total, alignment, {name: loss.detach() for name, loss in losses.items()}, comparison)

    def compare(self, batch: Batch, teacher: TeacherStates, phase: Phase) -> Comparison:
        """Run the student and bring the teacher's states into its shape."""
        tokens = batch.student
        hidden_wanted = {"output_hidden_states": True} if teacher.hidden is not None else {}
        with record() as recorder:
            output = self.student(
                input_ids=tokens.ids,
                attention_mask=tokens.mask,
                position_ids=tokens.positions,
                use_cache=False,
                **hidden_wanted,
            )
        logits = output.logits
        if self.placement is not None:
            raw = (teacher.k, teacher.v, teacher.q, None if teacher.hidden is None else teacher.hidden[:, :, None])
            k, v, q, hidden = self.placement(
                raw, tokens.segments, batch.teacher.segments, batch.same_time, places=batch.places
            )
            plain = Comparison(logits, tokens.ids, batch.scored, batch.aligned)
            if hidden is not None:
                own = above(output.hidden_states, range(len(recorder.layers)))
                return replace(plain, student_hidden=own, teacher_hidden=hidden[:, :, 0])
            assert k is not None
            assert v is not None
            own_states = _student_states(recorder, rotated=self._rotated, queries=True)
            return replace(plain, student=own_states, source=States(k, v, q))
        target = self._target(batch, teacher, phase)
        if target is None:
            plain = Comparison(logits, tokens.ids, batch.scored, batch.aligned)
            return replace(plain, teacher_logits=teacher.logits, teacher_top=teacher.top)
        student = _student_states(recorder, rotated=self._rotated, queries=target.q is not None)
        layers = recorder.ordered()
        attention, target_attention = None, None
        if target.q is not None:
            attention = (recorder.queries(rotated=True), recorder.keys(rotated=True))
            pair = (target.q, target.k)
            target_attention = pair if self._rotated else (_rotate(pair[0], layers), _rotate(pair[1], layers))
        if not phase.student_learns:
            student = States(student.k.detach(), student.v.detach(), None)
            attention = None if attention is None else (attention[0].detach(), attention[1].detach())
        return Comparison(
            logits,
            tokens.ids,
            batch.scored,
            batch.aligned,
            student,
            target,
            attention,
            target_attention,
            self.key_variance,
            self.value_variance,
            tuple(layer.form for layer in layers if layer.form is not None),
        )

    def _target(self, batch: Batch, teacher: TeacherStates, phase: Phase) -> States | None:
        """The teacher's states in the student's shape, as they came or through the aligner; None where none are aligned."""
        if self.aligner is None or teacher.k is None or teacher.v is None:
            return teacher.target
        segments = batch.student.segments, batch.teacher.segments
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase.aligner_learns):
            return States(*self.aligner(teacher.k, teacher.v, teacher.q, *segments, batch.same_time, batch.places))

    def _share(self, part: Masked, counts: Counts) -> Tensor:
        return part.total / max(1, counts.scored if self.loss.counted == "scored" else counts.aligned)


def _student_states(recorder: Recorder, *, rotated: bool, queries: bool) -> States:
    return States(
        recorder.keys(rotated=rotated),
        recorder.values(),
        recorder.queries(rotated=rotated) if queries else None,
    )


def _rotate(states: Float[Tensor, "b l h t d"], layers: list[Layer]) -> Float[Tensor, "b l h t d"]:
    """Apply each student layer's rotary embedding to projected states."""
    # Unbound at once: of a layer taken out alone, the gradient would be a tensor of all layers' size, for each of them.
    rotated = [
        each if layer.rotation is None else layer.rotation.rotate(each)
        for each, layer in zip(states.unbind(dim=1), layers, strict=True)
    ]
    return torch.stack(rotated, dim=1)
