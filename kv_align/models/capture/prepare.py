"""Which decoders can be recorded, found out by trying: `prepare` asks a model what it does, not what it is called.

Whatever would make recorded keys and values other than the model's own is refused there, before anything is trained.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from kv_align.models.capture.attention import AttentionSpec
from kv_align.models.capture.cache_tap import RotaryInfo, Tap, cache_argument, listen
from kv_align.models.capture.probe_attention import seen_form, tapped_forms
from kv_align.models.capture.probe_rotary import FEW, Unsupported, close, first_line, hooks, length, read, turnings
from kv_align.models.capture.recorder import (
    AS_TOLD,
    EAGER,
    SDPA,
    Layer,
    LayerFacts,
    Recorder,
    own_eager_attention,
    record,
    write_facts,
)
from kv_align.models.capture.rotary import Rotation
from kv_align.models.devices import present
from kv_align.models.evaluating import evaluating
from kv_align.runs.errors import ConfigError

__all__ = ["Geometry", "Layer", "Recorder", "Rotation", "prepare", "record"]


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
    fixed_rotation
        Why keys cannot be had as they were before they were turned by their position; None where they can.
    """

    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    key_width: int
    value_width: int
    gives_queries: bool = True
    plain_attention: bool = True
    fixed_rotation: str | None = None


def prepare(model: PreTrainedModel, role: str, *, longest: int = 64) -> Geometry:
    """Make a model recordable, and check on a text that what is recorded is what it should be.

    Parameters
    ----------
    model
        A causal model; its attention function is replaced by a recording one with the same results (SDPA where the
        model allows it, its own otherwise).
    role
        `teacher` or `student`, for messages.
    longest
        How many tokens it will be given at most: windows, chunks and sinks that have no effect on so many have none.

    Raises
    ------
    ConfigError
        If keys and values of every layer cannot be had as its attention uses them: encoder-decoders, layers without
        softmax attention or with another layer's keys, latent attention, layers of different shapes.
    """
    try:
        with evaluating(model):
            return _prepare(model, longest)
    except Unsupported as reason:
        raise _refusal(model, role, str(reason)) from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(
            model, role, f"it fails on a few tokens ({type(error).__name__}: {first_line(error)})"
        ) from error


def _refusal(model: PreTrainedModel, role: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model.{role}={type(model).__name__} is not supported: {reason}; use a decoder whose layers all attend by softmax "
        "to keys and values of their own."
    )


def _prepare(model: PreTrainedModel, longest: int) -> Geometry:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise Unsupported("it is an encoder-decoder")
    _choose_attention(model)
    taps: dict[nn.Module, Tap] = {}

    def tapped() -> AbstractContextManager[None]:
        return hooks(listen(module, RotaryInfo(), tap) for module, tap in taps.items())

    modules = _numbered_layers(model)
    if not modules:  # it calls no attention function
        taps = _taps(model)
        with tapped():
            try:
                modules = _numbered_layers(model)
            except AttributeError:  # what stands in for a cache takes no more
                raise Unsupported("its layers keep other things in their cache than keys and values") from None
        taps = {module: taps[module] for module in modules}
    _check_number(config, len(modules))
    with tapped():
        few, many = read(model), read(model, tokens=longest)
        layers = few.ordered()
        if any(layer.k.shape[2] != length(model, longest) for layer in many.layers.values()):
            raise Unsupported("its layers attend to keys and values that are not one for each token")
        if len({(layer.k.shape, layer.v.shape) for layer in layers}) != 1:
            raise Unsupported("its layers' keys differ in shape")
        _check_causality(model, few, FEW)
        _check_causality(model, many, longest)
    _check_cache(model, layers)
    num_query_heads = int(config.num_attention_heads) if layers[0].q is None else layers[0].q.shape[1]
    forms: dict[nn.Module, AttentionSpec] = {}
    if taps:
        both = {module: (few.layers[number], many.layers[number]) for number, module in enumerate(modules)}
        with tapped():
            forms = tapped_forms(model, both, taps, num_query_heads, longest)
        gives_queries = len(forms) == len(modules)
        if gives_queries:
            taps = {module: replace(tap, form=forms[module]) for module, tap in taps.items()}
    else:
        gives_queries = True
        with present(modules):
            for number, layer in many.layers.items():
                form = seen_form(layer, many.attend[number])
                if form is not None:
                    forms[modules[number]] = form
                    as_stated = layer.form is None or form.window == layer.form.window
                    write_facts(modules[number], LayerFacts(number, AS_TOLD if as_stated else form.window))
    with tapped():
        turned = turnings(model, few.modules, taps, longest)
    for number, module in enumerate(modules):
        listen(module, turned[number], taps.get(module))
    unknown = [turning.unknown.reason for turning in turned.values() if turning.unknown is not None]
    return Geometry(
        len(layers),
        num_query_heads,
        layers[0].k.shape[1],
        layers[0].k.shape[-1],
        layers[0].v.shape[-1],
        gives_queries=gives_queries,
        plain_attention=len(forms) == len(modules),
        fixed_rotation=unknown[0] if unknown else None,
    )


