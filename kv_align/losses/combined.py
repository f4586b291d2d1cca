"""`loss=kv+logit` and whatever else is a sum of losses: each keeps its terms and their schedules, the teacher is run once."""

from __future__ import annotations

from collections import Counter

from hydra.utils import get_object
from torch import Tensor, nn

from kv_align.config.options import Parts, parameters_of
from kv_align.config.schema import Choice
from kv_align.config.signals import Signals
from kv_align.losses.base import Loss, Pairing
from kv_align.losses.comparison import Comparison
from kv_align.losses.functional import Masked


class Combined(Loss):
    """The sum of several losses.

    It asks the teacher for all that they ask for, and has their components and terms, each with its own weight, counted over
    the tokens that its own loss counts.

    Parameters
    ----------
    pairing
        Of the two models.
    parts
        The losses, each with its `_target_` and options, by the names under which these are changed
        (`loss.parts.logit.top_k=8`).

    Raises
    ------
    ValueError
        If two of them give a term of one name.
    """

    signals = ()  # its parts', see `kv_align.config.signals.signals_of`

    def __init__(self, pairing: Pairing, *, parts: Parts) -> None:
        made = [_make(part, pairing) for part in parts.values()]
        self._parts = tuple(inner for loss in made for inner in loss.parts)
        self.schedules = {term: schedule for loss in self._parts for term, schedule in loss.schedules.items()}
        terms = Counter(term for loss in self._parts for term in loss.schedules)
        twice = [term for term, number in terms.items() if number > 1]
        if twice:
            raise ValueError(
                f"loss.parts={list(parts)} is not allowed: two of them give {twice[0]}; leave one of them out"
            )
        learned = [loss.projection for loss in self._parts if loss.projection is not None]
        self.projection = nn.ModuleList(learned) if learned else None

    @property
    def requests(self) -> Signals:
        """All that its parts ask of the teacher."""
        return tuple(dict.fromkeys(signal for loss in self._parts for signal in loss.requests))

    @property
    def parts(self) -> tuple[Loss, ...]:
        """The losses that it is the sum of."""
        return self._parts

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """Those of all parts."""
        return {name: each for loss in self._parts for name, each in loss.components(comparison).items()}

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of all parts."""
        return {name: each for loss in self._parts for name, each in loss.terms(means).items()}


def _make(part: Choice, pairing: Pairing) -> Loss:
    given = [pairing] if "pairing" in parameters_of(part.target) else []
    loss: Loss = get_object(part.target)(*given, **part.options)
    return loss
