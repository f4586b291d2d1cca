"""Keys, values and queries of any Hugging Face decoder, read from the outside during its own forward pass.

An attention function is registered with transformers that writes what it is handed to the recorder of the current
`record` block, if there is one, and then calls the library's SDPA. So capture needs no cache, works under (non-reentrant)
gradient checkpointing, keeps the gradient, and changes no model code. Attention functions are handed keys and queries
after the rotary embedding; the rotation of each layer is read from its keyword argument `position_embeddings`, and undone.

Axes: B batch, L recorded layers, H heads (key/value heads, or query heads), T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kv_align.errors import ConfigError

IMPLEMENTATION = "kv_align_sdpa"
_RECORDER: ContextVar[Recorder | None] = ContextVar("kv_align_recorder", default=None)


class _Enough(Exception):  # noqa: N818 - no error: it ends a forward pass whose rest nobody needs
    """Raised inside a model when the last layer that is asked for has been recorded."""


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding that a layer applied: angles' cosines and sines, [B or 1, T, R], R at most the head width."""

    cos: Tensor
    sin: Tensor

    def rotate(self, states: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Rotate states of one layer (the first R numbers of each head, in halves)."""
        return self._apply(states, self.cos, self.sin)

    def unrotate(self, states: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Undo `rotate`, also where cosines and sines carry a scale (YaRN's attention scaling)."""
        cos, sin = self.cos.float(), self.sin.float()
        square = cos.square() + sin.square()
        return self._apply(states, cos / square, -sin / square)

    def _apply(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = cos.shape[-1]
        turned, rest = states[..., :width], states[..., width:]
        # At least in float32: a rotation mixes large numbers into small ones, which bf16 would round away.
        turned = turned.to(torch.promote_types(turned.dtype, torch.float32))
        first, second = turned.chunk(2, dim=-1)
        result = turned * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
        return torch.cat((result.to(states.dtype), rest), dim=-1)


@dataclass
class Layer:
    """What one attention layer was handed: q, k, v [B, H, T, D] after rotation, and how it attends."""

    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    sliding_window: int | None
    rotation: Rotation | None

    @property
    def k_unrotated(self) -> Tensor:
        """Keys before the rotary embedding."""
        return self.k if self.rotation is None else self.rotation.unrotate(self.k)

    @property
    def q_unrotated(self) -> Tensor:
        """Queries before the rotary embedding."""
        return self.q if self.rotation is None else self.rotation.unrotate(self.q)


@dataclass
class Recorder:
    """Collects the layers of one forward pass.

    Attributes
    ----------
    wanted
        Layer numbers to record; None for all.
    stop_after
        Ends the forward pass at this layer's attention; None runs to the end.
    layers
        What was recorded, by layer number.
    """

    wanted: frozenset[int] | None
    stop_after: int | None
    layers: dict[int, Layer] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    rotations: dict[nn.Module, Rotation] = field(default_factory=dict)

    def keys(self, *, rotated: bool) -> Float[Tensor, "b l h t d"]:
        """Keys of all recorded layers, in the order of their numbers."""
        return torch.stack([layer.k if rotated else layer.k_unrotated for layer in self.ordered()], dim=1)

    def values(self) -> Float[Tensor, "b l h t d"]:
        """Values of all recorded layers."""
        return torch.stack([layer.v for layer in self.ordered()], dim=1)

    def queries(self, *, rotated: bool) -> Float[Tensor, "b l h t d"]:
        """Queries of all recorded layers; more heads than keys under grouped queries."""
        return torch.stack([layer.q if rotated else layer.q_unrotated for layer in self.ordered()], dim=1)

    def ordered(self) -> list[Layer]:
        """The recorded layers in the order of their numbers."""
        return [self.layers[number] for number in sorted(self.layers)]


@contextmanager
def record(layers: Sequence[int] | None = None, *, stop_after_last: bool = False) -> Iterator[Recorder]:
    """Record the forward pass that is run inside the block, of a model that was given to `prepare`.

    Parameters
    ----------
    layers
        Layer numbers to record; None for all.
    stop_after_last
        Leave the block as soon as the last of `layers` is recorded: what the model would compute above it is not
        needed. Whatever stands after the forward pass in the block is then not reached.
    """
    wanted = None if layers is None else frozenset(layers)
    recorder = Recorder(wanted, max(wanted) if wanted and stop_after_last else None)
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    except _Enough:
        pass
    finally:
        _RECORDER.reset(token)


def _recording_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    recorder = _RECORDER.get()
    number = getattr(module, "layer_idx", None)
    if recorder is not None and number is not None and (recorder.wanted is None or number in recorder.wanted):
        scaling = kwargs.get("scaling")
        recorder.layers[number] = Layer(
            query,
            key,
            value,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            sliding_window=kwargs.get("sliding_window"),
            rotation=recorder.rotations.get(module),
        )
        recorder.modules[number] = module
        if number == recorder.stop_after:
            raise _Enough
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def _note_rotation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    recorder, embedding = _RECORDER.get(), kwargs.get("position_embeddings")
    if recorder is not None and embedding is not None:
        recorder.rotations[module] = Rotation(*embedding)


AttentionInterface.register(IMPLEMENTATION, _recording_sdpa)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@dataclass(frozen=True)
class Geometry:
    """Shapes that a model's attention really has, read from a forward pass of two tokens.

    Attributes
    ----------
    num_layers
        Attention layers.
    num_query_heads, num_key_value_heads
        Heads; fewer of the second under grouped queries.
    key_width, value_width
        Head widths (queries are as wide as keys).
    """

    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    key_width: int
    value_width: int


def prepare(model: PreTrainedModel, role: str) -> Geometry:
    """Make a model recordable, and check on two tokens that what is recorded is what it should be.

    Parameters
    ----------
    model
        A causal model; its attention implementation is replaced by a recording SDPA with the same results.
    role
        `teacher` or `student`, for messages.

    Raises
    ------
    ConfigError
        If the model does not hand its keys and values to transformers' attention interface in every layer, if the
        layers differ in shape, or if undoing the rotation does not give keys that are free of their position.
    """
    name = type(model).__name__
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except ValueError as error:
        raise ConfigError(
            f"model.{role}={name} is not supported: its attention cannot be computed by SDPA; use a decoder with "
            "plain softmax attention in every layer."
        ) from error
    modules = _two_tokens(model, 0).modules
    for module in modules.values():
        module.register_forward_pre_hook(_note_rotation, with_kwargs=True)
    near, far = _two_tokens(model, 0), _two_tokens(model, 100)
    expected = int(model.config.get_text_config().num_hidden_layers)
    if sorted(near.layers) != list(range(expected)):
        raise ConfigError(
            f"model.{role}={name} is not supported: {len(near.layers)} of its {expected} layers hand keys and values to "
            "transformers' attention interface; use a decoder with softmax attention in every layer."
        )
    first = near.layers[0]
    shapes = {(layer.q.shape, layer.k.shape, layer.v.shape) for layer in near.ordered()}
    if len(shapes) != 1:
        raise ConfigError(f"model.{role}={name} is not supported: its layers' keys differ in shape; use another model.")
    # Layer 0 sees no position but through its own rotation, unless positions are added to the embeddings.
    # What rounding leaves of it is in proportion to the largest number that was turned.
    moved = (first.k_unrotated.float() - far.layers[0].k_unrotated.float()).abs().max()
    allowed = 16 * max(torch.finfo(first.k.dtype).eps, 1e-5) * first.k.float().abs().max()
    if first.rotation is not None and moved > allowed:
        raise ConfigError(
            f"model.{role}={name} is not supported: its rotary embedding is of a form that cannot be undone here; "
            "use a model of the Llama, Qwen2 or Mistral family."
        )
    return Geometry(expected, first.q.shape[1], first.k.shape[1], first.k.shape[-1], first.v.shape[-1])


@torch.no_grad()
def _two_tokens(model: PreTrainedModel, offset: int) -> Recorder:
    """Record a forward pass of two tokens, dropout off, at positions that start at `offset`."""
    was_training = model.training
    model.eval()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or offset + 2
    positions = torch.tensor([[0, 1]], device=model.device) + min(offset, limit - 2)
    with record() as recorder:
        model(input_ids=torch.tensor([[1, 2]], device=model.device), position_ids=positions, use_cache=False)
    model.train(was_training)
    return recorder
