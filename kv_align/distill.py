"""The one training step: a batch in, the loss and its parts out; the same lines for every arm.

`Teacher` gives what the objective needs of the teacher and nothing else. `Distiller` is the one module that learns
(student and aligner), with one `forward`, so that whatever wraps it sees every use of its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from kv_align.align.aligner import Aligner
from kv_align.align.fit import Phase
from kv_align.capture import Layer, Recorder, record
from kv_align.data.batch import Batch
from kv_align.losses import Masked, causal_cross_entropy
from kv_align.objectives.objective import Comparison, Objective, Signal, States


@dataclass(frozen=True)
class TeacherStates:
    """What one teacher forward gave: raw states of the selected layers, or logits, or nothing of them."""

    k: Float[Tensor, "b l hk r dk"] | None = None
    v: Float[Tensor, "b l hv r dv"] | None = None
    q: Float[Tensor, "b l hq r dk"] | None = None
    logits: Tensor | None = None


class Teacher:
    """The frozen teacher.

    Parameters
    ----------
    model
        Prepared by `kv_align.capture.prepare`, in evaluation mode.
    layers
        The layers whose states are wanted.
    rotated
        Whether keys and queries are wanted after the rotary embedding.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], *, rotated: bool) -> None:
        self.model, self._layers, self._rotated = model, sorted(set(layers)), rotated

    @torch.no_grad()
    def read(self, batch: Batch, signal: Signal) -> TeacherStates:
        """Run as much of the teacher as the signal needs: nothing, up to the last layer wanted, or all of it."""
        if signal == "none":
            return TeacherStates()
        tokens = batch.teacher
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "position_ids": tokens.positions}
        if signal == "logits":
            return TeacherStates(logits=self.model(**inputs, use_cache=False).logits)
        with record(self._layers, stop_after_last=True) as recorder:
            self.model.base_model(**inputs, use_cache=False)
        return TeacherStates(
            k=recorder.keys(rotated=self._rotated),
            v=recorder.values(),
            q=recorder.queries(rotated=self._rotated) if signal == "keys_values_queries" else None,
        )


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
        Prepared by `kv_align.capture.prepare`.
    aligner
        None where nothing is aligned.
    objective
        The terms beside the cross-entropy.
    rotated
        Whether keys are compared after the rotary embedding.
    key_variance, value_variance
        [L], fixed; ones where nothing is aligned.
    """

    key_variance: Tensor
    value_variance: Tensor

    def __init__(
        self,
        student: PreTrainedModel,
        aligner: Aligner | None,
        objective: Objective,
        *,
        rotated: bool,
        key_variance: Tensor,
        value_variance: Tensor,
    ) -> None:
        super().__init__()
        self.student, self.aligner, self.objective = student, aligner, objective
        self._rotated = rotated
        self.register_buffer("key_variance", key_variance)
        self.register_buffer("value_variance", value_variance)

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
        parts = {name: self._share(part, counts) for name, part in self.objective.parts(comparison).items()}
        terms = self.objective.terms(parts)
        task_loss = task.total / max(1, counts.scored)
        alignment = sum((weights[name] * term for name, term in terms.items()), start=torch.zeros_like(task_loss))
        total = task_loss + alignment
        losses = {"task_loss": task_loss, **parts, **terms, "total_loss": total}
        return StepResult(total, alignment, {name: loss.detach() for name, loss in losses.items()}, comparison)

    def compare(self, batch: Batch, teacher: TeacherStates, phase: Phase) -> Comparison:
        """Run the student and bring the teacher's states into its shape."""
        tokens = batch.student
        with record() as recorder:
            logits = self.student(
                input_ids=tokens.ids, attention_mask=tokens.mask, position_ids=tokens.positions, use_cache=False
            ).logits
        if self.aligner is None or teacher.k is None or teacher.v is None:
            return Comparison(logits, tokens.ids, batch.scored, batch.aligned, teacher_logits=teacher.logits)
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase.aligner_learns):
            k, v, q = self.aligner(
                teacher.k, teacher.v, teacher.q, tokens.segments, batch.teacher.segments, batch.same_time
            )
        target = States(k, v, q)
        student = _student_states(recorder, rotated=self._rotated, queries=q is not None)
        layers = recorder.ordered()
        attention, target_attention = None, None
        if q is not None:
            attention = (recorder.queries(rotated=True), recorder.keys(rotated=True))
            target_attention = (q, k) if self._rotated else (_rotate(q, layers), _rotate(k, layers))
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
            tuple(layer.scaling for layer in layers),
            tuple(layer.sliding_window for layer in layers),
        )

    def _share(self, part: Masked, counts: Counts) -> Tensor:
        return part.total / max(1, counts.scored if self.objective.counted == "scored" else counts.aligned)


def _student_states(recorder: Recorder, *, rotated: bool, queries: bool) -> States:
    return States(
        recorder.keys(rotated=rotated),
        recorder.values(),
        recorder.queries(rotated=rotated) if queries else None,
    )


def _rotate(states: Float[Tensor, "b l h t d"], layers: list[Layer]) -> Float[Tensor, "b l h t d"]:
    """Apply each student layer's rotary embedding to projected states."""
    rotated = [
        states[:, number] if layer.rotation is None else layer.rotation.rotate(states[:, number])
        for number, layer in enumerate(layers)
    ]
    return torch.stack(rotated, dim=1)
