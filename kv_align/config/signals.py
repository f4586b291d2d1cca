"""What a loss asks of a teacher, and which other choices then concern the run. Imports no torch.

A loss says by a literal, `signals = ("keys_values",)`, what it asks for. All that differs from signal to signal is in the
one `Signal` of that name: which tensors hold it, how it is kept on disk, and which groups of `conf/` say how it is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kv_align.config.config import Config
from kv_align.config.options import constant_of
from kv_align.config.schema import Choice
from kv_align.runs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Something that a loss can ask of a teacher; one forward pass gives all the signals of a run.

    Attributes
    ----------
    name
        By which a loss asks for it.
    fields
        The tensors that hold it, by the names under which `kv_align.teacher.teacher.TeacherStates` has them.
    concerns
        The groups of `conf/`, beside loss and aligner, that say how it is compared; no other has an effect on it. With
        `align` among them it is compared through an aligner.
    predicting
        Whether it is of the tokens that predict a scored one: elsewhere it means nothing, and is not kept. It is compared
        token by token, so both models must read the same tokens.
    by_segments
        Whether it depends on the segments of a text beside its tokens.
    """

    name: str
    fields: tuple[str, ...]
    concerns: tuple[str, ...] = ()
    predicting: bool = False
    by_segments: bool = False

    @property
    def through_aligner(self) -> bool:
        """Whether it is compared in the student's shape, as an aligner projects it."""
        return "align" in self.concerns

    @property
    def settings(self) -> dict[str, dict[str, int | float]]:
        """What it depends on beside the text, for the key of what is kept on disk."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TopLogits(Signal):
    """The teacher's likeliest next tokens, in the place of all logits.

    Attributes
    ----------
    k
        How many tokens are told apart, at most `vocabulary`.
    temperature
        What divides the logits before their softmax.
    vocabulary
        The first so many tokens are all there are; where a model's logits are padded further, the rest is left out.
    """

    name: str = "logits"
    fields: tuple[str, ...] = ("top_log_probabilities", "top_indices")
    predicting: bool = True
    k: int
    temperature: float
    vocabulary: int

    @property
    def settings(self) -> dict[str, dict[str, int | float]]:
        """How the distribution is coarse-grained."""
        return {"top_logits": {"k": self.k, "temperature": self.temperature, "vocabulary": self.vocabulary}}


Signals = tuple[Signal, ...]
"""What a loss, or whoever measures, asks of a teacher at once."""

_THROUGH_ALIGNER = ("layer_map", "time_warp", "keys", "align", "init")
KEYS_VALUES = Signal(name="keys_values", fields=("k", "v"), concerns=_THROUGH_ALIGNER)
KEYS_VALUES_QUERIES = Signal(name="keys_values_queries", fields=("k", "v", "q"), concerns=_THROUGH_ALIGNER)
RELATIONS = Signal(name="relations", fields=("k", "v", "q"), concerns=("layer_map", "time_warp", "keys"))
HIDDEN_STATES = Signal(name="hidden_states", fields=("hidden",), concerns=("layer_map", "time_warp"))
LOGITS = Signal(name="logits", fields=("logits",), predicting=True)
TOKEN_LOSSES = Signal(name="token_losses", fields=("token_losses",), by_segments=True)
"""What the teacher itself is measured by; no loss asks for it."""

SIGNALS = {each.name: each for each in (KEYS_VALUES, KEYS_VALUES_QUERIES, RELATIONS, HIDDEN_STATES, LOGITS)}
"""What a loss can ask for, by name."""


def signals_of(loss: Choice) -> Signals:
    """Return what a loss asks of the teacher, read from its class without importing it.

    Raises
    ------
    ConfigError
        If the class does not say its signals, or names one that there is not.
    """
    if loss.parts:
        return tuple(dict.fromkeys(signal for part in loss.parts.values() for signal in signals_of(part)))
    names = declared("loss", loss, "signals")
    for name in names if isinstance(names, tuple) else [names]:
        if name not in SIGNALS or not isinstance(names, tuple):
            raise ConfigError(
                f"loss={loss.name} is not allowed: its signals={names!r} must be a tuple of names among "
                f"{', '.join(SIGNALS)}; correct that class."
            )
    return tuple(SIGNALS[name] for name in names)


def composed_of(loss: Choice, key: str = "loss") -> dict[str, Choice]:
    """Return the losses that a loss is the sum of, itself where it is not composed, by where they stand."""
    parts = {f"{key}.parts.{name}": part for name, part in loss.parts.items()}
    return {where: each for at, part in parts.items() for where, each in composed_of(part, at).items()} or {key: loss}


def uses_aligner(config: Config) -> bool:
    """Whether the run compares keys and values through an aligner."""
    return any(signal.through_aligner for signal in signals_of(config.loss))


def concerned_groups(config: Config) -> tuple[str, ...]:
    """Return the groups, beside the aligner itself, that have an effect on a run with its loss."""
    return tuple(dict.fromkeys(group for signal in signals_of(config.loss) for group in signal.concerns))


def declared(group: str, choice: Choice, name: str) -> Any:
    """Return a class attribute that a choice's target must have, without importing it."""
    try:
        return constant_of(choice.target, name)
    except ValueError as error:
        raise ConfigError(
            f"{group}={choice.name} is not allowed: {error}; correct its _target_ or that class."
        ) from None


def learns_projection(config: Config) -> bool:
    """Whether the loss learns something itself, beside student and aligner."""
    return any(declares(part, "learns_projection") for part in composed_of(config.loss).values())


def declares(choice: Choice, name: str) -> bool:
    """Whether a choice's class says of itself that something is so; what it says nothing of is not."""
    try:
        return constant_of(choice.target, name) is True
    except ValueError:
        return False
