"""The training steps that are measured: the arms', the floor, and what others do.

All work on the same two models, and each is a whole step: forward, backward and AdamW.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from kv_align.align.layer_map.fixed import proportional
from kv_align.align.schedule import Phase
from kv_align.config.compose import compose_config
from kv_align.config.signals import LOGITS
from kv_align.data.batch import Batch
from kv_align.data.encode import Encoded
from kv_align.experiment.choices import make_aligner, make_loss
from kv_align.losses.base import Pairing
from kv_align.models.capture.prepare import prepare
from kv_align.teacher.cache import CachedTeacher
from kv_align.teacher.entries import StateEntry
from kv_align.teacher.teacher import Teacher
from kv_align.training.step import Counts, Distiller

Autocast = Callable[[], AbstractContextManager[Any]]
_RATE = 1e-5


def autocast_on(device: torch.device) -> Autocast:
    """bfloat16 on a GPU, plain float32 on a CPU."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Models:
    """A pair on its device, recordable, and what the proportional layer map reads of the teacher."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, device: torch.device) -> None:
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.student = student.to(device)
        self.geometries = prepare(self.teacher, "teacher"), prepare(self.student, "student")
        self.layers = proportional(self.geometries[0].num_layers, self.geometries[1].num_layers, 0)
        self.device, self.autocast = device, autocast_on(device)

    def pairing(self) -> Pairing:
        """Of a loss that compares logits."""
        configs = [each.config for each in (self.teacher, self.student)]
        widths = (each.hidden_size for each in configs)
        vocabulary = min(each.vocab_size for each in configs)
        return Pairing(*self.geometries, *widths, lambda: torch.ones(1), torch.Generator(), vocabulary)


class Arm:
    """An arm's whole step, as the training loop does it."""

    def __init__(self, models: Models, *choices: str) -> None:
        config = compose_config(list(choices))[0]
        loss = make_loss(config.loss, models.pairing)
        queries = any("q" in signal.fields for signal in loss.requests)
        aligner = make_aligner(config, *models.geometries, queries=queries)
        teacher = Teacher(models.teacher, models.layers, rotated=False)
        self.teacher: Teacher | CachedTeacher = teacher
        ones = torch.ones(models.geometries[1].num_layers)
        distiller = Distiller(models.student, aligner, loss, rotated=False, key_variance=ones, value_variance=ones)
        self._distiller, self._autocast = distiller.to(models.device), models.autocast
        self.signals, self._weights = loss.requests, loss.weights(0, 1)
        self._optimizer = make_adamw(distiller.parameters())
        if LOGITS in loss.requests:
            assert teacher.head is not None  # it is looked for once, not in a step

    def read_from_cache(self, texts: list[Encoded], folder: Path) -> None:
        """Write the teacher's states of these texts, and read them from now on."""
        assert isinstance(self.teacher, Teacher)
        key: dict[str, object] = {"layers": self.teacher.layers}
        kept = StateEntry(self.teacher, texts, 0, self.signals, self._autocast)
        self.teacher = CachedTeacher([kept], self.signals, folder, key, torch.bfloat16)
        self.teacher.fill(range(len(texts)))

    def step(self, batch: Batch) -> None:
        # All tokens count; the loop counts before a batch is on its device.
        counts = Counts(batch.student.predicting.numel(), batch.student.ids.numel())
        with self._autocast():
            states = self.teacher.read(batch, self.signals)
            result = self._distiller(batch, states, counts, self._weights, Phase(True, True))
        _update(result.total, self._optimizer)


class PlainFloor:
    """Plain transformers, nothing of ours: a cross-entropy step by the model's own loss, the library's attention.

    Parameters
    ----------
    models
        The pair.
    taught
        Whether the teacher's layers, up to the last one that is read, run before it.
    """

    def __init__(self, models: Models, *, taught: bool) -> None:
        self._models, self._body = models, None
        if taught:
            self._body = copy.copy(models.teacher.base_model)
            self._body._modules = dict(self._body._modules)
            self._body.layers = self._body.layers[: max(models.layers) + 1]
        self._optimizer = make_adamw(models.student.parameters())

    def step(self, batch: Batch) -> None:
        tokens = batch.student
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "use_cache": False}
        with _library_attention(self._models.teacher, self._models.student):
            with self._models.autocast():
                if self._body is not None:
                    with torch.no_grad():
                        self._body(**inputs)
                loss = self._models.student(**inputs, labels=tokens.ids).loss
            _update(loss, self._optimizer)


@contextmanager
def _library_attention(*models: PreTrainedModel) -> Iterator[None]:
    """Context in which prepared models call the library's attention, not the recording one."""
    own = [model.config._attn_implementation for model in models]
    for model in models:
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for model, name in zip(models, own, strict=True):
            model.config._attn_implementation = name


def make_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of every step, ours and others'."""
    return torch.optim.AdamW(parameters, lr=_RATE, fused=True)


