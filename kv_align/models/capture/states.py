"""What is recorded of attention, and compared: keys, values and queries."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class States:
    """Keys, values and (where they are asked for) queries of some layers, heads and tokens, [B, L, H, T, D]."""

    k: Float[Tensor, "b l hk t dk"]
    v: Float[Tensor, "b l hv t dv"]
    q: Float[Tensor, "b l hq t dk"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return them by name, without queries where there are none."""
        return {"k": self.k, "v": self.v} | ({} if self.q is None else {"q": self.q})
