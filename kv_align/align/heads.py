"""What every map from teacher heads to student heads has in common.

Axes: B batch, L student layers, H heads, T student tokens, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

HeadMixInit = Callable[[int, int, Generator], Tensor]


@dataclass(frozen=True)
class MapShape:
    """The shapes that one map goes between.

    Attributes
    ----------
    num_layers
        Of the student; the map sees the teacher's layers already selected.
    teacher_heads, teacher_width, student_heads, student_width
        Heads and head widths of what is mapped (keys, values or queries).
    """

    num_layers: int
    teacher_heads: int
    teacher_width: int
    student_heads: int
    student_width: int


@dataclass(frozen=True)
class MapStart:
    """Where a map's parameters start.

    Attributes
    ----------
    mix_init
        Of the head mix, for maps that have one; None for those that do not.
    mix_generator, width_generator
        Separate, so that arms which differ in their mix start from the same width map.
    """

    mix_init: HeadMixInit | None
    mix_generator: Generator
    width_generator: Generator


class HeadMap(nn.Module, ABC):
    """A map of one kind (keys, values or queries): what `conf/aligner/*.yaml` names.

    A subclass is called with `(shape, start, *, options)` and says by `uses_init` whether `conf/init` concerns it.
    """

    uses_init: bool

    def __call__(self, states: Float[Tensor, "b l ht t dt"]) -> Float[Tensor, "b l hs t ds"]:
        """Map, with torch's hooks; see `forward`. States may be of another precision than the map (a bfloat16 teacher)."""
        precision = next((parameter.dtype for parameter in self.parameters()), states.dtype)
        mapped: Tensor = super().__call__(states.to(precision))
        return mapped

    @abstractmethod
    def forward(self, states: Float[Tensor, "b l ht t dt"]) -> Float[Tensor, "b l hs t ds"]:
        """Map teacher heads, already at the student's layers and tokens, to student heads."""


class Elastic(nn.Module):
    """A learned scale (one number) and shift (one vector) per student head; starts as the identity."""

    def __init__(self, num_layers: int, num_heads: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_layers, num_heads, 1, 1))
        self.shift = nn.Parameter(torch.zeros(num_layers, num_heads, 1, width))

    def __call__(self, states: Float[Tensor, "b l h t d"]) -> Float[Tensor, "b l h t d"]:
        """Scale and shift, with torch's hooks."""
        changed: Tensor = super().__call__(states)
        return changed

    def forward(self, states: Float[Tensor, "b l h t d"]) -> Float[Tensor, "b l h t d"]:
        """Scale and shift every head."""
        return states * self.scale + self.shift
