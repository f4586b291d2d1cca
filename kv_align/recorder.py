"""Keys, values and queries of a model's own forward pass, written down while it runs.

The attention functions registered here write what they are handed to the recorder of the current `record` block, if there
is one, and then compute what the model would have computed without them. So recording needs no cache, works under
(non-reentrant) gradient checkpointing, keeps the gradient, and changes no model code. The few decoders that call no
attention function are handed a stand-in for their cache instead (`CacheTap`), which sees keys and values, but no queries.

Knows nothing of which models may be recorded: that is `kv_align.capture`.
Axes: B batch, L recorded layers, H heads (key/value heads, or query heads), T tokens, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from kv_align.rotary import RotaryForm, Rotation

SDPA, EAGER = "kv_align_sdpa", "kv_align_eager"
_RECORDER: ContextVar[Recorder | None] = ContextVar("kv_align_recorder", default=None)


class _Enough(Exception):  # noqa: N818 - no error: it ends a forward pass whose rest nobody needs
    """Raised inside a model when the last layer that is asked for has been recorded."""


@dataclass
class Layer:
    """What one attention layer was handed: q, k, v [B, H, T, D] after rotation, and how it attends.

    `q` is None, and `scaling` and `sliding_window` mean nothing, where a model calls no attention function.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    scaling: float
    sliding_window: int | None
    rotation: Rotation | None
    k_unturned: Tensor | None = None

    @property
    def k_unrotated(self) -> Tensor:
        """Keys before the rotary embedding."""
        if self.k_unturned is not None:
            return self.k_unturned
        return self.k if self.rotation is None else self.rotation.unrotate(self.k)

    @property
    def q_unrotated(self) -> Tensor:
        """Queries before the rotary embedding."""
        assert self.q is not None
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
    attend
        The attention function of each layer as it was called, but for queries, keys and values.
    """

    wanted: frozenset[int] | None
    stop_after: int | None
    layers: dict[int, Layer] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    attend: dict[int, Callable[..., tuple[Tensor, Tensor | None]]] = field(default_factory=dict)
    rotations: dict[nn.Module, Rotation] = field(default_factory=dict)
    unturned: dict[nn.Module, Tensor] = field(default_factory=dict)

    def keys(self, *, rotated: bool) -> Float[Tensor, "b l h t d"]:
        """Keys of all recorded layers, in the order of their numbers."""
        return _stacked([layer.k if rotated else layer.k_unrotated for layer in self.ordered()])

    def values(self) -> Float[Tensor, "b l h t d"]:
        """Values of all recorded layers."""
        return _stacked([layer.v for layer in self.ordered()])

    def queries(self, *, rotated: bool) -> Float[Tensor, "b l h t d"]:
        """Queries of all recorded layers; more heads than keys under grouped queries."""
        layers = [(layer.q if rotated else layer.q_unrotated) for layer in self.ordered()]
        return _stacked([q for q in layers if q is not None])

    def ordered(self) -> list[Layer]:
        """The recorded layers in the order of their numbers."""
        return [self.layers[number] for number in sorted(self.layers)]

    def wants(self, number: Any) -> bool:
        """Whether a layer of this number is to be recorded."""
        return self.wanted is None or number in self.wanted

    def add(
        self,
        module: Any,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float = float("nan"),
        sliding_window: int | None = None,
    ) -> None:
        """Record a layer, and end the forward pass if it is the last one that is asked for."""
        number = module.layer_idx
        rotation, unturned = self.rotations.get(module), self.unturned.get(module)
        self.layers[number] = Layer(q, k, v, scaling, sliding_window, rotation, unturned)
        self.modules[number] = module
        if number == self.stop_after:
            raise _Enough


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
    except _Enough:
        pass
    finally:
        _RECORDER.reset(token)


def _recording(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    recorder, number = _RECORDER.get(), getattr(module, "layer_idx", None)
    if recorder is not None and number is not None and recorder.wants(number):
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        recorder.attend[number] = partial(attention, module, attention_mask=attention_mask, **kwargs)
        recorder.add(module, query, key, value, scaling=scaling, sliding_window=kwargs.get("sliding_window"))
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


class CacheTap:
    """Stands in for the cache of one attention layer that is run without one: records what is put into it."""

    def __init__(self, recorder: Recorder, module: nn.Module) -> None:
        self._recorder, self._module = recorder, module

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record keys and values, and give them back as an empty cache would."""
        if self._recorder.wants(self._module.layer_idx):
            self._recorder.add(self._module, None, key, value)
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        """Return that nothing was put into it before."""
        return 0


@dataclass(frozen=True)
class Turning:
    """How an attention layer turns its keys by their position; by default not at all.

    Attributes
    ----------
    form
        Of the rotary embedding whose cosines and sines it is handed as `position_embeddings`.
    by_position
        Whether it makes cosines and sines itself, of the `position_ids` that it is handed.
    """

    form: RotaryForm | None = None
    by_position: bool = False


def listen(module: nn.Module, turning: Turning, cache_argument: str | None) -> RemovableHandle:
    """Make an attention layer tell the current recorder its rotation and, by a `CacheTap`, its keys and values.

    Parameters
    ----------
    module
        The layer.
    turning
        How it turns keys.
    cache_argument
        The keyword by which it is handed its cache; None where it calls an attention function.
    """

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = _RECORDER.get()
        if recorder is None or not recorder.wants(module.layer_idx):
            return None
        if turning.form is not None:
            recorder.rotations[module] = turning.form.at(*kwargs["position_embeddings"])
        if turning.by_position:
            still = {**kwargs, "position_ids": torch.zeros_like(kwargs["position_ids"])}
            # Not among what gradient checkpointing counts: recomputation, outside the block, does not do this again.
            with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                recorder.unturned[module] = run_attention(module, args, still, cache_argument).k
        if cache_argument is None or kwargs.get(cache_argument) is not None:
            return None
        return args, {**kwargs, cache_argument: CacheTap(recorder, module)}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def run_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cache_argument: str | None) -> Layer:
    """Run one attention layer by itself as far as its attention, and return what it was about to use there."""
    with record([module.layer_idx], stop_after_last=True) as recorder:
        if cache_argument is not None:
            kwargs = {**kwargs, cache_argument: CacheTap(recorder, module)}
        module.forward(*args, **kwargs)
    return recorder.layers[module.layer_idx]


AttentionInterface.register(SDPA, partial(_recording, sdpa_attention_forward))
AttentionInterface.register(EAGER, partial(_recording, _eager))
AttentionMaskInterface.register(SDPA, sdpa_mask)
AttentionMaskInterface.register(EAGER, eager_mask)
