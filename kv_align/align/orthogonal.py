"""Head by head, with a map that keeps the teacher's geometry: head mix and width map stay orthonormal while they learn."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parametrizations

from kv_align.align.head_map import Elastic, HeadMap, MapInit, MapShape
from kv_align.align.structured import StructuredMap, mix_and_project

_PARTS = ("mix", "width")
_TOLERANCE = 1e-4


class OrthogonalMap(HeadMap):
    """The structured map, with rows or columns (the fewer) of head mix and width map orthonormal at every step.

    So it cannot shrink its target onto the student. Into as many heads of the same width or more it keeps the inner
    products of the teacher's states over all heads; into fewer or narrower ones it is an orthogonal projection of them,
    which makes none longer. What learns are rotations of where it starts, `start expm(A)` with A skew-symmetric (Lezcano-
    Casado, 2019, arXiv:1909.09501), so weight decay is not for it; A is zero at the start, which is the init's, bit by bit.
    Of the numbers of `original`, those on and above the diagonal (below it where there are more columns) have no effect.

    Parameters
    ----------
    shape, start, share_dim_proj, share_layers, elastic
        See `StructuredMap`. The factors of `elastic` can stretch and shrink what this map does not.

    Raises
    ------
    ValueError
        If the init's head mix or width map is not orthonormal between these shapes.
    """

    uses_init = True
    # Whose head mix is not orthonormal, see `kv_align.config.checks`.
    unfit_inits = ("uniform", "random", "procrustes", "least_squares")

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
        self.inner = StructuredMap(
            shape, start, share_dim_proj=share_dim_proj, share_layers=share_layers, elastic=False
        )
        for name in _PARTS:
            _keep_orthonormal(self.inner, name)
        num_maps = len(self.inner.mix)
        self.elastic = Elastic(num_maps, shape.student_heads, shape.student_width) if elastic else None

    def forward(self, states: Float[Tensor, "b l ht t dt"]) -> Float[Tensor, "b l hs t ds"]:
        """Mix heads, then project the width."""
        with torch.autocast(states.device.type, enabled=False):  # whose precision is not one to turn matrices in
            mix, width = (self._matrices(name) for name in _PARTS)
        projected = mix_and_project(states, mix, width)
        return projected if self.elastic is None else self.elastic(projected)

    def _matrices(self, name: str) -> Tensor:
        """Make the matrices of the inner map from its rotations, in single precision or better."""
        rotations = getattr(self.inner.parametrizations, name)
        precision = torch.promote_types(rotations.original.dtype, torch.float32)
        base = {"base": rotations[0].base.to(precision)}
        matrices: Tensor = functional_call(rotations[0], base, (rotations.original.to(precision),))
        return matrices.to(rotations.original.dtype)


def _keep_orthonormal(module: StructuredMap, name: str) -> None:
    """Let a stack of matrices learn as rotations of what they are now."""
    start = getattr(module, name).detach().clone()
    tall = (start if start.shape[-2] >= start.shape[-1] else start.mT).double()
    defect = (tall.mT @ tall - torch.eye(tall.shape[-1])).abs().max().item()
    if defect > _TOLERANCE:
        raise ValueError(
            f"its head mix and width map must start orthonormal, and the {name} of this init is off by {defect:.2g} between "
            f"{list(start.shape[-2:])}; use init=orthogonal"
        )
    with torch.random.fork_rng(
        devices=[]
    ):  # the parametrisation completes its base at random: ours is put in its place
        parametrizations.orthogonal(module, name, orthogonal_map="matrix_exp")
    parametrization = getattr(module.parametrizations, name)[0]
    parametrization.base = _completed(tall).to(start.dtype)


def _completed(tall: Float[Tensor, "*stack n k"]) -> Float[Tensor, "*stack n n"]:
    """Square orthonormal matrices whose first columns are these, to the bit."""
    whole = torch.linalg.qr(tall, mode="complete").Q
    return torch.cat([tall, whole[..., tall.shape[-1] :]], dim=-1).contiguous()
