"""What is measured of a student, on the same examples in every arm: loss and perplexity, exact match, alignment, probe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kv_align.align.layer_map.fixed import proportional
from kv_align.align.schedule import Phase
from kv_align.align.time_warp import SegmentWarp, resample
from kv_align.config.config import EvaluationConfig
from kv_align.config.signals import KEYS_VALUES, TOKEN_LOSSES
from kv_align.data.batch import Batch
from kv_align.data.encode import Encoded
from kv_align.data.prepared import PreparedSplit
from kv_align.evaluation.answers import gold_answer, written_answer
from kv_align.evaluation.exact_match import asked, generate_answers
from kv_align.evaluation.probe import ProbeResult, ridge_r2, tokens_by_layer
from kv_align.models.capture.recorder import record_states
from kv_align.models.evaluating import evaluating
from kv_align.models.load import LanguageModel
from kv_align.runs.preemption import leave_if_asked
from kv_align.runs.progress import progress_bar
from kv_align.teacher.teacher import Autocast, StateSource, Teacher, TeacherFor
from kv_align.training.agreement import Agreement, KindAgreement
from kv_align.training.step import Counts, Distiller


@dataclass(frozen=True)
class Validation:
    """A student on the validation split.

    Attributes
    ----------
    loss
        Cross-entropy in nats per scored token.
    losses
        The loss's components and terms, unweighted.
    quality
        Agreement by kind; empty where nothing is aligned.
    outcomes
        A row for each example: `id`, `loss_nats` (summed over its scored tokens), `tokens`.
    """

    loss: float
    losses: dict[str, float]
    quality: dict[str, KindAgreement]
    outcomes: list[dict[str, Any]]

    def row(self) -> dict[str, Any]:
        """Columns for the evaluations file."""
        losses = {f"validation_{name}": value for name, value in self.losses.items() if name != "total_loss"}
        agreement = {name: value for kind, each in self.quality.items() for name, value in each.row(kind).items()}
        return {
            "validation_loss": self.loss,
            "validation_perplexity": math.exp(min(self.loss, 700)),
            **losses,
            **agreement,
        }


class Evaluator:
    """Holds what stays the same from one evaluation to the next.

    Parameters
    ----------
    config
        Which examples, how many at a time.
    validation, test
        The splits.
    student, teacher
        The models; the student's is the one being trained.
    autocast
        Makes the context in which models run, the same as in training.
    kept
        Says whom to ask for what a teacher gives of the validation split.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        validation: PreparedSplit,
        test: PreparedSplit,
        student: LanguageModel,
        teacher: LanguageModel,
        autocast: Autocast,
        kept: TeacherFor,
    ) -> None:
        self._config = config
        self._validation, self._test = validation, test
        self._student, self._autocast = student, autocast
        self._teacher_layers = proportional(teacher.geometry.num_layers, student.geometry.num_layers, 0)
        # Keys as they are, for a pair of which one cannot turn them back.
        self._rotated = any(each.geometry.fixed_rotation is not None for each in (teacher, student))
        self._raw_teacher = kept(Teacher(teacher.model, self._teacher_layers, rotated=self._rotated), (KEYS_VALUES,))
        self._teacher_losses = kept(Teacher(teacher.model, [], rotated=False), (TOKEN_LOSSES,))

    def prepare(self) -> None:
        """Have at hand what the last evaluation asks of the teacher, lest it find a disk full after all of the training."""
        self._teacher_losses.fill(self._examples(self._config.validation_examples))

    @torch.no_grad()
    def validate(self, distiller: Distiller, teacher: StateSource) -> Validation:
        """Loss, agreement and per-example outcomes of the student on the validation split."""
        teacher.fill(self._examples(self._config.validation_examples))
        totals: dict[str, float] = {}
        quality, outcomes, scored = Agreement(), [], 0
        phase = Phase(student_learns=True, aligner_learns=True)
        with evaluating(distiller):
            batches = self._collated(self._config.validation_examples)
            counts = Counts.of(batches)
            weights = distiller.loss.weights(0, 1)
            for batch in _one_by_one(batches):
                own_batch = batch.to(self._student.model.device)
                with self._autocast():
                    states = teacher.read(own_batch, distiller.loss.requests)
                    result = distiller(own_batch, states, counts, weights, phase)
                quality.add(result.comparison)
                for name, loss in result.losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.item()
                outcomes += _per_example(result.token_losses, own_batch, self._validation)
                scored += int(own_batch.scored.sum())
        loss = sum(row["loss_nats"] for row in outcomes) / max(1, scored)
        return Validation(loss, {k: v for k, v in totals.items() if k != "task_loss"}, quality.result(), outcomes)

    @torch.no_grad()
    def teacher_loss(self) -> float:
        """Cross-entropy in nats per scored token of the teacher on the validation split as it reads it."""
        total, scored = 0.0, 0
        for batch in _one_by_one(self._collated(self._config.validation_examples)):
            with self._autocast():
                losses = self._teacher_losses.read(batch, (TOKEN_LOSSES,))["token_losses"]
            total += losses.sum().item()
            scored += int(batch.teacher.scored.sum())
        return total / max(1, scored)

    def exact_match(self, split_name: str, limit: int) -> list[dict[str, Any]]:
        """Generate answers to the first `limit` examples that have one.

        Returns
        -------
        A row for each example: `id`, `answered` (what was written, or None), `correct`.
        """
        split = self._validation if split_name == "validation" else self._test
        chosen = asked(split, limit)
        if not chosen:
            return []
        encoded: list[Encoded] = [split.student[place] for place in chosen]
        with progress_bar("exact match", len(chosen), may_leave=False) as advance:

            def progress(answered: int) -> None:
                advance(answered)
                leave_if_asked(together=True)

            answers = generate_answers(
                self._student.model,
                self._student.tokenizer,
                encoded,
                batch_size=self._config.batch_size,
                max_new_tokens=self._config.max_new_tokens,
                progress=progress,
            )
        rows = []
        for place, text in zip(chosen, answers, strict=True):
            example = split.examples[place]
            answer, right = written_answer(text, split.answers), gold_answer(str(example.answer), split.answers)
            rows.append(
                {
                    "id": example.id,
                    "answered": None if answer is None else str(answer),
                    "correct": answer is not None and answer == right,
                }
            )
        return rows

    @torch.no_grad()
    def probe(self) -> ProbeResult:
        """R² of ridge regressions from raw teacher to student states: fitted on half of the examples, measured on half."""
        layers = self._teacher_layers
        self._raw_teacher.fill(self._examples(self._config.probe_examples))
        places = {layer: place for place, layer in enumerate(sorted(set(layers)))}
        warp = SegmentWarp(smoothness=0.0, ratios={})
        halves: dict[str, list[list[Tensor]]] = {kind: [[], []] for kind in ("xk", "yk", "xv", "yv")}
        with evaluating(self._student.model):
            for number, batch in enumerate(_one_by_one(self._collated(self._config.probe_examples))):
                here = batch.to(self._student.model.device)
                with self._autocast():
                    states = self._raw_teacher.read(here, (KEYS_VALUES,))
                    recorder = record_states(self._student.model, here.student.inputs)
                order = [places[layer] for layer in layers]
                pairs = {"xk": states["k"][:, order], "xv": states["v"][:, order]}
                if not here.correspondence.same_time:
                    weights = warp.matrix(here.correspondence)
                    pairs = {kind: resample(each, weights) for kind, each in pairs.items()}
                pairs |= {"yk": recorder.keys(rotated=self._rotated), "yv": recorder.values()}
                for kind, each in pairs.items():
                    halves[kind][number % 2].append(tokens_by_layer(each, here.aligned))
        halved = {kind: [torch.cat(half, dim=1) for half in both] for kind, both in halves.items()}
        ridge = self._config.probe_ridge

        def by_layer(x: list[Tensor], y: list[Tensor]) -> list[float]:
            return [ridge_r2(x[0][at], y[0][at], x[1][at], y[1][at], ridge) for at in range(len(layers))]

        return ProbeResult(by_layer(halved["xk"], halved["yk"]), by_layer(halved["xv"], halved["yv"]))

    def _examples(self, limit: int) -> range:
        return range(min(limit, len(self._validation.examples)))

    def _collated(self, limit: int) -> list[Batch]:
        """Matched batches of the first `limit` examples; at least two where there are two examples."""
        examples = self._examples(limit)
        size = max(1, min(self._config.batch_size, (len(examples) + 1) // 2))
        return [self._validation.collate(list(examples[start : start + size])) for start in examples[::size]]


def _one_by_one(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Show how far an evaluation is, and leave between two batches if asked to: what is done with one is done in the loop."""
    with progress_bar("evaluation", sum(len(batch.indices) for batch in batches), may_leave=False) as advance:
        for batch in batches:
            yield batch
            advance(len(batch.indices))
            leave_if_asked(together=True)


def _per_example(token_losses: Tensor, batch: Batch, split: PreparedSplit) -> list[dict[str, Any]]:
    texts, length = batch.student.ids.shape
    losses = token_losses.new_zeros(texts).index_add(0, batch.student.predicting // length, token_losses).tolist()
    tokens = batch.scored[:, 1:].sum(dim=1).tolist()
    return [
        {"id": split.examples[place].id, "loss_nats": loss, "tokens": count}
        for place, loss, count in zip(batch.indices, losses, tokens, strict=True)
    ]


def share_correct(answers: list[dict[str, Any]]) -> float | None:
    """Return the share of right answers; None where none were asked for."""
    return sum(row["correct"] for row in answers) / len(answers) if answers else None
