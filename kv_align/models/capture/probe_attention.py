"""How a model's layers weigh keys, found out by giving their attention other queries, keys and values.

Axes: B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kv_align.models.capture.attention import AttentionSpec, attention_of
from kv_align.models.capture.cache_tap import Marked, Tap, left_of_marked
from kv_align.models.capture.probe_rotary import FEW, Unsupported, hooks, read
from kv_align.models.capture.recorder import Enough, Layer, Recorder, record

_ROWS, _STRETCHES = 64, 8
"""Queries at a time, and how often, that are looked at of a long text."""
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]
"""An attention function: q, k, v [B, H, T, D] to what heads make of them, [B, T, H, D], and something else."""


@torch.no_grad()
def seen_form(layer: Layer, attend: Attend) -> AttentionSpec | None:
    """Return how a layer weighs keys: as its form says, or with the window that it is seen to have; None if it is neither.

    A window may stand in a mask alone, and what is stated of one may have no effect.
    """
    assert layer.form is not None
    stated = layer.form
    if _attends_by(stated, layer, attend):
        return stated
    seen = replace(stated, window=_window(layer, attend))
    return seen if seen != stated and _attends_by(seen, layer, attend) else None


def _attends_by(form: AttentionSpec, layer: Layer, attend: Attend) -> bool:
    """Whether a layer's attention gives what a form says, of large random states and where all keys are alike."""
    assert layer.q is not None
    generator = torch.Generator().manual_seed(0)
    shapes = (layer.q.shape, layer.k.shape, layer.v.shape)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    q *= 8 / (form.scaling * k.shape[-1] ** 0.5)
    # Every number of the values counts the keys of one stretch of the text.
    tokens, width = v.shape[2:]
    stretches = torch.arange(tokens)[:, None] * width // tokens == torch.arange(width)
    counts = (stretches * min(width, tokens)).to(v.dtype).expand_as(v)
    return all(_gives(form, attend, layer.k, *states) for states in ((q, k, v), (torch.zeros_like(q), k, counts)))


