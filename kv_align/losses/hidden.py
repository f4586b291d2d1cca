"""`loss=hidden`: the student's hidden states, projected, against the teacher's."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kv_align.config.options import Decay, LayerList, NonNegativeFloat, NonNegativeInt
from kv_align.losses.base import Loss, Pairing, Schedule
from kv_align.losses.comparison import Comparison, HiddenComparison
from kv_align.losses.functional import Masked, scaled_mse
from kv_align.losses.relations import chosen_layers


class Hidden(Loss):
    """`lambda_hidden MSE(student hidden states @ projection + bias, teacher hidden states)`.

    As in TinyBERT (Jiao et al., 2020, arXiv:1909.10351): the student is projected to the teacher's width, so that the
    target is fixed and cannot collapse; with a bias, and one projection per layer. The error of each layer is divided by
    the variance of the teacher's hidden states there, measured once, since they grow with depth: a projection that gives
    their mean has a loss near 1. A text's first token is left out of both: decoders keep states of hundreds of times the
    usual size there (massive activations, Sun et al., 2024, arXiv:2402.17762), beside which all others count for nothing.

    Parameters
    ----------
    pairing
        Shapes of the two models, and that variance.
    lambda_hidden, lambda_hidden_decay, lambda_hidden_warmup_steps
        Weight of the term and its schedule, see `Schedule`.
    layers
        Student layers that are compared, each with its teacher layer; None: all.

    Raises
    ------
    ValueError
        If a layer is not the student's.
    """

    signals = ("hidden_states",)
    counted = "aligned"
    learns_projection = True
    projection: Projection

    def __init__(
        self,
        pairing: Pairing,
        *,
        lambda_hidden: NonNegativeFloat,
        lambda_hidden_decay: Decay | None = None,
        lambda_hidden_warmup_steps: NonNegativeInt | None = None,
        layers: LayerList | None,
    ) -> None:
        number = pairing.student.num_layers
        self._layers = chosen_layers(layers, number, list(range(number)))
        self._variance = pairing.hidden_variance()[self._layers]
        self.schedules = {"hidden_loss": Schedule(lambda_hidden, lambda_hidden_decay, lambda_hidden_warmup_steps)}
        widths = (pairing.student_hidden, pairing.teacher_hidden)
        self.projection = Projection(len(self._layers), *widths, pairing.generator)

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """`hidden_loss`."""
        hidden, aligned = comparison.of(HiddenComparison), comparison.aligned
        projected = self.projection(hidden.student[:, self._layers])
        error = scaled_mse(
            projected[:, :, None],
            hidden.teacher[:, self._layers][:, :, None],
            aligned & (aligned.cumsum(dim=1) > 1),
            self._variance.to(projected.device),
        )
        return {"hidden_loss": Masked(error.total, aligned.sum())}


class Projection(nn.Module):
    """A linear map with bias for each layer; starts as `torch.nn.Linear` does.

    Parameters
    ----------
    num_layers, width_in, width_out
        Its shape.
    generator
        Draws the start.
    """

    def __init__(self, num_layers: int, width_in: int, width_out: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width_in)
        self.weight, self.bias = (
            nn.Parameter(torch.empty(num_layers, *shape).uniform_(-bound, bound, generator=generator))
            for shape in ((width_in, width_out), (width_out,))
        )

    def __call__(self, hidden: Float[Tensor, "b l t i"]) -> Float[Tensor, "b l t e"]:
        """Project, with torch's hooks."""
        projected: Tensor = super().__call__(hidden)
        return projected

    def forward(self, hidden: Float[Tensor, "b l t i"]) -> Float[Tensor, "b l t e"]:
        """Project each layer's hidden states."""
        return torch.einsum("blti,lie->blte", hidden, self.weight) + self.bias[:, None]
