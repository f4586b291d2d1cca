"""What a model's attention layers do, found out by running them on a few tokens: how they turn keys by their position.

Axes: B batch, H heads, T tokens, D head width, C model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from kv_align.models.capture.cache_tap import RotaryInfo, Tap, run_attention
from kv_align.models.capture.recorder import Layer, Recorder, record
from kv_align.models.capture.rotary import rotary_form, rotary_table
from kv_align.models.devices import device_of

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
    model: PreTrainedModel, modules: dict[int, nn.Module], taps: dict[nn.Module, Tap]
) -> dict[int, RotaryInfo]:
    """Return, for each attention layer, how it turns its keys by their position.

    Raises
    ------
    Unsupported
        If that cannot be undone.
    """
    found: dict[int, RotaryInfo] = {}
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or _TOKENS

    def ask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module.layer_idx] = _turning(module, args, kwargs, taps.get(module), limit)

    with hooks(module.register_forward_pre_hook(ask, with_kwargs=True) for module in modules.values()):
        read(model)
    return found


def _turning(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap | None, limit: int) -> RotaryInfo:
    """Run one attention layer on the input it was called with, under other angles or positions than those it was handed."""
    hidden_BTC = args[0] if args else kwargs["hidden_states"]

    def run(hidden_BTC: Tensor, **changed: Any) -> Layer:
        if args:
            return run_attention(module, (hidden_BTC, *args[1:]), {**kwargs, **changed}, tap)
        return run_attention(module, args, {**kwargs, **changed, "hidden_states": hidden_BTC}, tap)

    angles, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    turning, rotation = RotaryInfo(), None
    unturned: dict[str, Any] = {}
    try:
        if angles is not None:
            if not isinstance(angles, tuple) or [each.dim() for each in angles] != [3, 3]:
                raise ValueError("it is not of cosines and sines")
            cos, sin = angles
            unturned = {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
            form = rotary_form(lambda c, s: run(hidden_BTC.expand(len(c), -1, -1), position_embeddings=(c, s)).k, cos)
            turning, rotation = RotaryInfo(form), None if form is None else form.at(cos, sin)
        elif isinstance(positions, Tensor):
            unturned = {"position_ids": torch.zeros_like(positions)}
            if not close(run(hidden_BTC).k, run(hidden_BTC, **unturned).k):
                # Each of two tokens at all places.
                two_BTC = hidden_BTC[0, :2, None].repeat(1, limit, 1)
                places = torch.arange(limit, device=hidden_BTC.device).repeat(2, 1)
                table = rotary_table(run(two_BTC, position_ids=places).k)
                turning, rotation = RotaryInfo(table=table), table.at(positions)
    except ValueError as error:
        raise Unsupported(f"its rotary embedding cannot be undone: {error}") from None
    plain, rotated = run(hidden_BTC, **unturned), run(hidden_BTC)
    for before, after in ((plain.k, rotated.k), (plain.q, rotated.q)):
        if before is None or after is None:
            continue
        if not close(before if rotation is None else rotation.rotate(before), after):
            raise Unsupported(
                "its rotary embedding cannot be undone: it is no rotation by the angles or positions it is handed"
            )
    alike = run(hidden_BTC[:, :1].expand_as(hidden_BTC), **unturned).k
    if not close(alike, alike[:, :, :1].expand_as(alike)):
        raise Unsupported("its layers make keys of positions, in a way that cannot be undone")
    return turning


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