def _gives(form: AttentionSpec, attend: Attend, like: Tensor, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether an attention function gives what a form says, looked at in stretches of a long text's queries."""
    q, k, v = (each.to(like) for each in (q, k, v))
    attended = attend(q, k, v)[0].transpose(1, 2).float()
    q, k, v = (each.float() for each in (q, k, v))
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    tokens = q.shape[2]
    starts = [0] if tokens <= 2 * _ROWS else torch.linspace(0, tokens - _ROWS, _STRETCHES).long().tolist()
    for start in starts:
        end = tokens if tokens <= 2 * _ROWS else start + _ROWS
        mask = torch.ones(q.shape[0], end, dtype=torch.bool, device=q.device)
        weights = attention_of(q[:, :, start:end], k[:, :, :end], mask, form)
        if not torch.allclose(
            weights @ v[:, :, :end], attended[:, :, start:end], atol=max(1e-3, 16 * torch.finfo(like.dtype).eps)
        ):
            return False
    return True


def _window(layer: Layer, attend: Attend) -> int | None:
    """How many tokens back the last query sees, itself counted; None if it sees all."""
    assert layer.q is not None
    q, k, v = (torch.zeros_like(each) for each in (layer.q, layer.k, layer.v))
    tokens = k.shape[2]
    nearest, furthest = 0, tokens - 1  # the first key that is seen is between them
    while nearest < furthest:
        middle = (nearest + furthest) // 2
        v[:] = (torch.arange(tokens, device=v.device) <= middle)[:, None]
        if attend(q, k, v)[0][:, -1].abs().max() > 0:
            furthest = middle
        else:
            nearest = middle + 1
    return None if nearest == 0 else tokens - nearest


def tapped_forms(
    model: PreTrainedModel,
    layers: dict[nn.Module, tuple[Layer, Layer]],
    taps: dict[nn.Module, Tap],
    num_query_heads: int,
    longest: int,
) -> dict[nn.Module, AttentionSpec]:
    """Return how layers weigh keys that call no attention function; without those whose queries could not be found.

    Parameters
    ----------
    model
        Its layers are listened to through `taps`.
    layers
        What was recorded of each, of a few tokens and of many.
    taps, num_query_heads
        Of the model's layers.
    longest
        How many tokens those are.
    """
    measured: dict[nn.Module, AttentionSpec] = {}
    forms: dict[nn.Module, AttentionSpec] = {}

    def attending(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attend:
        return partial(_attention_within, module, args, kwargs, taps[module])

    def with_queries(layer: Layer) -> Layer:
        return replace(layer, q=layer.k.new_empty(layer.k.shape[0], num_query_heads, *layer.k.shape[2:]))

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with suppress(Unsupported):
            measured[module] = _measured_form(attending(module, args, kwargs), with_queries(layers[module][0]))

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in measured:
            layer = replace(with_queries(layers[module][1]), form=measured[module])
            with suppress(Unsupported):
                form = seen_form(layer, attending(module, args, kwargs))
                if form is not None:
                    forms[module] = form

    for ask, tokens in ((measure, FEW), (check, longest)):
        with hooks(module.register_forward_pre_hook(ask, with_kwargs=True) for module in taps):
            read(model, tokens=tokens)
    return forms


def _measured_form(attend: Attend, layer: Layer) -> AttentionSpec:
    """Read scaling and slopes off the weights that the last query gives the first and the last key."""
    assert layer.q is not None
    q, k, v = (torch.zeros_like(each) for each in (layer.q, layer.k, layer.v))
    v[:, :, 0, 0] = v[:, :, -1, 1] = 1

    def lead() -> Tensor:
        """Of the last key's score over the first one's, in each head."""
        weights_HP = attend(q, k, v)[0][0, -1, :, :2].float()
        return (weights_HP[:, 1] / weights_HP[:, 0]).log()

    sloped = lead()
    q[..., 0] = k[:, :, -1, 0] = 2
    scaling = float((lead() - sloped).mean()) / 4
    slopes = sloped / (k.shape[2] - 1)
    return AttentionSpec(scaling, slopes=slopes if slopes.abs().max() > 16 * torch.finfo(layer.k.dtype).eps else None)


@torch.no_grad()
def _attention_within(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, None]:
    """What a layer that calls no attention function makes of other queries, keys and values, as an `Attend`.

    Raises
    ------
    Unsupported
        If it cannot be seen how it multiplies them.
    """
    with record([]) as recorder:
        swap = _Swap(recorder, q, k, v)
        args, kwargs = tap.with_cache(args, kwargs, swap)
        module.forward(*args, **kwargs)
    if swap.heads is None or swap.heads.numel() != q.shape[:3].numel() * v.shape[-1]:
        raise Unsupported("its attention cannot be seen")
    return swap.heads.reshape(*q.shape[:3], -1).transpose(1, 2), None


class _Swap:
    """Stands in for the cache of a layer: gives back other keys and values, and puts other queries beside them.

    `heads` is then what the layer made of them, in its own shape.
    """

    def __init__(self, recorder: Recorder, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._recorder, self._q, self._k, self._v = recorder, q, k, v
        self._scored = False
        self.heads: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Give back marked keys and values."""
        self._recorder.watch = self._product
        return self._k.as_subclass(Marked), self._v.as_subclass(Marked)

    def get_seq_length(self, *_: Any) -> int:
        """Return that nothing was put into it before."""
        return 0

    def _product(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        scores_only = sum(isinstance(each, Marked) for each in (*args, *kwargs.values())) == 1
        if self._scored:
            self.heads = func(*args, **kwargs)
            raise Enough
        self._scored = True
        queries = left_of_marked(args, kwargs)
        if queries is None or queries.numel() != self._q.numel():
            raise Unsupported("its queries cannot be seen")
        q = self._q.reshape(queries.shape).to(queries)
        args = tuple(q if each is queries else each for each in args)
        kwargs = {name: q if each is queries else each for name, each in kwargs.items()}
        if scores_only:
            return func(*args, **kwargs)
        self.heads = func(*args, **kwargs)
        raise Enough
