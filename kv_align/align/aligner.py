"""The one interface that training sees: teacher states in, targets in the student's shape out.

Axes: B batch, L layers, H heads, S student tokens, R teacher tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kv_align.align.head_map import HeadMap
from kv_align.align.layer_time_map import LayerMixture, LayerTimeMap
from kv_align.align.time_warp import SegmentWarp
from kv_align.data.correspondence import Correspondence
from kv_align.models.capture.states import States
from kv_align.runs.seeds import derive_seed


class Aligner(nn.Module):
    """Layer map, time warp and head maps, in this order.

    All arms are this class; they differ in the maps they are given.

    Parameters
    ----------
    layers, time_warp
        See `LayerTimeMap`.
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
        self.placement = LayerTimeMap(layers, time_warp)  # checkpoints and aligner files know it by this name
        self.key_map, self.value_map, self.query_map = key_map, value_map, query_map

    def __call__(self, states: States, correspondence: Correspondence) -> States:
        """Project, with torch's hooks; see `forward`."""
        projected: States = super().__call__(states, correspondence)
        return projected

    def forward(self, states: States, correspondence: Correspondence) -> States:
        """Project teacher keys, values and queries.

        Parameters
        ----------
        states
            Of the teacher's selected layers; queries are passed over where the loss needs none.
        correspondence
            Of the two models' tokens.

        Returns
        -------
        States at the student's layers, heads, tokens and widths. At student tokens without a counterpart they mean
        nothing: mask them.
        """
        wanted = states.tensors()
        if self.query_map is None:
            wanted.pop("q", None)
        dtype = next((parameter.dtype for parameter in self.parameters()), None)
        placed = self.placement(wanted, correspondence, dtype)
        q = None if self.query_map is None or "q" not in placed else self.query_map(placed["q"])
        return States(self.key_map(placed["k"]), self.value_map(placed["v"]), q)


def count_parameters(module: nn.Module) -> int:
    """Return the number of learnable numbers in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def map_generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for one purpose, so that no draw shifts another's."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose))
