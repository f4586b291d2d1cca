"""Listening to an attention layer: how it rotates, and, where it calls no attention function, its keys, values and queries.

A layer that calls none is handed a stand-in for its cache, into which it puts its keys and values. The keys that it is given
back are marked: the same numbers, in a tensor that tells when it is multiplied. What they are multiplied with, in whatever
shape and by whatever function, are the queries. A mark outlives views and casts, and ends with the product.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kv_align.models.capture.attention import AttentionSpec
from kv_align.models.capture.recorder import Layer, Recorder, current_recorder, number_of, record
from kv_align.models.capture.rotary import RotaryForm, RotaryTable, UnknownRotation

_CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past", "past_key_value")
"""The names by which modules take a cache; the first since transformers 5.24."""
_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}


class Marked(Tensor):
    """A tensor whose products the current recorder watches."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do what torch does, but give products to the recorder's watch; what that gives back is not marked."""
        recorder = current_recorder()
        if func.__name__ not in _PRODUCTS or recorder is None or recorder.watch is None:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunctionSubclass():
            return recorder.watch(func, args, kwargs or {})


def left_of_marked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor that stands before the first marked one among a product's arguments; None if that is the first."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    place = next(number for number, each in enumerate(tensors) if isinstance(each, Marked))
    return tensors[place - 1] if place else None


def cache_argument(module: nn.Module) -> str | None:
    """Return the name by which a module takes its cache; None if it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), None)


@dataclass(frozen=True)
class Tap:
    """How a layer that calls no attention function is listened to.

    Attributes
    ----------
    argument, place
        The name by which it takes its cache, and that parameter's place among the others.
    form
        How it weighs keys, if what its keys are multiplied with was found to be its queries; None: these are not seen.
    """

    argument: str
    place: int
    form: AttentionSpec | None = None

    def cache_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the cache that a layer is called with."""
        return args[self.place] if len(args) > self.place else kwargs.get(self.argument)

    def with_cache(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a layer is called with, but with another cache."""
        if len(args) > self.place:
            return (*args[: self.place], cache, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.argument: cache}


class CacheTap:
    """Stands in for the cache of one attention layer that is run without one: records what is put into it."""

    def __init__(self, recorder: Recorder, module: nn.Module, form: AttentionSpec | None) -> None:
        self._recorder, self._module, self._form = recorder, module, form

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record keys and values, at once or with their queries, and give them back as an empty cache would."""
        if self._recorder.attended is not None:
            self._recorder.attended.append(self._module)
        if not self._recorder.wants(self._module):
            return key, value
        if self._form is None:
            self._recorder.add(self._module, None, key, value, None)
            return key, value

        def meet(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            self._recorder.watch = None
            queries = left_of_marked(args, kwargs)
            assert queries is not None
            q = queries.reshape(len(key), -1, *key.shape[2:]).to(key.dtype)
            self._recorder.add(self._module, q, key, value, self._form)
            return func(*args, **kwargs)

        self._recorder.watch = meet
        return key.as_subclass(Marked), value

    def get_seq_length(self, *_: Any) -> int:
        """Return that nothing was put into it before."""
        return 0


@dataclass(frozen=True)
class RotaryInfo:
    """How an attention layer turns its keys by their position; by default not at all.

    Attributes
    ----------
    form
        Of the rotary embedding whose cosines and sines it is handed as `position_embeddings`.
    table
        Of the one that it makes itself, of the `position_ids` that it is handed.
    unknown
        Says why what it does cannot be undone.
    """

    form: RotaryForm | None = None
    table: RotaryTable | None = None
    unknown: UnknownRotation | None = None


def listen(module: nn.Module, turning: RotaryInfo, tap: Tap | None) -> RemovableHandle:
    """Make an attention layer tell the current recorder its rotation and, through a tap, its keys, values and queries.

    Parameters
    ----------
    module
        The layer.
    turning
        How it turns keys.
    tap
        None where it calls an attention function.
    """

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = current_recorder()
        if recorder is None or not (recorder.wants(module) or recorder.attended is not None):
            return None
        if turning.unknown is not None:
            recorder.rotations[module] = turning.unknown
        elif turning.form is not None:
            recorder.rotations[module] = turning.form.at(*kwargs["position_embeddings"])
        elif turning.table is not None:
            recorder.rotations[module] = turning.table.at(kwargs["position_ids"])
        if tap is None or tap.cache_of(args, kwargs) is not None:
            return None
        return tap.with_cache(args, kwargs, CacheTap(recorder, module, tap.form))

    return module.register_forward_pre_hook(before, with_kwargs=True)


def run_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap | None) -> Layer:
    """Run one attention layer by itself as far as its attention, and return what it was about to use there."""
    number = number_of(module)
    assert number is not None
    with record([number], stop_after_last=True) as recorder:
        if tap is not None:
            args, kwargs = tap.with_cache(args, kwargs, CacheTap(recorder, module, tap.form))
        module.forward(*args, **kwargs)
    return recorder.layers[number]
