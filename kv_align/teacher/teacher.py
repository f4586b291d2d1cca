"""The frozen teacher: it gives what the loss needs of it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kv_align.data.batch import Batch, Tokens
from kv_align.losses.base import Signal, States
from kv_align.losses.functional import token_losses
from kv_align.losses.top_k import TopLogits, TopPredictions, top_predictions
from kv_align.models.capture.prepare import record
from kv_align.models.devices import device_of, put_back


@dataclass(frozen=True)
class TeacherStates:
    """What one teacher forward gave: raw states of the selected layers, or logits, or nothing of them.

    Attributes
    ----------
    k, v, q, hidden
        Of the selected layers.
    logits
        Whole.
    top_log_probabilities, top_indices
        See `TopPredictions`.
    token_losses
        Cross-entropy in nats of each token that is scored as the teacher reads it, 0 elsewhere.
    target
        Keys, values and queries that are in the student's shape already, in the place of raw ones.
    """

    k: Float[Tensor, "b l hk r dk"] | None = None
    v: Float[Tensor, "b l hv r dv"] | None = None
    q: Float[Tensor, "b l hq r dk"] | None = None
    logits: Tensor | None = None
    hidden: Float[Tensor, "b l r e"] | None = None
    top_log_probabilities: Float[Tensor, "b r k1"] | None = None
    top_indices: Int[Tensor, "b r k"] | None = None
    token_losses: Float[Tensor, "b r 1"] | None = None
    target: States | None = None

    @property
    def top(self) -> TopPredictions | None:
        """The likeliest tokens, where these were asked for."""
        if self.top_log_probabilities is None or self.top_indices is None:
            return None
        return TopPredictions(self.top_log_probabilities, self.top_indices)


class StateSource(Protocol):
    """Whoever gives a teacher's states of a split: the teacher itself, or files of what it gave."""

    def fill(self, examples: Iterable[int]) -> None:
        """Make ready what will be read of these examples of the split."""

    def read(self, batch: Batch, signal: Signal) -> TeacherStates:
        """Give what the signal needs of a batch."""


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
        if signal == "token_losses":
            losses = token_losses(self.model(**inputs, use_cache=False).logits, tokens.ids, tokens.scored)
            return TeacherStates(token_losses=F.pad(losses, (1, 0))[..., None])
        if isinstance(signal, TopLogits):
            top = top_predictions(self.model(**inputs, use_cache=False).logits, signal)
            return TeacherStates(top_log_probabilities=top.log_probabilities, top_indices=top.indices)
        if signal == "hidden_states":
            all_states = self.model.base_model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
            return TeacherStates(hidden=above(all_states, self.layers))
        with record(self.layers, stop_after_last=True) as recorder:
            self.model.base_model(**inputs, use_cache=False)
        return TeacherStates(
            k=recorder.keys(rotated=self.rotated),
            v=recorder.values(),
            q=recorder.queries(rotated=self.rotated) if signal in ("keys_values_queries", "relations") else None,
        )


def above(hidden_states: Sequence[Tensor], layers: Sequence[int]) -> Float[Tensor, "b l t e"]:
    """Hidden states above each of the layers; the library's first are the embeddings."""
    device = hidden_states[0].device  # a spread model's are on several
    return torch.stack([hidden_states[layer + 1].to(device) for layer in layers], dim=1)


Autocast = Callable[[], AbstractContextManager[None]]
"""Makes the context in which models run in training."""
TeacherFor = Callable[[Teacher, Signal], StateSource]
"""Says whom to ask for what a teacher gives of one split."""
