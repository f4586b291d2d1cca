"""What a model's attention layers do, found out by running them on a few tokens: how they turn keys, how they attend.

Axes: B batch, H heads, T tokens, D head width, C model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from kv_align.devices import device_of
from kv_align.recorder import Layer, Recorder, Turning, record, run_attention
from kv_align.rotary import rotary_form

_TOKENS = 8


class Unsupported(Exception):  # noqa: N818 - the reason alone, that `prepare` makes a sentence of
    """Why a model is refused."""


@torch.no_grad()
def read(model: PreTrainedModel, *, last: int = 0, cache: DynamicCache | None = None) -> Recorder:
    """Record a forward pass of a few tokens, the last of which is changed by `last`; into a cache, where one is given."""
    config = model.config.get_text_config(decoder=True)
    count = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    device = device_of(model)
    ids = torch.arange(1, count + 1, device=device)
    ids[-1] += last
    positions = torch.arange(count, device=device)
    with record() as recorder:
        model(
            input_ids=ids[None] % config.vocab_size,
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return recorder


def turnings(
    model: PreTrainedModel, modules: dict[int, nn.Module], cache_arguments: dict[nn.Module, str]
) -> dict[int, Turning]:
    """Return, for each attention layer, how it turns its keys by their position.

    Raises
    ------
    Unsupported
        If that cannot be undone.
    """
    found: dict[int, Turning] = {}

    def ask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module.layer_idx] = _turning(module, args, kwargs, cache_arguments.get(module))

    with hooks(module.register_forward_pre_hook(ask, with_kwargs=True) for module in modules.values()):
        read(model)
    return found


def _turning(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cache_argument: str | None) -> Turning:
    """Run one attention layer on the input it was called with, under other angles than those it was handed."""
    hidden_BTC = args[0] if args else kwargs["hidden_states"]

    def run(hidden_BTC: Tensor, **changed: Any) -> Layer:
        if args:
            return run_attention(module, (hidden_BTC, *args[1:]), {**kwargs, **changed}, cache_argument)
        return run_attention(module, args, {**kwargs, **changed, "hidden_states": hidden_BTC}, cache_argument)

    angles, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    turning = Turning()
    unturned: dict[str, Any] = {}
    if angles is not None:
        if not isinstance(angles, tuple) or [each.dim() for each in angles] != [3, 3]:
            raise Unsupported("its rotary embedding cannot be undone: it is not of cosines and sines")
        cos, sin = angles
        try:
            form = rotary_form(lambda c, s: run(hidden_BTC.expand(len(c), -1, -1), position_embeddings=(c, s)).k, cos)
        except ValueError as error:
            raise Unsupported(f"its rotary embedding cannot be undone: {error}") from None
        turning, unturned = Turning(form), {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
        plain, rotated = run(hidden_BTC, **unturned), run(hidden_BTC)
        rotation = None if form is None else form.at(cos, sin)
        for before, after in ((plain.k, rotated.k), (plain.q, rotated.q)):
            if before is None or after is None:
                continue
            if not close(before if rotation is None else rotation.rotate(before), after):
                raise Unsupported("its rotary embedding cannot be undone: it is no rotation by the angles it is handed")
    elif isinstance(positions, Tensor):
        unturned = {"position_ids": torch.zeros_like(positions)}
        turning = Turning(by_position=not close(run(hidden_BTC).k, run(hidden_BTC, **unturned).k))
    alike = run(hidden_BTC[:, :1].expand_as(hidden_BTC), **unturned).k
    if not close(alike, alike[:, :, :1].expand_as(alike)):
        raise Unsupported("its layers make keys of positions, in a way that cannot be undone")
    return turning


def attends_plainly(layer: Layer, attend: Callable[..., tuple[Tensor, Tensor | None]] | None) -> bool:
    """Whether a layer's attention function, on large random states, is what its scaling and window alone would give."""
    if layer.q is None or attend is None:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(each.shape, generator=generator).to(each.device) for each in (layer.q, layer.k, layer.v))
    q *= 8 / (layer.scaling * k.shape[-1] ** 0.5)
    with torch.no_grad():
        found = attend(q, k, v)[0].transpose(1, 2)
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    seen = (back >= 0) & (back < (layer.sliding_window or math.inf))
    scores = (q @ k.transpose(-1, -2) * layer.scaling).masked_fill(~seen.to(q.device), -math.inf)
    return torch.allclose(scores.softmax(dim=-1) @ v, found, atol=1e-3)


def close(a: Tensor, b: Tensor, *, rounding: float = 1e-5) -> bool:
    """Whether two states differ by no more than rounding, which is in proportion to the largest number that was turned."""
    allowed = 16 * max(torch.finfo(a.dtype).eps, rounding) * a.float().abs().max()
    return bool((a.float() - b.float()).abs().max() <= allowed)


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks off again at the end of the block."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()