def _choose_attention(model: PreTrainedModel) -> None:
    """Have the model call a recording attention function, if it calls any that can be chosen."""
    if not model._can_set_attn_implementation():
        return
    try:
        model.set_attn_implementation(SDPA)
    except ValueError:  # soft caps and sinks, for example, are beyond SDPA
        if own_eager_attention(model) is None:
            raise Unsupported("its layers do not attend by softmax to keys and values") from None
        model.set_attn_implementation(EAGER)


def _taps(model: PreTrainedModel) -> dict[nn.Module, Tap]:
    """Return taps of all that are handed a cache, and do not hand it on to another module."""
    taps = {}
    for module in model.modules():
        name = cache_argument(module)
        if name is not None:
            taps[module] = Tap(name, list(inspect.signature(module.forward).parameters).index(name))
    outer = {module for module in taps if any(inner in taps for inner in module.modules() if inner is not module)}
    return {module: tap for module, tap in taps.items() if module not in outer}


def _numbered_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Number a model's attention layers in the order in which they run, and return them."""
    modules: list[nn.Module] = []
    read(model, layers=[], attended=modules)
    for number, module in enumerate(modules):
        write_facts(module, LayerFacts(number))
    if len(set(modules)) < len(modules):
        times = max(modules.count(module) for module in modules)
        raise Unsupported(
            f"an attention layer attends {times} times in each forward pass, each time to other keys or values"
        )
    return modules


def _check_number(config: PreTrainedConfig, number: int) -> None:
    """Refuse a model not all of whose layers attend in a way that can be recorded."""
    expected = int(config.num_hidden_layers)
    if number < expected or not number:
        kinds = sorted(set(getattr(config, "layer_types", None) or []))
        what = f" (it has layers of the kinds {', '.join(kinds)})" if len(kinds) > 1 else ""
        raise Unsupported(f"only {number} of its {expected} layers show keys and values{what}")


def _check_causality(model: PreTrainedModel, recorded: Recorder, tokens: int) -> None:
    """Refuse a model whose earlier tokens see a later one."""
    # LLM.int8 takes out the columns in which any token of the batch is large: a later one changes earlier ones by some
    # hundredths, where a model that looks ahead changes them altogether.
    rounding = 0.006 if getattr(model, "is_loaded_in_8bit", False) else 1e-5
    for layer, other in zip(recorded.ordered(), read(model, tokens=tokens, last=1).ordered(), strict=True):
        if not close(layer.k[:, :, :-1], other.k[:, :, :-1], rounding=rounding):
            raise Unsupported("its tokens see later tokens")


def _check_cache(model: PreTrainedModel, layers: list[Layer]) -> None:
    """Refuse a model whose cache holds other keys and values, or not those of every layer."""
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache()  # not told of the model: sliding layers then keep all tokens
    try:
        read(model, cache=cache)
    except (AttributeError, LookupError, RuntimeError, ValueError):  # it keeps more than keys and values
        cache = DynamicCache(config=model.config)
        read(model, cache=cache)
    for number, layer in enumerate(layers):
        held = cache.layers[number] if number < len(cache.layers) else None
        if held is None or getattr(held, "keys", None) is None:
            raise Unsupported(f"its layer {number} attends to the keys and values of another layer")
        for kind, ours, theirs in (("keys", layer.k, held.keys), ("values", layer.v, held.values)):
            # Of a sliding layer's own cache, the last tokens.
            if ours.shape[-1] != theirs.shape[-1] or ours.shape[1] != theirs.shape[1]:
                latent = " (latent attention)" if hasattr(config, "kv_lora_rank") else ""
                raise Unsupported(
                    f"its heads attend to {ours.shape[1]} x {ours.shape[-1]} numbers of each token as {kind}, made of "
                    f"{theirs.shape[1]} x {theirs.shape[-1]} that its cache holds{latent}"
                )
            if not close(ours[:, :, -theirs.shape[2] :], theirs):
                raise Unsupported(f"its heads attend to other {kind} than its cache holds")
