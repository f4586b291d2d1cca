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
from kv_align.align.layer_time_map import LayerTimeMap
from kv_align.align.paired_states import Calibration, Pair
from kv_align.align.time_warp import SegmentWarp
from kv_align.config.config import EvaluationConfig
from kv_align.config.signals import HIDDEN_STATES, KEYS_VALUES, KEYS_VALUES_QUERIES
from kv_align.data.batch import Batch
from kv_align.data.prepared import PreparedSplit
from kv_align.models.capture.recorder import record_states
from kv_align.models.evaluating import evaluating
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
        variances: dict[str, list[Tensor]] = {"k": [], "v": []}
        tokens, kept = [], self._kept(teacher, (KEYS_VALUES,))
        for batch in self._batches():
            with self._autocast():
                states = kept.read(batch, (KEYS_VALUES,))
            for kind, each in variances.items():
                each.append(variance(states[kind], batch.teacher.mask))
            tokens.append(batch.teacher.mask.sum().double())
        key, value = (_averaged(variances[kind], tokens)[teacher.places(layers)] for kind in ("k", "v"))
        return key, value

    def hidden_variance(self, teacher: Teacher, layers: list[int]) -> Tensor:
        """Variance [L_s] of the teacher's hidden states above each student layer's teacher layer, without first tokens'."""
        variances, tokens, kept = [], [], self._kept(teacher, (HIDDEN_STATES,))
        for batch in self._batches():
            with self._autocast():
                states = kept.read(batch, (HIDDEN_STATES,))["hidden"]
            mask = batch.teacher.mask & (batch.teacher.positions > 0)  # see `kv_align.losses.hidden`
            variances.append(variance(states[:, :, None], mask))
            tokens.append(mask.sum().double())
        return _averaged(variances, tokens)[teacher.places(layers)]

    @torch.no_grad()
    def paired(self, teacher: Teacher, layer_time_map: LayerTimeMap, *, queries: bool) -> Calibration:
        """States of both models at the student's tokens that have a target.

        It keeps all of them: tokens x layers x heads x width numbers of each model and kind. Where the control shuffles the
        teacher's texts, the pairs are as mismatched as in training.
        """
        signals = (KEYS_VALUES_QUERIES if queries else KEYS_VALUES,)
        by_name: dict[str, list[Tensor]] = {}
        kept, model = self._kept(teacher, signals), self._student.model
        with evaluating(model):
            for batch in self._batches():
                with self._autocast():
                    raw = kept.read(batch, signals).raw
                    recorder = record_states(model, batch.student.inputs)
                placed = layer_time_map(raw.tensors(), batch.correspondence, torch.float32)
                own = recorder.states(rotated=self._rotated, queries=queries).tensors()
                for whose, states in (("teacher", placed), ("student", own)):
                    for name, each in states.items():
                        paired = rearrange(each.float(), "b l h s d -> b s l h d")[batch.aligned]
                        by_name.setdefault(f"{whose} {name}", []).append(paired)
        joined = {name: torch.cat(batches) for name, batches in by_name.items()}

        def pair(name: str) -> Pair:
            return Pair(joined[f"teacher {name}"], joined[f"student {name}"])

        return Calibration(pair("k"), pair("v"), pair("q") if queries else None)

    def similarity(self, time_warp: SegmentWarp) -> list[list[float]]:
        """Linear CKA [L_s][L_t] between both models' layers, of all heads side by side, averaged over keys and values."""
        everything = list(range(self._teacher.geometry.num_layers))
        teacher = Teacher(self._teacher.model, everything, rotated=self._rotated)
        states = self.paired(teacher, LayerTimeMap(everything, time_warp), queries=False)
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
