"""How a model makes logits of its last hidden states, found out by trying: `find_head` compares them with its own.

With the head in hand, logits are made where they are needed, some rows at a time
(`kv_align.losses.predictions.linear_head`), and a model's forward pass ends before the largest tensor of a step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kv_align.models.devices import device_of
from kv_align.models.evaluating import evaluating

# What a configuration may call a factor of the logits, and the power that it comes in.
_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}
_CAP = "final_logit_softcapping"


@dataclass(frozen=True)
class Bend:
    """What a model does to the products of hidden states and head: `cap tanh(scale x / cap)`, or `scale x`.

    Attributes
    ----------
    scale
        A factor (Cohere, Granite).
    cap
        No logit is beyond it (Gemma 2); None where nothing is bent.
    """

    scale: float = 1.0
    cap: float | None = None

    def logits(self, products: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        """Make logits of products; the products themselves where that is all they are."""
        if self.scale != 1.0:
            products = products * self.scale
        return products if self.cap is None else (products / self.cap).tanh_().mul_(self.cap)

    def pull_back(self, gradient: Float[Tensor, "*n v"], logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        """Make a gradient by products of one by logits, in its place."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Head:
    """A model's linear head, and what follows it.

    Attributes
    ----------
    linear
        The module itself: its weight may be tied, gathered or exchanged between two uses.
    bend
        What makes logits of its outputs.
    """

    linear: nn.Linear
    bend: Bend = Bend()


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head | None:
    """Return the head by which a model's logits follow from the last hidden states of its base model.

    Two tokens are read in both ways, so whatever a model does otherwise shows, whatever it is called.

    Returns
    -------
    None where they do not follow: no plain linear layer (quantised, adapted), one that other code runs around (spread over
    devices), or other logits. Such a model makes its logits itself.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or "forward" in vars(linear) or model.base_model is model:
        return None
    inputs = {"input_ids": torch.tensor([[1, 2]], device=device_of(model)), "use_cache": False}
    with evaluating(model):
        expected = model(**inputs).logits
        output = model.base_model(**inputs)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != linear.in_features or not expected.any():
        return None
    products = linear(hidden.to(linear.weight.dtype)).to(torch.promote_types(expected.dtype, torch.float32))
    tolerance = 4 * torch.finfo(expected.dtype).eps * expected.abs().max()
    for bend in _bends(model):
        if ((bend.logits(products) - expected).abs() <= tolerance).all():
            return Head(linear, bend)
    return None


def _bends(model: PreTrainedModel) -> list[Bend]:
    """What a model may do after its head, by its configuration; what is named there comes first."""
    config = model.config.get_text_config(decoder=True)
    scales = [number**power for name, power in _SCALES.items() for number in _number(config, name)]
    return [Bend(scale, cap) for scale, cap in itertools.product([*scales, 1.0], [*_number(config, _CAP), None])]


def _number(config: PreTrainedConfig, name: str) -> list[float]:
    value = getattr(config, name, None)
    return [float(value)] if isinstance(value, int | float) else []
