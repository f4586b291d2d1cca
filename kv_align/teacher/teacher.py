"""The frozen teacher: it gives what the loss asks of it, and nothing else.

Axes: B batch, L selected layers, H heads, R teacher tokens, D head width, E width of hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kv_align.config.signals import LOGITS, TOKEN_LOSSES, Signals, TopLogits
from kv_align.data.batch import Batch, Tokens
from kv_align.losses.predictions.linear_head import Predictions, predictions_of, row_losses
from kv_align.losses.predictions.next_token import CrossEntropy
from kv_align.losses.predictions.top_k import TopPredictions, top_predictions
from kv_align.models.capture.recorder import record
from kv_align.models.capture.states import States
from kv_align.models.devices import device_of, put_back
from kv_align.models.head import Head, find_head

_OF_LAYERS = {"k", "v", "q"}


@dataclass(frozen=True)
class TeacherStates:
    """What one teacher forward gave of a batch: what its signals asked for, and nothing else.

    Attributes
    ----------
    tensors
        By the names that signals give them. Of the selected layers: `k`, `v` and `q` [B, L, H, R, D], and `hidden`
        [B, L, R, E]. Of predictions: `logits` [B, R, V], or `top_log_probabilities` [B, R, K + 1] and `top_indices`
        [B, R, K] (see `TopPredictions`), or `token_losses` [B, R, 1]: cross-entropy in nats of each token that is scored
        as the teacher reads it, 0 elsewhere.
    target
        Keys, values and queries that are in the student's shape already, in the place of raw ones.
    unfinished
        What gives logits at all tokens in a row, in the place of `logits`.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    target: States | None = None
    unfinished: Predictions | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __or__(self, other: TeacherStates) -> TeacherStates:
        return TeacherStates(
            {**self.tensors, **other.tensors}, self.target or other.target, self.unfinished or other.unfinished
        )

    @property
    def raw(self) -> States:
        """Keys, values and (where these were asked for) queries, as the teacher has them."""
        return States(self["k"], self["v"], self.tensors.get("q"))

    @property
    def predictions(self) -> Predictions | None:
        """Predictions at all tokens in a row; None where nobody has asked for logits."""
        return Predictions(self["logits"].flatten(0, 1)) if "logits" in self else self.unfinished

    @property
    def top(self) -> TopPredictions:
        """The likeliest tokens."""
        return TopPredictions(self["top_log_probabilities"], self["top_indices"])


class StateSource(Protocol):
    """Whoever gives a teacher's states of a split: the teacher itself, or files of what it gave."""

    def fill(self, examples: Iterable[int]) -> None:
        """Make ready what will be read of these examples of the split."""

    def expect(self, batches: Sequence[Batch]) -> None:
        """Hear which batches are read after those that were expected before; files are read meanwhile."""

    def read(self, batch: Batch, signals: Signals) -> TeacherStates:
        """Give what the signals ask for of a batch."""


