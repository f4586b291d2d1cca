"""What is measured on the first training examples before training: variances, and states for informed starts.

The examples do not depend on the seed. Variances are the teacher's alone, so the same in all arms; what an informed init
or layer map sees is also the student's, as it starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from kv_align.align.cka import cka_matrix
from kv_align.align.correspondence import Placement
from kv_align.align.paired_states import Calibration, Pair
from kv_align.align.time_warp import SegmentWarp
from kv_align.config.config import EvaluationConfig
from kv_align.data.batch import Batch
from kv_align.data.prepared import PreparedSplit
from kv_align.losses.base import Signal
from kv_align.models.capture.prepare import record
from kv_align.models.load import LanguageModel
from kv_align.runs.preemption import leave_if_asked
from kv_align.runs.progress import progress_bar
from kv_align.teacher.teacher import Autocast, Teacher, TeacherFor
from kv_align.training.agreement import variance


class Calibrator:
    """Reads calibration examples with both models.

    Parameters
    ----------
    evaluation
        How many examples, how many at a time.
    teacher, student
        The models; the student as it starts.
    train
        The training split.
    rotated
        Whether keys and queries are wanted after the rotary embedding.
    autocast
        Makes the context in which models run, the same as in training.
    kept
        Says whom to ask for what a teacher gives of the training split.
    """

    def __init__(
        self,
        evaluation: EvaluationConfig,
        teacher: LanguageModel,
        student: LanguageModel,
        train: PreparedSplit,
        *,
        rotated: bool,
        autocast: Autocast,
        kept: TeacherFor,
    ) -> None:
        self._autocast = autocast
        self._evaluation, self._train, self._rotated = evaluation, train, rotated
        self._teacher, self._student, self._kept = teacher, student, kept

    def key_value_variance(self, teacher: Teacher, layers: list[int]) -> tuple[Tensor, Tensor]:
        """Variance [L_s] of the teacher's raw keys and values at each student layer's teacher layer."""
        found: dict[str, list[Tensor]] = {"k": [], "v": []}
        tokens, kept = [], self._kept(teacher, "keys_values")
        for batch in self._batches():
            with self._autocast():
                states = kept.read(batch, "keys_values")
            assert states.k is not None
            assert states.v is not None
            found["k"].append(variance(states.k, batch.teacher.mask))
            found["v"].append(variance(states.v, batch.teacher.mask))
            tokens.append(batch.teacher.mask.sum().double())
        key, value = (_averaged(found[kind], tokens)[teacher.places(layers)] for kind in ("k", "v"))
        return key, value

    def hidden_variance(self, teacher: Teacher, layers: list[int]) -> Tensor:
        """Variance [L_s] of the teacher's hidden states above each student layer's teacher layer."""
        found, tokens, kept = [], [], self._kept(teacher, "hidden_states")
        for batch in self._batches():
            with self._autocast():
                states = kept.read(batch, "hidden_states").hidden
            assert states is not None
            found.append(variance(states[:, :, None], batch.teacher.mask))
            tokens.append(batch.teacher.mask.sum().double())
        return _averaged(found, tokens)[teacher.places(layers)]

    @torch.no_grad()
    def paired(self, teacher: Teacher, placement: Placement, *, queries: bool) -> Calibration:
        """States of both models at the student's tokens that have a target.

        It keeps all of them: tokens x layers x heads x width numbers of each model and kind. Where the control shuffles the
        teacher's texts, the pairs are as mismatched as in training.
        """
        signal: Signal = "keys_values_queries" if queries else "keys_values"
        found: dict[str, list[Tensor]] = {}
        kept = self._kept(teacher, signal)
        model, was_training = self._student.model, self._student.model.training
        model.eval()
        for batch in self._batches():
            tokens = batch.student
            with self._autocast():
                states = kept.read(batch, signal)
                with record() as recorder:
                    model.base_model(
                        input_ids=tokens.ids, attention_mask=tokens.mask, position_ids=tokens.positions, use_cache=False
                    )
            raw = (states.k, states.v, states.q)
            segments = tokens.segments, batch.teacher.segments
            placed = placement(raw, *segments, batch.same_time, torch.float32, batch.places)
            own = (
                recorder.keys(rotated=self._rotated),
                recorder.values(),
                recorder.queries(rotated=self._rotated) if queries else None,
            )
            for name, each in (
                *zip(("tk", "tv", "tq"), placed, strict=True),
                *zip(("sk", "sv", "sq"), own, strict=True),
            ):
                if each is not None:
                    paired = rearrange(each.float(), "b l h s d -> b s l h d")[batch.aligned]
                    found.setdefault(name, []).append(paired)
        model.train(was_training)
        joined = {name: torch.cat(batches) for name, batches in found.items()}
        query = Pair(joined["tq"], joined["sq"]) if queries else None
        return Calibration(Pair(joined["tk"], joined["sk"]), Pair(joined["tv"], joined["sv"]), query)

    def similarity(self, time_warp: SegmentWarp) -> list[list[float]]:
        """Linear CKA [L_s][L_t] between both models' layers, of all heads side by side, averaged over keys and values."""
        everything = list(range(self._teacher.geometry.num_layers))
        teacher = Teacher(self._teacher.model, everything, rotated=self._rotated)
        states = self.paired(teacher, Placement(everything, time_warp), queries=False)
        both = [
            cka_matrix(*(rearrange(each, "n l h d -> l n (h d)").unbind() for each in (pair.student, pair.teacher)))
            for pair in (states.key, states.value)
        ]
        similarity: list[list[float]] = ((both[0] + both[1]) / 2).tolist()
        return similarity

    def _batches(self) -> Iterator[Batch]:
        count, size = min(self._evaluation.calibration_examples, len(self._train.examples)), self._evaluation.batch_size
        with progress_bar("calibration", count, may_leave=False) as advance:
            for start in range(0, count, size):
                batch = self._train.collate(list(range(start, min(start + size, count))))
                yield batch.to(self._student.model.device)
                advance(len(batch.indices))
                leave_if_asked(together=True)


def _averaged(by_batch: list[Tensor], tokens: list[Tensor]) -> Tensor:
    """Average what batches gave by layer, weighted by their tokens."""
    weights = torch.stack(tokens) / torch.stack(tokens).sum()
    return torch.einsum("n,nl->l", weights, torch.stack(by_batch)).float()
