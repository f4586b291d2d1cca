"""What every map from teacher heads to student heads has in common.

Axes: B batch, L student layers, H heads, T student tokens, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from kv_align.align.paired_states import Calibration, Kind


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
class InitContext:
    """What an init starts from, for one map.

    Attributes
    ----------
    shape, kind
        What is mapped.
    generator
        For what the init draws; of no other purpose.
    width
        The seeded orthogonal matrix that every arm's width map starts from, once for all heads (W 1) or once for each
        student head (W H_s, all equal).
    """

    shape: MapShape
    kind: Kind
    generator: Generator
    width: Float[Tensor, "w dt ds"]


class HeadInit(NamedTuple):
    """Where a structured map starts: its head mix, and its width map or maps."""

    mix: Float[Tensor, "hs ht"]
    width: Float[Tensor, "w dt ds"]


Initializer = Callable[..., HeadInit]
"""`conf/init`: called with an `InitContext`, and with a `Calibration` if it has a parameter of the name `calibration`."""


@dataclass(frozen=True)
class MapInit:
    """Where a map's parameters start.

    Attributes
    ----------
    init
        Of the head mix, for maps that have one; None for those that do not.
    mix_generator, width_generator
        Separate, so that arms which differ in their mix start from the same width map.
    kind, shapes
        Which of an aligner's maps it is, and the shapes of all of them.
    calibration
        What the init is fitted to; None for an init that looks at nothing.
    """

    init: Initializer | None
    mix_generator: Generator
    width_generator: Generator
    kind: Kind = "key"
    shapes: Mapping[Kind, MapShape] = field(default_factory=dict)
    calibration: Calibration | None = None

    def head_init(self, shape: MapShape, width: Float[Tensor, "w dt ds"], layer: int | None) -> HeadInit:
        """Call the init for the map of one layer, or (None) for the one map of all layers."""
        assert self.init is not None
        context = InitContext(shape, self.kind, self.mix_generator, width)
        if self.calibration is None:
            return self.init(context)
        return self.init(context, self.calibration if layer is None else self.calibration.layer(layer))


class HeadMap(nn.Module, ABC):
    """A map of one kind (keys, values or queries): what `conf/aligner/*.yaml` names.

    A subclass is called with `(shape, start, *, options)` and says by `uses_init` whether `conf/init` concerns it.

    Attributes
    ----------
    matched
        Parameters of the map of another aligner that this one was made as large as; None where it was not.
    """

    uses_init: bool
    matched: int | None = None

    def __call__(self, states: Float[Tensor, "b l ht t dt"]) -> Float[Tensor, "b l hs t ds"]:
        """Map, with torch's hooks; see `forward`. The aligner sees to it that states are of the map's precision."""
        mapped: Tensor = super().__call__(states)
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
