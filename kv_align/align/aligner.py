"""The one interface that training sees: teacher states in, targets in the student's shape out.

Axes: B batch, L layers, H heads, S student tokens, R teacher tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kv_align.align.correspondence import LayerMixture, Placement
from kv_align.align.head_map import HeadMap
from kv_align.align.time_warp import SegmentWarp
from kv_align.runs.seeds import derive_seed


class Aligner(nn.Module):
    """Layer map, time warp and head maps, in this order.

    All arms are this class; they differ in the maps they are given.

    Parameters
    ----------
    layers, time_warp
        See `Placement`.
    key_map, value_map, query_map
        A map for each kind; None where the loss needs no queries.
    """

    def __init__(
        self,
        layers: Sequence[int] | LayerMixture,
        time_warp: SegmentWarp,
        key_map: HeadMap,
        value_map: HeadMap,
        query_map: HeadMap | None,
    ) -> None:
        super().__init__()
        self.placement = Placement(layers, time_warp)
        self.key_map, self.value_map, self.query_map = key_map, value_map, query_map

    def forward(
        self,
        k: Float[Tensor, "b lt hk r dk"],
        v: Float[Tensor, "b lt hv r dv"],
        q: Float[Tensor, "b lt hq r dk"] | None,
        student_segments: Int[Tensor, "b s"],
        teacher_segments: Int[Tensor, "b r"],
        same_time: bool,
        places: Float[Tensor, "b s"] | None = None,
    ) -> tuple[Float[Tensor, "b ls gk s ek"], Float[Tensor, "b ls gv s ev"], Float[Tensor, "b ls gq s ek"] | None]:
        """Project teacher keys, values and queries.

        Parameters
        ----------
        k, v, q
            Of the teacher's selected layers; q is None where the loss needs no queries.
        student_segments, teacher_segments
            Segment ids of both token sequences, 0 at padding.
        same_time
            Whether they are known to be equal.
        places
            See `SegmentWarp.matrix`.

        Returns
        -------
        Keys, values and queries (or None) at the student's layers, heads, tokens and widths. At student tokens without
        a counterpart they mean nothing: mask them.
        """
        wanted = (k, v, None if self.query_map is None else q)
        dtype = next((parameter.dtype for parameter in self.parameters()), None)
        segments = student_segments, teacher_segments
        k_placed, v_placed, q_placed = self.placement(wanted, *segments, same_time, dtype, places)
        assert k_placed is not None
        assert v_placed is not None
        q_target = None if q_placed is None or self.query_map is None else self.query_map(q_placed)
        return self.key_map(k_placed), self.value_map(v_placed), q_target


def count_parameters(module: nn.Module) -> int:
    """Return the number of learnable numbers in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def map_generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for one purpose, so that no draw shifts another's."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose))
