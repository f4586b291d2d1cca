"""The one interface that training sees: teacher states in, targets in the student's shape out.

Axes: B batch, L layers, H heads, S student tokens, R teacher tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kv_align.align.heads import HeadMap
from kv_align.align.time_warp import SegmentWarp, resample
from kv_align.seeds import derive_seed


class Aligner(nn.Module):
    """Layer map, time warp and head maps, in this order.

    The warp acts on the teacher's raw states, so that it is the same in every arm and the maps see no more tokens than
    the student has. All arms are this class; they differ in the maps they are given.

    Parameters
    ----------
    layers
        For each student layer, its place among the teacher layers that `forward` is given.
    time_warp
        The resampling of tokens.
    key_map, value_map, query_map
        A map for each kind; None where the loss needs no queries.
    """

    def __init__(
        self,
        layers: Sequence[int],
        time_warp: SegmentWarp,
        key_map: HeadMap,
        value_map: HeadMap,
        query_map: HeadMap | None,
    ) -> None:
        super().__init__()
        self._layers = list(layers)
        self._time_warp = time_warp
        self.key_map, self.value_map, self.query_map = key_map, value_map, query_map

    def forward(
        self,
        k: Float[Tensor, "b lt hk r dk"],
        v: Float[Tensor, "b lt hv r dv"],
        q: Float[Tensor, "b lt hq r dk"] | None,
        student_segments: Int[Tensor, "b s"],
        teacher_segments: Int[Tensor, "b r"],
        same_time: bool,
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

        Returns
        -------
        Keys, values and queries (or None) at the student's layers, heads, tokens and widths. At student tokens without
        a counterpart they mean nothing: mask them.
        """
        weights = None
        if not self._time_warp.is_identity(same_time):
            weights = self._time_warp.matrix(student_segments, teacher_segments)
        k_target = self.key_map(self._select(k, weights))
        v_target = self.value_map(self._select(v, weights))
        q_target = None if q is None or self.query_map is None else self.query_map(self._select(q, weights))
        return k_target, v_target, q_target

    def _select(self, states: Tensor, weights: Tensor | None) -> Tensor:
        if self._layers != list(range(states.shape[1])):
            states = states[:, self._layers]
        if not torch.is_autocast_enabled(states.device.type):
            states = states.to(next(self.parameters()).dtype)  # a bf16 teacher beside a float32 aligner
        return states if weights is None else resample(states, weights)


def count_parameters(module: nn.Module) -> int:
    """Return the number of learnable numbers in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def map_generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for one purpose, so that no draw shifts another's."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose))
