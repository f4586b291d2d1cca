"""How a model's layers weigh keys, found out by giving their attention other queries, keys and values.

Axes: B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kv_align.models.capture.attention import AttentionSpec, attention_of
from kv_align.models.capture.cache_tap import Marked, Tap, left_of_marked
from kv_align.models.capture.probe_rotary import Unsupported, hooks, read
from kv_align.models.capture.recorder import Enough, Layer, Recorder, record

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]
"""An attention function: q, k, v [B, H, T, D] to what heads make of them, [B, T, H, D], and something else."""


@torch.no_grad()
def attends_by_its_form(layer: Layer, attend: Attend) -> bool:
    """Whether a layer's attention, on large random states, is what its form alone would give."""
    assert layer.q is not None
    assert layer.form is not None
    generator = torch.Generator().manual_seed(0)
    shapes = (layer.q.shape, layer.k.shape, layer.v.shape)
    q, k, v = (torch.randn(shape, generator=generator).to(layer.k.device) for shape in shapes)
    q *= 8 / (layer.form.scaling * k.shape[-1] ** 0.5)
    q, k, v = (each.to(layer.k.dtype) for each in (q, k, v))
    found = attend(q, k, v)[0].transpose(1, 2).float()
    q, k, v = (each.float() for each in (q, k, v))
    seen = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    expected = attention_of(q, k, seen, layer.form) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.allclose(expected, found, atol=max(1e-3, 16 * torch.finfo(layer.k.dtype).eps))


def tapped_forms(
    model: PreTrainedModel, recorder: Recorder, taps: dict[nn.Module, Tap], num_query_heads: int
) -> dict[nn.Module, Tap] | None:
    """Return taps that know how their layers weigh keys; None where not every layer's queries could be found.

    Parameters
    ----------
    model
        Its layers are listened to through `taps`.
    recorder
        Of a few tokens.
    taps, num_query_heads
        Of the model's layers, which call no attention function.
    """
    found: dict[nn.Module, Tap] = {}

    def ask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, tap = recorder.layers[module.layer_idx], taps[module]
        attend = partial(_attention_within, module, args, kwargs, tap.argument)
        q = layer.k.new_empty(layer.k.shape[0], num_query_heads, *layer.k.shape[2:])
        try:
            form = _measured_form(attend, q, layer)
            if attends_by_its_form(replace(layer, q=q, form=form), attend):
                found[module] = replace(tap, form=form)
        except Unsupported:
            pass

    with hooks(module.register_forward_pre_hook(ask, with_kwargs=True) for module in taps):
        read(model)
    return found if len(found) == len(taps) else None


def _measured_form(attend: Attend, q: Tensor, layer: Layer) -> AttentionSpec:
    """Read scaling and slopes off the weights that the last query gives the first and the last key."""
    q, k, v = (torch.zeros_like(each) for each in (q, layer.k, layer.v))
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
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cache_argument: str, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, None]:
    """What a layer that calls no attention function makes of other queries, keys and values, as an `Attend`.

    Raises
    ------
    Unsupported
        If it cannot be seen how it multiplies them.
    """
    with record([module.layer_idx]) as recorder:
        swap = _Swap(recorder, q, k, v)
        module.forward(*args, **{**kwargs, cache_argument: swap})
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
