"""What a loss needs of the teacher, and which other choices then concern the run. Imports no torch."""

from __future__ import annotations

from typing import Any

from kv_align.config.config import Config
from kv_align.config.options import constant_of
from kv_align.config.schema import Choice
from kv_align.runs.errors import ConfigError

# What a loss compares through, by what it needs of the teacher; every other choice has no effect on it.
_CONCERNED = {
    "none": (),
    "logits": (),
    "keys_values": ("layer_map", "time_warp", "keys", "align", "init"),
    "keys_values_queries": ("layer_map", "time_warp", "keys", "align", "init"),
    "relations": ("layer_map", "time_warp", "keys"),
    "hidden_states": ("layer_map", "time_warp"),
}


# What can be kept on disk for other runs (`kv_align.teacher.cache`).
CACHED = ("keys_values", "keys_values_queries", "relations", "hidden_states", "logits")


def signal_of(loss: Choice) -> str:
    """Return what a loss needs of the teacher, see `kv_align.losses.base.Signal`."""
    return str(declared("loss", loss, "signal"))


def uses_keys_values(config: Config) -> bool:
    """Whether the run compares keys and values through an aligner."""
    return signal_of(config.loss).startswith("keys_values")


def declared(group: str, choice: Choice, name: str) -> Any:
    """Return a class attribute that a choice's target must have, without importing it."""
    try:
        return constant_of(choice.target, name)
    except ValueError as error:
        raise ConfigError(
            f"{group}={choice.name} is not allowed: {error}; correct its _target_ or that class."
        ) from None


def concerned_groups(config: Config) -> tuple[str, ...]:
    """Return the groups, beside the aligner itself, that have an effect on a run with its loss."""
    signal = signal_of(config.loss)
    if signal not in _CONCERNED:
        raise ConfigError(
            f"loss={config.loss.name} is not allowed: its signal {signal} is none of {', '.join(_CONCERNED)}; "
            "correct that class."
        )
    return _CONCERNED[signal]
