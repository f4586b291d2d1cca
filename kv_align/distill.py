"""The one training step: a batch in, the loss and its parts out; the same lines for every arm.

`Teacher` gives what the objective needs of the teacher and nothing else. `Distiller` is the one module that learns
(student, aligner, and what the objective learns itself), with one `forward`, so that whatever wraps it sees every use of
its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from kv_align.align.aligner import Aligner
from kv_align.align.fit import Phase
from kv_align.align.placement import Placement
from kv_align.capture import Layer, Recorder, record
from kv_align.data.batch import Batch, Tokens
from kv_align.devices import device_of, put_back
from kv_align.losses import Masked, causal_cross_entropy
from kv_align.objectives.objective import Comparison, Objective, Signal, States


@dataclass(frozen=True)
class TeacherStates:
    """What one teacher forward gave: raw states of the selected layers, or logits, or nothing of them."""

    k: Float[Tensor, "b l hk r dk"] | None = None
    v: Float[Tensor, "b l hv r dv"] | None = None
    q: Float[Tensor, "b l hq r dk"] | None = None
    logits: Tensor | None = None
    hidden: Float[Tensor, "b l r e"] | None = None


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
        self.model, self.layers, self.rotated = model, sorted(set(layers)), rotated

    def places(self, layers: Sequence[int]) -> list[int]:
        """Places of layers among those that are read."""
        return [self.layers.index(layer) for layer in layers]

    @torch.no_grad()
    def read(self, batch: Batch, signal: Signal) -> TeacherStates:
        """Run as much of the teacher as the signal needs: nothing, up to the last layer wanted, or all of it."""
        return TeacherStates() if signal == "none" else self.read_tokens(batch.teacher, signal)

    @torch.no_grad()
    def read_tokens(self, tokens: Tokens, signal: Signal) -> TeacherStates:
        """Run the teacher on tokens, wherever they are, for a signal that needs it; the states come where the tokens are."""
        found = self._run(tokens.to(device_of(self.model)), signal)
        put_back(self.model)
        device, each = tokens.ids.device, {field.name: getattr(found, field.name) for field in fields(found)}
        return TeacherStates(**{name: None if state is None else state.to(device) for name, state in each.items()})

    def _run(self, tokens: Tokens, signal: Signal) -> TeacherStates:
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "position_ids": tokens.positions}
        if signal == "logits":
            return TeacherStates(logits=self.model(**inputs, use_cache=False).logits)
        if signal == "hidden_states":
            all_states = self.model.base_model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
            return TeacherStates(hidden=_above(all_states, self.layers))
        with record(self.layers, stop_after_last=True) as recorder:
            self.model.base_model(**inputs, use_cache=False)
        return TeacherStates(
            k=recorder.keys(rotated=self.rotated),
            v=recorder.values(),
            q=recorder.queries(rotated=self.rotated) if signal in ("keys_values_queries", "relations") else None,
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
    placement
        For an objective that compares the teacher's own states, without an aligner; None for the others.
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
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.student, self.aligner, self.objective = student, aligner, objective
        self.placement, self.projection = placement, objective.projection
        self._rotated = rotated
        self.register_buffer("key_variance", key_variance)
        self.register_buffer("value_variance", value_variance)

    @property
    def compares_states(self) -> bool:
        """Whether the student is taught by the teacher's states, through an aligner or without."""
        return self.aligner is not None or self.placement is not None

    @property
    def helper(self) -> nn.Module | None:
        """What learns beside the student, with a rate and a norm of its own: the aligner, or the objective's projection."""
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
                own = _above(output.hidden_states, range(len(recorder.layers)))
                return replace(plain, student_hidden=own, teacher_hidden=hidden[:, :, 0])
            assert k is not None
            assert v is not None
            own_states = _student_states(recorder, rotated=self._rotated, queries=True)
            return replace(plain, student=own_states, source=States(k, v, q))
        if self.aligner is None or teacher.k is None or teacher.v is None:
            return Comparison(logits, tokens.ids, batch.scored, batch.aligned, teacher_logits=teacher.logits)
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase.aligner_learns):
            k, v, q = self.aligner(
                teacher.k, teacher.v, teacher.q, tokens.segments, batch.teacher.segments, batch.same_time, batch.places
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
            tuple(layer.form for layer in layers if layer.form is not None),
        )

    def _share(self, part: Masked, counts: Counts) -> Tensor:
        return part.total / max(1, counts.scored if self.objective.counted == "scored" else counts.aligned)


def _above(hidden_states: Sequence[Tensor], layers: Sequence[int]) -> Float[Tensor, "b l t e"]:
    """Hidden states above each of the layers; the library's first are the embeddings."""
    device = hidden_states[0].device  # a spread model's are on several
    return torch.stack([hidden_states[layer + 1].to(device) for layer in layers], dim=1)


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
