"""How wide a flat aligner's hidden layers are when it shall have as many parameters as the structured one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

from kv_align.align.head_map import MapShape
from kv_align.align.paired_states import Kind
from kv_align.align.structured import structured_parameters


def matched_widths(shapes: Mapping[Kind, MapShape]) -> dict[Kind, int]:
    """Hidden widths of the flat maps of an aligner, by kind.

    Each is its own structured map's size over the size of one hidden unit, rounded up or down, and at least 1; of all ways
    to round, the one that brings the total of keys, values and queries nearest to the structured aligner's (with one width
    map for all heads). So no kind is made larger at another's cost. A single hidden unit can already be too many: mind
    both counts, which are logged.

    Parameters
    ----------
    shapes
        Of all maps of the aligner.
    """
    options = []
    for shape in shapes.values():
        exact = (structured_parameters(shape) - flat_parameters(shape, 0)) / _per_hidden_unit(shape)
        below, above = max(1, math.floor(exact)), max(1, math.ceil(exact))
        options.append((below, above) if exact - below <= above - exact else (above, below))
    wanted = sum(structured_parameters(shape) for shape in shapes.values())

    # The first of equals: each kind's nearest comes first.
    ways = [dict(zip(shapes, widths, strict=True)) for widths in product(*options)]
    return min(ways, key=lambda way: abs(sum(flat_parameters(shapes[kind], way[kind]) for kind in way) - wanted))


def flat_parameters(shape: MapShape, hidden: int) -> int:
    """Learnable numbers of a layer's MLP with so many hidden units, biases included, without elastic factors."""
    return hidden * _per_hidden_unit(shape) + shape.student_heads * shape.student_width


def _per_hidden_unit(shape: MapShape) -> int:
    return shape.teacher_heads * shape.teacher_width + 1 + shape.student_heads * shape.student_width
