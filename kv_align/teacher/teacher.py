"""The frozen teacher: it gives what the loss asks of it, and nothing else.

Axes: B batch, L selected layers, H heads, R teacher tokens, D head width, E width of hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kv_align.config.signals import Signals, TopLogits
from kv_align.data.batch import Batch, Tokens
from kv_align.losses.functional import token_losses
from kv_align.losses.top_k import TopPredictions, top_predictions
from kv_align.models.capture.recorder import record
from kv_align.models.capture.states import States
from kv_align.models.devices import device_of, put_back

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
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    target: States | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __or__(self, other: TeacherStates) -> TeacherStates:
        return TeacherStates({**self.tensors, **other.tensors}, self.target or other.target)

    @property
    def raw(self) -> States:
        """Keys, values and (where these were asked for) queries, as the teacher has them."""
        return States(self["k"], self["v"], self.tensors.get("q"))

    @property
    def top(self) -> TopPredictions:
        """The likeliest tokens."""
        return TopPredictions(self["top_log_probabilities"], self["top_indices"])


class StateSource(Protocol):
    """Whoever gives a teacher's states of a split: the teacher itself, or files of what it gave."""

    def fill(self, examples: Iterable[int]) -> None:
        """Make ready what will be read of these examples of the split."""

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

    @torch.no_grad()
    def read(self, batch: Batch, signals: Signals) -> TeacherStates:
        """Run as much of the teacher as the signals need: nothing, up to the last layer wanted, or all of it."""
        return self.read_tokens(batch.teacher, signals) if signals else TeacherStates()

    @torch.no_grad()
    def read_tokens(self, tokens: Tokens, signals: Signals) -> TeacherStates:
        """Run the teacher once on tokens, wherever they are, for signals; the states come where the tokens are."""
        found = self._run(tokens.to(device_of(self.model)), signals)
        put_back(self.model)
        return TeacherStates({name: tensor.to(tokens.ids.device) for name, tensor in found.items()})

    def _run(self, tokens: Tokens, signals: Signals) -> dict[str, Tensor]:
        wanted = {name for signal in signals for name in signal.fields}
        of_layers, hidden = bool(wanted & _OF_LAYERS), "hidden" in wanted
        predicts = bool(wanted - _OF_LAYERS - {"hidden"})
        model = self.model if predicts else self.model.base_model
        with record(self.layers if of_layers else (), stop_after_last=not predicts and not hidden) as recorder:
            output = model(**tokens.inputs, use_cache=False, **({"output_hidden_states": True} if hidden else {}))
        found: dict[str, Tensor] = {}
        if of_layers:
            found |= recorder.states(rotated=self.rotated, queries="q" in wanted).tensors()
        if hidden:
            found["hidden"] = above(output.hidden_states, self.layers)
        if "logits" in wanted:
            found["logits"] = output.logits
        if "token_losses" in wanted:
            losses = token_losses(output.logits, tokens.ids, tokens.scored)
            found["token_losses"] = F.pad(losses, (1, 0))[..., None]
        for signal in signals:
            if isinstance(signal, TopLogits):
                found["top_log_probabilities"], found["top_indices"] = top_predictions(output.logits, signal)
        return found


def above(hidden_states: Sequence[Tensor], layers: Sequence[int]) -> Float[Tensor, "b l t e"]:
    """Hidden states above each of the layers; the library's first are the embeddings."""
    device = hidden_states[0].device  # a spread model's are on several
    return torch.stack([hidden_states[layer + 1].to(device) for layer in layers], dim=1)


Autocast = Callable[[], AbstractContextManager[None]]
"""Makes the context in which models run in training."""
TeacherFor = Callable[[Teacher, Signals], StateSource]
"""Says whom to ask for what a teacher gives of one split."""
