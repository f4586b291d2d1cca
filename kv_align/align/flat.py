"""The baseline: all heads of a layer flattened into one vector and pushed through an MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from kv_align.align.head_map import Elastic, HeadMap, MapInit, MapShape
from kv_align.align.paired_states import Kind
from kv_align.align.structured import structured_parameters
from kv_align.config.options import PositiveFloat


def flatten_heads(states: Float[Tensor, "*b h t d"]) -> Float[Tensor, "*b t hd"]:
    """Put the heads of a token side by side; `unflatten_heads` is the exact inverse."""
    return rearrange(states, "... h t d -> ... t (h d)")


def unflatten_heads(states: Float[Tensor, "*b t hd"], num_heads: int) -> Float[Tensor, "*b h t d"]:
    """Cut a token's vector into its heads; the exact inverse of `flatten_heads`."""
    return rearrange(states, "... t (h d) -> ... h t d", h=num_heads)


class FlatMap(HeadMap):
    """`H_t D_t -> mlp_ratio H_t D_t -> GELU -> H_s D_s`, an MLP per layer, or `H_t D_t -> H_s D_s` without hidden layer.

    Parameters
    ----------
    shape, start
        What it maps between, and its generators; the MLP starts as `torch.nn.Linear` does.
    mlp_ratio
        Hidden width over the flattened teacher width; None: no hidden layer, a linear map.
    match_parameters
        `structured`: as wide a hidden layer as gives the aligner the number of parameters of the structured one, whatever
        `mlp_ratio` is (see `matched_widths`).
    share_layers
        One MLP for all layers.
    elastic
        A learned scale and shift per student head on the output.
    """

    uses_init = False
    # What an option leaves without effect when it is set, see `kv_align.config.resolve`.
    overrides = {"match_parameters": "mlp_ratio"}  # noqa: RUF012

    def __init__(
        self,
        shape: MapShape,
        start: MapInit,
        *,
        mlp_ratio: PositiveFloat | None,
        share_layers: bool,
        elastic: bool,
        match_parameters: Literal["structured"] | None = None,
    ) -> None:
        super().__init__()
        self._student_heads = shape.student_heads
        num_maps = 1 if share_layers else shape.num_layers
        width_in, width_out = shape.teacher_heads * shape.teacher_width, shape.student_heads * shape.student_width
        hidden = None if mlp_ratio is None else max(1, round(mlp_ratio * width_in))
        if match_parameters is not None:
            hidden = matched_widths(start.shapes)[start.kind]
        draw, before_output = start.width_generator, width_in if hidden is None else hidden
        self.hidden_weight = None if hidden is None else _linear_start((num_maps, hidden, width_in), width_in, draw)
        self.hidden_bias = None if hidden is None else _linear_start((num_maps, hidden), width_in, draw)
        self.output_weight = _linear_start((num_maps, width_out, before_output), before_output, draw)
        self.output_bias = _linear_start((num_maps, width_out), before_output, draw)
        self.elastic = Elastic(num_maps, shape.student_heads, shape.student_width) if elastic else None
        if match_parameters is not None:
            factors = 0 if self.elastic is None else sum(each.numel() for each in self.elastic.parameters())
            self.matched = num_maps * structured_parameters(shape) + factors

    def forward(self, states: Float[Tensor, "b l ht t dt"]) -> Float[Tensor, "b l hs t ds"]:
        """Flatten, map and unflatten, layer by layer."""
        flat_BLTI = flatten_heads(states)
        outputs = [self._mlp(flat_BLTI[:, layer], layer) for layer in range(flat_BLTI.shape[1])]
        mapped = unflatten_heads(torch.stack(outputs, dim=1), self._student_heads)
        return mapped if self.elastic is None else self.elastic(mapped)

    def _mlp(self, flat_BTI: Tensor, layer: int) -> Tensor:
        which = layer if len(self.output_weight) > 1 else 0
        if self.hidden_weight is not None and self.hidden_bias is not None:
            flat_BTI = F.gelu(F.linear(flat_BTI, self.hidden_weight[which], self.hidden_bias[which]))
        return F.linear(flat_BTI, self.output_weight[which], self.output_bias[which])


def _linear_start(shape: tuple[int, ...], fan_in: int, generator: Generator) -> nn.Parameter:
    """Draw uniformly in ±1/sqrt(fan_in), the start of weights and biases of `torch.nn.Linear`."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


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
