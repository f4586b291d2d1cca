"""What a model's attention layers do, found out by running them on a few tokens: how they turn keys by their position.

Axes: B batch, H heads, T tokens, D head width, C model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from kv_align.models.capture.cache_tap import RotaryInfo, Tap, cache_argument, run_attention
from kv_align.models.capture.recorder import Layer, Recorder, record
from kv_align.models.capture.rotary import UnknownRotation, rotary_form, rotary_table
from kv_align.models.devices import device_of

FEW = 8
"""Tokens that show how a layer is made; how far it looks takes more."""


class Unsupported(Exception):  # noqa: N818 - the reason alone, that `prepare` makes a sentence of
    """Why a model is refused."""


@torch.no_grad()
def read(
    model: PreTrainedModel,
    *,
    tokens: int = FEW,
    last: int = 0,
    cache: Cache | None = None,
    layers: list[int] | None = None,
    attended: list[nn.Module] | None = None,
) -> Recorder:
    """Record a forward pass.

    Parameters
    ----------
    model
        The model.
    tokens
        How many, or as many as it has positions for.
    last
        Added to the last one.
    cache
        Put keys and values into it.
    layers
        Which to record; None for all.
    attended
        Every module that attends is put there, in order.
    """
    config = model.config.get_text_config(decoder=True)
    count = length(model, tokens)
    device = device_of(model)
    ids = torch.arange(1, count + 1, device=device)
    ids[-1] += last
    with record(layers) as recorder:
        recorder.attended = attended
        model(
            input_ids=ids[None] % config.vocab_size,
            position_ids=torch.arange(count, device=device)[None],
            use_cache=cache is not None,
            **({} if cache is None else {cache_argument(model) or "past_key_values": cache}),
        )
    return recorder


def length(model: PreTrainedModel, tokens: int) -> int:
    """Return how many tokens a model is given where so many are asked for: as many as it has positions for."""
    return min(tokens, positions_of(model.config.get_text_config(decoder=True)) or tokens)


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model has, as far as its configuration says it in one of the usual names."""
    names = ("max_position_embeddings", "max_seq_len", "max_seq_length", "max_target_positions")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), None)


def turnings(
    model: PreTrainedModel, modules: dict[int, nn.Module], taps: dict[nn.Module, Tap], longest: int
) -> dict[int, RotaryInfo]:
    """Return, for each attention layer, how it turns its keys by their position, or why that cannot be undone."""
    rotary: dict[int, RotaryInfo] = {}
    limit = positions_of(model.config.get_text_config(decoder=True)) or longest

    def ask(number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            rotary[number] = _turning(module, args, kwargs, taps.get(module), limit)
        except Unsupported as reason:
            rotary[number] = RotaryInfo(unknown=UnknownRotation(str(reason)))

    with hooks(
        module.register_forward_pre_hook(partial(ask, number), with_kwargs=True) for number, module in modules.items()
    ):
        read(model)
    return rotary


def _turning(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tap: Tap | None, limit: int) -> RotaryInfo:
    """Run one attention layer on the input it was called with, under other angles or positions than those it was handed."""
    own_BTC = args[0] if args else kwargs["hidden_states"]

    def run(hidden_BTC: Tensor, **changed: Any) -> Layer:
        # Some take the same states several times: as what queries, keys and values are made of.
        others = tuple(hidden_BTC if each is own_BTC else each for each in args)
        named = {name: hidden_BTC if each is own_BTC else each for name, each in kwargs.items()}
        return run_attention(module, others, {**named, **changed}, tap)

    angles, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    turning, rotation = RotaryInfo(), None
    unturned: dict[str, Any] = {}
    try:
        if angles is not None:
            if not isinstance(angles, tuple) or [each.dim() for each in angles] != [3, 3]:
                raise ValueError("it is not of cosines and sines")
            # At the first position nothing is turned: its sines are zero.
            sin_first = not angles[0][:, 0].any()

            def keys_under(cos: Tensor, sin: Tensor) -> Tensor:
                handed = (sin, cos) if sin_first else (cos, sin)
                return run(own_BTC.expand(len(cos), -1, -1), position_embeddings=handed).k

            ones, zeros = torch.ones_like(angles[0]), torch.zeros_like(angles[0])
            unturned = {"position_embeddings": (zeros, ones) if sin_first else (ones, zeros)}
            form = rotary_form(keys_under, angles[0])
            if form is not None:
                form = replace(form, sin_first=sin_first)
                rotation = form.at(*angles)
            turning = RotaryInfo(form)
        elif isinstance(positions, Tensor):
            unturned = {"position_ids": torch.zeros_like(positions)}
            if not close(run(own_BTC).k, run(own_BTC, **unturned).k):
                # Each of two tokens at all places.
                two_BTC = own_BTC[0, :2, None].repeat(1, limit, 1)
                places = torch.arange(limit, device=own_BTC.device).repeat(2, 1)
                table = rotary_table(run(two_BTC, position_ids=places).k)
                turning, rotation = RotaryInfo(table=table), table.at(positions)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise Unsupported(f"its rotary embedding cannot be undone: {first_line(error)}") from None
    plain, rotated = run(own_BTC, **unturned), run(own_BTC)
    for before, after in ((plain.k, rotated.k), (plain.q, rotated.q)):
        if before is None or after is None:
            continue
        if not close(before if rotation is None else rotation.rotate(before), after):
            raise Unsupported(
                "its rotary embedding cannot be undone: it is no rotation by the angles or positions it is handed"
            )
    alike = run(own_BTC[:, :1].expand_as(own_BTC), **unturned).k
    if not close(alike, alike[:, :, :1].expand_as(alike)):
        raise Unsupported("its layers make keys of positions, in a way that cannot be undone")
    return turning


def first_line(error: BaseException) -> str:
    """Return what an exception says, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else f"{type(error).__name__}, and no more is said"


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