class Teacher:
    """The frozen teacher.

    Parameters
    ----------
    model
        Prepared by `kv_align.models.capture.prepare.prepare`, in evaluation mode.
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

    def fill(self, examples: Iterable[int]) -> None:
        """Do nothing: it reads a text when it is asked to."""

    def expect(self, batches: Sequence[Batch]) -> None:
        """Do nothing: it computes on the device that the step computes on."""

    @cached_property
    def head(self) -> Head | None:
        """What makes logits of the model's last hidden states; None where only the model itself does."""
        return find_head(self.model)

    @torch.no_grad()
    def read(self, batch: Batch, signals: Signals) -> TeacherStates:
        """Run as much of the teacher as the signals need: nothing, up to the last layer wanted, or all of it."""
        if not signals:
            return TeacherStates()
        tokens = batch.teacher
        tensors, predictions = self._run(tokens, signals)
        if LOGITS not in signals or predictions is None:
            return TeacherStates(tensors)
        if predictions.states.device != tokens.ids.device:
            return TeacherStates({**tensors, "logits": _logits(predictions, tokens)})
        return TeacherStates(tensors, unfinished=predictions)

    @torch.no_grad()
    def read_tokens(self, tokens: Tokens, signals: Signals) -> TeacherStates:
        """Run the teacher once on tokens, wherever they are, for signals; the states come where the tokens are."""
        tensors, predictions = self._run(tokens, signals)
        if LOGITS in signals and predictions is not None:
            tensors["logits"] = _logits(predictions, tokens)
        return TeacherStates(tensors)

    def _run(self, tokens: Tokens, signals: Signals) -> tuple[dict[str, Tensor], Predictions | None]:
        """Return tensors where the tokens are, and (where they are needed) predictions where the model is."""
        wanted = {name for signal in signals for name in signal.fields}
        of_layers, hidden = bool(wanted & _OF_LAYERS), "hidden" in wanted
        predicts = bool(wanted - _OF_LAYERS - {"hidden"})
        head = self.head if predicts else None
        model = self.model if predicts and head is None else self.model.base_model
        own_tokens = tokens.to(device_of(self.model))
        with record(self.layers if of_layers else (), stop_after_last=not predicts and not hidden) as recorder:
            output = model(**own_tokens.inputs, use_cache=False, **({"output_hidden_states": True} if hidden else {}))
        tensors: dict[str, Tensor] = {}
        if of_layers:
            tensors |= recorder.states(rotated=self.rotated, queries="q" in wanted).tensors()
        if hidden:
            tensors["hidden"] = above(output.hidden_states, self.layers)
        predictions = predictions_of(output, head) if predicts else None
        if predictions is not None:
            tensors |= _of_predictions(predictions.at(own_tokens.predicting), own_tokens, signals)
        put_back(self.model)
        return {name: tensor.to(tokens.ids.device) for name, tensor in tensors.items()}, predictions


def _of_predictions(predictions: Predictions, tokens: Tokens, signals: Signals) -> dict[str, Tensor]:
    """What signals ask for of the predictions of scored tokens, laid out by tokens; elsewhere it means nothing."""
    tensors: dict[str, Tensor] = {}
    for signal in signals:
        if isinstance(signal, TopLogits):
            top = top_predictions(predictions, signal)
            tensors["top_log_probabilities"], tensors["top_indices"] = (
                _by_tokens(each, tokens.predicting, tokens) for each in top
            )
        elif signal == TOKEN_LOSSES:
            losses = row_losses(predictions, [CrossEntropy(tokens.predicted)])[0, :, None]
            tensors["token_losses"] = _by_tokens(losses, tokens.predicting + 1, tokens)
    return tensors


def _by_tokens(rows: Shaped[Tensor, "n k"], places: Int[Tensor, " n"], tokens: Tokens) -> Shaped[Tensor, "b r k"]:
    return rows.new_zeros(tokens.ids.numel(), rows.shape[1]).index_copy(0, places, rows).view(*tokens.ids.shape, -1)


def _logits(predictions: Predictions, tokens: Tokens) -> Float[Tensor, "b r v"]:
    """Whole, as the model itself would make them."""
    if predictions.head is None:
        return predictions.states.view(*tokens.ids.shape, -1).to(tokens.ids.device)
    linear = predictions.head.linear
    products = F.linear(predictions.states, linear.weight, linear.bias)
    return predictions.head.bend.logits(products).view(*tokens.ids.shape, -1).to(tokens.ids.device)


def above(hidden_states: Sequence[Tensor], layers: Sequence[int]) -> Float[Tensor, "b l t e"]:
    """Hidden states above each of the layers; the library's first are the embeddings."""
    device = hidden_states[0].device  # a spread model's are on several
    return torch.stack([hidden_states[layer + 1].to(device) for layer in layers], dim=1)


Autocast = Callable[[], AbstractContextManager[None]]
"""Makes the context in which models run in training."""
TeacherFor = Callable[[Teacher, Signals], StateSource]
"""Says whom to ask for what a teacher gives of one split."""