class MlpsAlone:
    """Forward and backward of the flat arm's MLPs, as plain modules on tensors that lie as they like them."""

    def __init__(self, models: Models) -> None:
        teacher, student = models.geometries
        widths = [
            (teacher.num_key_value_heads * teacher.key_width, student.num_key_value_heads * student.key_width),
            (teacher.num_key_value_heads * teacher.value_width, student.num_key_value_heads * student.value_width),
        ]
        self._mlps = [_mlp(*each).to(models.device) for each in widths for _ in range(student.num_layers)]
        self._widths = [each for each in widths for _ in range(student.num_layers)]
        self._models = models

    def inputs(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """For each MLP, an input and a gradient by its output."""
        tokens = batch.student.ids.numel()
        return [
            (
                torch.randn(tokens, width_in, device=self._models.device),
                torch.randn(tokens, width_out, device=self._models.device),
            )
            for width_in, width_out in self._widths
        ]

    def run(self, inputs: list[tuple[Tensor, Tensor]]) -> None:
        with self._models.autocast():
            outputs = [mlp(states) for mlp, (states, _) in zip(self._mlps, inputs, strict=True)]
        gradients = [by_output.to(out.dtype) for out, (_, by_output) in zip(outputs, inputs, strict=True)]
        torch.autograd.backward(outputs, gradients)
        for mlp in self._mlps:
            mlp.zero_grad()


class Literal:
    """The recipe taken literally: all that the library gives is asked for, all layers are stacked and projected.

    Teacher and student return logits, all hidden states and their caches; keys (as cached) and values of every layer are
    stacked to [B, L, H, T, D]; one map, of `structured` heads or a `flat` MLP, projects all of the teacher's layers; the
    student's layers' targets are then selected, for a mean squared error. In another reading of flat, `one vector`, heads
    and layers of a token are one vector, and an MLP as wide as that gives all of the student's.
    """

    def __init__(self, models: Models, aligner: str) -> None:
        teacher, student = models.geometries
        heads_out = student.num_key_value_heads
        width_in, width_out = teacher.key_width, student.key_width
        shape = (teacher.num_key_value_heads, heads_out, width_in, width_out)
        makes: dict[str, Callable[[], nn.Module]] = {
            "structured": lambda: _HeadByHead(*shape, models.layers),
            "flat": lambda: _Flattened(*shape, models.layers),
            "one vector": lambda: _OneVector(*shape, teacher.num_layers, student.num_layers),
        }
        self._maps = [makes[aligner]() for _ in range(2)]
        parameters = [each for one in self._maps for each in one.to(models.device).parameters()]
        self._optimizer = make_adamw([*models.student.parameters(), *parameters])
        self._models = models

    def step(self, batch: Batch) -> None:
        tokens, models = batch.student, self._models
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "use_cache": True}
        with models.autocast():
            with torch.no_grad():
                theirs = models.teacher(**inputs, output_hidden_states=True)
            ours = models.student(**inputs, output_hidden_states=True, labels=tokens.ids)
            loss = ours.loss
            for kind, project in zip(("keys", "values"), self._maps, strict=True):
                teacher_BLHTD, student_BLHTD = (_stacked(each.past_key_values, kind) for each in (theirs, ours))
                loss = loss + 0.5 * F.mse_loss(student_BLHTD, project(teacher_BLHTD))
        _update(loss, self._optimizer)


class TrlLogits:
    """TRL's distillation of the teacher's distribution on given text: its `GKDTrainer`'s own loss, forward KL.

    Only its `compute_loss` is run, on these models and with this file's AdamW: what its trainer does around it is not
    held against it.

    Raises
    ------
    ImportError
        Where TRL is not installed.
    """

    def __init__(self, models: Models) -> None:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd import GKDTrainer

        self._trainer: Any = SimpleNamespace(
            teacher_model=models.teacher, beta=0.0, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss
        )
        self._loss, self._models = GKDTrainer.compute_loss, models
        self._optimizer = make_adamw(models.student.parameters())

    def step(self, batch: Batch) -> None:
        tokens = batch.student
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "labels": tokens.ids}
        with self._models.autocast():
            loss = self._loss(self._trainer, self._models.student, inputs)
        _update(loss, self._optimizer)


class _HeadByHead(nn.Module):
    def __init__(self, heads_in: int, heads_out: int, width_in: int, width_out: int, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.mix = nn.Parameter(torch.full((heads_out, heads_in), 1 / heads_in))
        self.width = nn.Parameter(torch.randn(width_in, width_out) / width_in**0.5)

    def forward(self, states_BLHTD: Tensor) -> Tensor:
        mixed = torch.einsum("gh,blhtd->blgtd", self.mix, states_BLHTD)
        return torch.einsum("blgtd,de->blgte", mixed, self.width)[:, self.layers]


class _Flattened(nn.Module):
    def __init__(self, heads_in: int, heads_out: int, width_in: int, width_out: int, layers: list[int]) -> None:
        super().__init__()
        self.mlp, self.heads_out, self.layers = _mlp(heads_in * width_in, heads_out * width_out), heads_out, layers

    def forward(self, states_BLHTD: Tensor) -> Tensor:
        mapped = self.mlp(rearrange(states_BLHTD, "b l h t d -> b l t (h d)"))
        return rearrange(mapped, "b l t (h d) -> b l h t d", h=self.heads_out)[:, self.layers]


class _OneVector(nn.Module):
    def __init__(
        self, heads_in: int, heads_out: int, width_in: int, width_out: int, layers_in: int, layers_out: int
    ) -> None:
        super().__init__()
        self.mlp = _mlp(layers_in * heads_in * width_in, layers_out * heads_out * width_out, ratio=1)
        self.layers_out, self.heads_out = layers_out, heads_out

    def forward(self, states_BLHTD: Tensor) -> Tensor:
        mapped = self.mlp(rearrange(states_BLHTD, "b l h t d -> b t (l h d)"))
        return rearrange(mapped, "b t (l h d) -> b l h t d", l=self.layers_out, h=self.heads_out)


def _mlp(width_in: int, width_out: int, ratio: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width_in, ratio * width_in), nn.GELU(), nn.Linear(ratio * width_in, width_out))


def _stacked(cache: Any, kind: str) -> Tensor:
    return torch.stack([getattr(layer, kind) for layer in cache.layers], dim=1)


def _update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
