"""Which decoders can be recorded, found out by trying: `prepare` asks a model what it does, not what it is called.

Whatever would make recorded keys and values other than the model's own is refused there, before anything is trained.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from kv_align.models.capture.cache_tap import RotaryInfo, Tap, listen
from kv_align.models.capture.probe_attention import attends_by_its_form, tapped_forms
from kv_align.models.capture.probe_rotary import Unsupported, close, hooks, read, turnings
from kv_align.models.capture.recorder import EAGER, SDPA, Layer, Recorder, own_eager_attention, record
from kv_align.models.capture.rotary import Rotation
from kv_align.models.devices import present
from kv_align.models.evaluating import evaluating
from kv_align.runs.errors import ConfigError

__all__ = ["Geometry", "Layer", "Recorder", "Rotation", "prepare", "record"]

_CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


@dataclass(frozen=True)
class Geometry:
    """Shapes that a model's attention really has, read from a forward pass of a few tokens, and what can be had of it.

    Attributes
    ----------
    num_layers
        Attention layers.
    num_query_heads, num_key_value_heads
        Heads; fewer of the second under grouped queries.
    key_width, value_width
        Head widths (queries are as wide as keys).
    gives_queries
        Whether queries are recorded too.
    plain_attention
        Whether the attention of all layers is what an `AttentionSpec` says, and so can be computed from queries and keys.
    """

    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    key_width: int
    value_width: int
    gives_queries: bool = True
    plain_attention: bool = True


def prepare(model: PreTrainedModel, role: str) -> Geometry:
    """Make a model recordable, and check on a few tokens that what is recorded is what it should be.

    Parameters
    ----------
    model
        A causal model; its attention function is replaced by a recording one with the same results (SDPA where the
        model allows it, its own otherwise).
    role
        `teacher` or `student`, for messages.

    Raises
    ------
    ConfigError
        If keys and values of every layer cannot be had as its attention uses them: encoder-decoders, layers without
        softmax attention or with another layer's keys, latent attention, layers of different shapes, rotary embeddings
        that cannot be undone.
    """
    try:
        with evaluating(model):
            return _prepare(model)
    except Unsupported as reason:
        raise _refusal(model, role, str(reason)) from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or ["no more is said"])[0].rstrip(".")
        raise _refusal(model, role, f"it fails on a few tokens ({type(error).__name__}: {first_line})") from error


def _refusal(model: PreTrainedModel, role: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model.{role}={type(model).__name__} is not supported: {reason}; use a decoder whose layers all attend by softmax "
        "to keys and values of their own."
    )


def _prepare(model: PreTrainedModel) -> Geometry:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise Unsupported("it is an encoder-decoder")
    taps = _choose_attention(model)

    def tapped() -> AbstractContextManager[None]:
        return hooks(listen(module, RotaryInfo(), tap) for module, tap in taps.items())

    with tapped():
        recorder = read(model)
        layers = recorder.ordered()
        _check_layers(config, recorder)
        _check_causality(model, layers)
    _check_cache(model, layers)
    first = layers[0]
    num_query_heads = int(config.num_attention_heads) if first.q is None else first.q.shape[1]
    if taps:
        with tapped():
            found = tapped_forms(model, recorder, taps, num_query_heads)
        gives_queries = plain = found is not None
        taps = found or taps
    else:
        gives_queries = True
        with present(recorder.modules.values()):
            plain = all(attends_by_its_form(layer, recorder.attend[number]) for number, layer in enumerate(layers))
    with tapped():
        turned = turnings(model, recorder.modules, taps)
    for number, module in recorder.modules.items():
        listen(module, turned[number], taps.get(module))
    return Geometry(
        len(layers),
        num_query_heads,
        first.k.shape[1],
        first.k.shape[-1],
        first.v.shape[-1],
        gives_queries=gives_queries,
        plain_attention=plain,
    )


def _choose_attention(model: PreTrainedModel) -> dict[nn.Module, Tap]:
    """Have the model call a recording attention function; where it calls none, return its layers' taps."""
    if model._can_set_attn_implementation():
        try:
            model.set_attn_implementation(SDPA)
        except ValueError:  # soft caps and sinks, for example, are beyond SDPA
            if own_eager_attention(model) is None:
                raise Unsupported("its layers do not attend by softmax to keys and values") from None
            model.set_attn_implementation(EAGER)
        return {}
    found = {}
    for module in model.modules():
        names = [name for name in _CACHE_ARGUMENTS if name in inspect.signature(module.forward).parameters]
        if names and isinstance(getattr(module, "layer_idx", None), int):
            found[module] = Tap(names[0])
    # A block that knows its number hands its cache on to the attention in it.
    inner = {module for outer in found for module in outer.modules() if module is not outer}
    return {module: tap for module, tap in found.items() if not inner.intersection(module.modules())} or found


def _check_layers(config: PreTrainedConfig, recorder: Recorder) -> None:
    """Refuse a model not all of whose layers were recorded, or whose layers differ in shape."""
    expected, found = int(config.num_hidden_layers), sorted(recorder.layers)
    if len(found) < expected or found != list(range(len(found))):
        kinds = getattr(config, "layer_types", None) or []
        others = sorted({kind for number, kind in enumerate(kinds) if number not in recorder.layers})
        what = f" (its others are of the kind {', '.join(others)})" if others else ""
        raise Unsupported(f"only {len(found)} of its {expected} layers show keys and values{what}")
    if len({(layer.k.shape, layer.v.shape) for layer in recorder.ordered()}) != 1:
        raise Unsupported("its layers' keys differ in shape")


def _check_causality(model: PreTrainedModel, layers: list[Layer]) -> None:
    """Refuse a model whose earlier tokens see a later one."""
    # LLM.int8 takes out the columns in which any token of the batch is large: a later one changes earlier ones by some
    # hundredths, where a model that looks ahead changes them altogether.
    rounding = 0.006 if getattr(model, "is_loaded_in_8bit", False) else 1e-5
    for layer, other in zip(layers, read(model, last=1).ordered(), strict=True):
        if not close(layer.k[:, :, :-1], other.k[:, :, :-1], rounding=rounding):
            raise Unsupported("its tokens see later tokens")


def _check_cache(model: PreTrainedModel, layers: list[Layer]) -> None:
    """Refuse a model whose cache holds other keys and values, or not those of every layer."""
    cache = DynamicCache()  # not told of the model: sliding layers then keep all tokens
    read(model, cache=cache)
    for number, layer in enumerate(layers):
        if number >= len(cache.layers) or cache.layers[number].keys is None:
            raise Unsupported(f"its layer {number} attends to the keys and values of another layer")
        for ours, theirs in ((layer.k, cache.layers[number].keys), (layer.v, cache.layers[number].values)):
            if ours.shape != theirs.shape or not close(ours, theirs):
                raise Unsupported(
                    "its cache does not hold the keys and values that its heads attend to (latent attention)"
                )
