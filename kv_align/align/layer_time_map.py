"""Brings a teacher's states to the student's layers and tokens: layer map, then time warp.

It acts on raw states, so that it is the same in every arm and whatever follows sees no more tokens than the student has.

Axes: B batch, L layers, H heads, S student tokens, R teacher tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kv_align.align.layer_map.learned import Mixture
from kv_align.align.time_warp import SegmentWarp, resample
from kv_align.data.correspondence import Correspondence


class LayerMixture(nn.Module):
    """A softmax over the teacher's layers for each student layer.

    Parameters
    ----------
    start
        Its logits and their temperature.
    """

    def __init__(self, start: Mixture) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(start.logits))  # [L_s, L_t]
        self._temperature = start.temperature

    def weights(self) -> Float[Tensor, "ls lt"]:
        """Weights of the teacher's layers; rows sum to 1."""
        return torch.softmax(self.logits / self._temperature, dim=-1)

    def __call__(self, states: Float[Tensor, "b lt h r d"]) -> Float[Tensor, "b ls h r d"]:
        """Mix layers, with torch's hooks."""
        mixed: Tensor = super().__call__(states)
        return mixed

    def forward(self, states: Float[Tensor, "b lt h r d"]) -> Float[Tensor, "b ls h r d"]:
        """Mix the layers of keys, values or queries."""
        return torch.einsum("st,bthrd->bshrd", self.weights().to(states.dtype), states)


class LayerTimeMap(nn.Module):
    """Layer map and time warp, in this order.

    Parameters
    ----------
    layers
        For each student layer, its place among the teacher layers that are given; or a learned mixture of them.
    time_warp
        The resampling of tokens.
    """

    def __init__(self, layers: Sequence[int] | LayerMixture, time_warp: SegmentWarp) -> None:
        super().__init__()
        self.mixture = layers if isinstance(layers, LayerMixture) else None
        self._layers = [] if isinstance(layers, LayerMixture) else list(layers)
        self._time_warp = time_warp

    def __call__(
        self,
        states: Mapping[str, Float[Tensor, "b lt _ r _"]],
        correspondence: Correspondence,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Float[Tensor, "b ls _ s _"]]:
        """Bring states to the student's layers and tokens, with torch's hooks; see `forward`."""
        mapped: dict[str, Tensor] = super().__call__(states, correspondence, dtype)
        return mapped

    def forward(
        self,
        states: Mapping[str, Float[Tensor, "b lt _ r _"]],
        correspondence: Correspondence,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Float[Tensor, "b ls _ s _"]]:
        """Bring states to the student's layers and tokens.

        Parameters
        ----------
        states
            Keys, values, queries or whatever else has a teacher's layers and tokens, by name.
        correspondence
            Of the two models' tokens.
        dtype
            What the states are wanted in, before they are mixed or resampled (a bfloat16 teacher beside a float32
            aligner); None, or mixed precision, leaves them as they are.
        """
        weights = None if self._time_warp.is_identity(correspondence) else self._time_warp.matrix(correspondence)
        return {name: self._map(each, weights, dtype) for name, each in states.items()}

    def _map(self, states: Tensor, weights: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        if self.mixture is None and self._layers != list(range(states.shape[1])):
            states = states[:, self._layers]
        if dtype is not None and not torch.is_autocast_enabled(states.device.type):
            states = states.to(dtype)
        if self.mixture is not None:
            states = self.mixture(states)
        return states if weights is None else resample(states, weights)
