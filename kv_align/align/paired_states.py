"""States of teacher and student at the same tokens, before training: what an informed start is fitted to.

With an untrained student they are what random weights make of the tokens, and whatever is fitted to them is fitted to
noise. Axes: N tokens, L student layers, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Kind = Literal["key", "value", "query"]


@dataclass(frozen=True)
class Pair:
    """States of one kind.

    Attributes
    ----------
    teacher
        Raw, brought to the student's tokens, and to its layers unless layers are yet to be chosen: then all of its own.
    student
        As it starts.
    """

    teacher: Float[Tensor, "n lt ht dt"]
    student: Float[Tensor, "n ls hs ds"]

    def pooled(self) -> tuple[Float[Tensor, "m ht dt"], Float[Tensor, "m hs ds"]]:
        """Teacher's and student's states of all tokens and layers, in double precision."""
        teacher, student = (rearrange(each, "n l h d -> (n l) h d").double() for each in (self.teacher, self.student))
        return teacher, student


@dataclass(frozen=True)
class Calibration:
    """Pairs of each kind; no queries where the loss needs none."""

    key: Pair
    value: Pair
    query: Pair | None

    def of(self, kind: Kind) -> Pair:
        """Return the pair of one kind."""
        pair = {"key": self.key, "value": self.value, "query": self.query}[kind]
        assert pair is not None
        return pair

    def layer(self, number: int) -> Calibration:
        """Keep one student layer, as an axis of length 1."""

        def cut(pair: Pair) -> Pair:
            return Pair(pair.teacher[:, number : number + 1], pair.student[:, number : number + 1])

        return Calibration(cut(self.key), cut(self.value), None if self.query is None else cut(self.query))
