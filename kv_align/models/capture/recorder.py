"""Keys, values and queries of a model's own forward pass, written down while it runs.

The attention functions registered here write what they are handed to the recorder of the current `record` block, if there
is one, and then compute what the model would have computed without them. So recording needs no cache, works under
(non-reentrant) gradient checkpointing, keeps the gradient, and changes no model code. The few decoders that call no
attention function are listened to in another way: `kv_align.models.capture.cache_tap`.

Knows nothing of which models may be recorded: that is `kv_align.models.capture.prepare`.
Axes: B batch, L recorded layers, H heads (key/value heads, or query heads), T tokens, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from kv_align.models.capture.attention import AttentionSpec
from kv_align.models.capture.rotary import Rotation, UnknownRotation
from kv_align.models.capture.states import States

SDPA, EAGER = "kv_align_sdpa", "kv_align_eager"
AS_TOLD = -1
_RECORDER: ContextVar[Recorder | None] = ContextVar("kv_align_recorder", default=None)


class Enough(Exception):  # noqa: N818 - no error: it ends a forward pass whose rest nobody needs
    """Raised inside a model when the last layer that is asked for has been recorded."""


@dataclass
class Layer:
    """What one attention layer was handed: q, k, v [B, H, T, D] after rotation, and how it weighs keys.

    `q` and `form` are None where queries are not seen.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    form: AttentionSpec | None
    rotation: Rotation | UnknownRotation | None

    @property
    def k_unrotated(self) -> Tensor:
        """Keys before the rotary embedding."""
        return self.k if self.rotation is None else self.rotation.unrotate(self.k)

    @property
    def q_unrotated(self) -> Tensor:
        """Queries before the rotary embedding."""
        assert self.q is not None
        return self.q if self.rotation is None else self.rotation.unrotate(self.q)


@dataclass(frozen=True)
class LayerFacts:
    """What `prepare` found out about an attention layer and wrote down on its module.

    Attributes
    ----------
    number
        Its place among the model's attention layers, from 0, in the order in which they run.
    window
        How many tokens back its queries were seen to look, where that is not what it tells its attention function: a
        number, or None for all. `AS_TOLD`: what it tells is true.
    """

    number: int
    window: int | None = AS_TOLD


_FACTS = "kv_align_layer"


def facts_of(module: nn.Module) -> LayerFacts | None:
    """Return what is written down on an attention layer; None if it is none of a prepared model's."""
    facts: LayerFacts | None = getattr(module, _FACTS, None)
    return facts


def write_facts(module: nn.Module, facts: LayerFacts) -> None:
    """Write down what was found out about an attention layer."""
    setattr(module, _FACTS, facts)


