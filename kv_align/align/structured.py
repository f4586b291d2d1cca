"""Head by head: mixes teacher heads into student heads, then projects the head width. Never flattens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from kv_align.align.head_map import Elastic, HeadMap, MapInit, MapShape


class StructuredMap(HeadMap):
    """`student head g = (sum over h of mix[g, h] teacher head h) @ width`, per layer.

    Parameters
    ----------
    shape, start
        What it maps between, the init, and the generators of mix and width map.
    share_dim_proj
        One width map for all heads of a layer, or one per head (all starting from the same matrix).
    share_layers
        One mix and width map for all layers.
    elastic
        A learned scale and shift per student head on the output.
    """

    uses_init = True

    def __init__(
        self,
        shape: MapShape,
        start: MapInit,
        *,
        share_dim_proj: bool,
        share_layers: bool,
        elastic: bool,
    ) -> None:
        super().__init__()
        num_maps = 1 if share_layers else shape.num_layers
        num_widths = 1 if share_dim_proj else shape.student_heads
        starts = []
        for layer in range(num_maps):
            width_DE = orthogonal(shape.teacher_width, shape.student_width, start.width_generator)
            width_WDE = width_DE.expand(num_widths, -1, -1)
            starts.append(start.head_init(shape, width_WDE, None if share_layers else layer))
        self.mix = nn.Parameter(torch.stack([each.mix for each in starts]))  # [L, H_s, H_t]
        width_LWDE = torch.stack([each.width for each in starts])
        self.width = nn.Parameter(
            width_LWDE[:, 0].contiguous() if share_dim_proj else width_LWDE
        )  # [L, (H_s,) D_t, D_s]
        self.elastic = Elastic(num_maps, shape.student_heads, shape.student_width) if elastic else None

    def forward(self, states: Float[Tensor, "b l ht t dt"]) -> Float[Tensor, "b l hs t ds"]:
        """Mix heads, then project the width."""
        projected = mix_and_project(states, self.mix, self.width)
        return projected if self.elastic is None else self.elastic(projected)


def mix_and_project(
    states: Float[Tensor, "b l ht t dt"], mix: Float[Tensor, "_ hs ht"], width: Float[Tensor, "_ *hs dt ds"]
) -> Float[Tensor, "b l hs t ds"]:
    """Mix heads, then project the width, of all heads or of each; one map of all layers has an axis of length 1."""
    # As products of matrices that lie as the states do: an einsum over these axes would copy the states first.
    mixed = torch.matmul(mix, states.flatten(3)).view(*states.shape[:2], -1, *states.shape[3:])
    return torch.matmul(mixed, width if width.dim() == 4 else width[:, None])


def structured_parameters(shape: MapShape) -> int:
    """Learnable numbers of a layer's map with one width map for all heads, without elastic factors."""
    return shape.student_heads * shape.teacher_heads + shape.teacher_width * shape.student_width


def orthogonal(rows: int, columns: int, generator: Generator) -> Float[Tensor, "rows columns"]:
    """Draw a matrix whose rows or columns (the fewer) are orthonormal, uniformly (Mezzadri, 2007)."""
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()
    matrix: Tensor = q if rows >= columns else q.T
    return matrix.float().contiguous()