def number_of(module: nn.Module) -> int | None:
    """Return an attention layer's number; None if it has none."""
    facts = facts_of(module)
    return None if facts is None else facts.number


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
    attend
        The attention function of each layer as it was called, but for queries, keys and values.
    rotations
        Of layers that are about to run.
    watch
        What is told when marked tensors are multiplied, see `kv_align.models.capture.cache_tap`.
    attended
        Where it is a list: every module that attends, in order, numbered or not.
    """

    wanted: frozenset[int] | None
    stop_after: int | None
    layers: dict[int, Layer] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    attend: dict[int, Callable[..., tuple[Tensor, Tensor | None]]] = field(default_factory=dict)
    rotations: dict[nn.Module, Rotation | UnknownRotation] = field(default_factory=dict)
    watch: Callable[..., Tensor] | None = None
    attended: list[nn.Module] | None = None

    def keys(self, *, rotated: bool) -> Float[Tensor, "b l h t d"]:
        """Keys of all recorded layers, in the order of their numbers."""
        return self._stacked([layer.k for layer in self.ordered()], rotated=rotated)

    def values(self) -> Float[Tensor, "b l h t d"]:
        """Values of all recorded layers."""
        return _stacked([layer.v for layer in self.ordered()])

    def queries(self, *, rotated: bool) -> Float[Tensor, "b l h t d"]:
        """Queries of all recorded layers; more heads than keys under grouped queries."""
        return self._stacked([layer.q for layer in self.ordered() if layer.q is not None], rotated=rotated)

    def states(self, *, rotated: bool, queries: bool) -> States:
        """Keys, values and (where they are wanted) queries of all recorded layers."""
        return States(self.keys(rotated=rotated), self.values(), self.queries(rotated=rotated) if queries else None)

    def rotated(self, states: Float[Tensor, "b l h t d"]) -> Float[Tensor, "b l h t d"]:
        """Apply the rotary embedding of each recorded layer to other states; at once where all layers have the same."""
        rotation = self._rotation_of_all()
        if rotation is not None:
            return rotation.rotate(states.flatten(1, 2)).view(states.shape)
        # Unbound at once: of a layer taken out alone, the gradient would be a tensor of all layers' size, for each of them.
        layers = zip(states.unbind(dim=1), self.ordered(), strict=True)
        return torch.stack(
            [each if layer.rotation is None else layer.rotation.rotate(each) for each, layer in layers], dim=1
        )

    def _stacked(self, states: list[Tensor], *, rotated: bool) -> Float[Tensor, "b l h t d"]:
        rotation = None if rotated else self._rotation_of_all()
        if rotation is not None:
            together = _stacked(states)
            return rotation.unrotate(together.flatten(1, 2)).view(together.shape)
        if rotated:
            return _stacked(states)
        layers = zip(states, self.ordered(), strict=True)
        return _stacked([each if layer.rotation is None else layer.rotation.unrotate(each) for each, layer in layers])

    def _rotation_of_all(self) -> Rotation | None:
        """What all layers were handed, where that is one and the same."""
        first, *others = (layer.rotation for layer in self.ordered())
        return first if isinstance(first, Rotation) and all(first.is_same(each) for each in others) else None

    def ordered(self) -> list[Layer]:
        """The recorded layers in the order of their numbers."""
        return [self.layers[number] for number in sorted(self.layers)]

    def wants(self, module: nn.Module) -> bool:
        """Whether a module is a layer that is to be recorded."""
        number = number_of(module)
        return number is not None and (self.wanted is None or number in self.wanted)

    def add(self, module: nn.Module, q: Tensor | None, k: Tensor, v: Tensor, form: AttentionSpec | None) -> None:
        """Record a layer, and end the forward pass if it is the last one that is asked for."""
        number = number_of(module)
        assert number is not None
        self.layers[number] = Layer(q, k, v, form, self.rotations.get(module))
        self.modules[number] = module
        if number == self.stop_after:
            raise Enough


def current_recorder() -> Recorder | None:
    """Return the recorder of the innermost `record` block that is running; None outside of all."""
    return _RECORDER.get()


def _stacked(layers: list[Tensor]) -> Tensor:
    """Stack layers, which may be on several devices, on the first one's."""
    return torch.stack([each.to(layers[0].device) for each in layers], dim=1)


@contextmanager
def record(layers: Sequence[int] | None = None, *, stop_after_last: bool = False) -> Iterator[Recorder]:
    """Record the forward pass (without a cache) that is run inside the block, of a model that was given to `prepare`.

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
    except Enough:
        pass
    finally:
        _RECORDER.reset(token)


def record_states(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Sequence[int] | None = None,
    *,
    stop_after_last: bool = False,
) -> Recorder:
    """Run a model's decoder, without its head and without a cache, and return what was recorded.

    Parameters
    ----------
    model
        Given to `kv_align.models.capture.prepare.prepare`.
    inputs
        What it is called with, see `kv_align.data.batch.Tokens.inputs`.
    layers, stop_after_last
        See `record`.
    """
    with record(layers, stop_after_last=stop_after_last) as recorder:
        model.base_model(**inputs, use_cache=False)
    return recorder


def _recording(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    recorder, facts = _RECORDER.get(), facts_of(module)
    if recorder is not None and recorder.attended is not None:
        recorder.attended.append(module)
    if recorder is not None and facts is not None and recorder.wants(module):
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        # A copy: what stands in a parameter of the layer may be gathered only while the layer runs.
        sinks = None if kwargs.get("s_aux") is None else kwargs["s_aux"].detach().flatten().clone()
        window = kwargs.get("sliding_window") if facts.window == AS_TOLD else facts.window
        form = AttentionSpec(scaling, window, kwargs.get("softcap"), sinks)
        recorder.attend[facts.number] = partial(attention, module, attention_mask=attention_mask, **kwargs)
        recorder.add(module, query, key, value, form)
    return attention(module, query, key, value, attention_mask, **kwargs)


def own_eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Return the attention function that a layer's own modelling file falls back to; None if it has none."""
    function: Callable[..., tuple[Tensor, Tensor | None]] | None
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return function


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    attention = own_eager_attention(module)
    assert attention is not None
    return attention(module, *args, **kwargs)


AttentionInterface.register(SDPA, partial(_recording, sdpa_attention_forward))
AttentionInterface.register(EAGER, partial(_recording, _eager))
AttentionMaskInterface.register(SDPA, sdpa_mask)
AttentionMaskInterface.register(EAGER, eager_mask)
