"""`loss=relations`: how tokens relate to each other in the student as in the teacher, without an aligner."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kv_align.config.options import Decay, LayerList, NonNegativeFloat, NonNegativeInt, PositiveInt
from kv_align.losses.attention_divergence import attention_divergence
from kv_align.losses.base import Loss, Pairing, Schedule
from kv_align.losses.comparison import Comparison, SourceComparison
from kv_align.losses.functional import Masked
from kv_align.models.capture.attention import AttentionSpec


class Relations(Loss):
    """`lambda_relations (KL of Q-Q + KL of K-K + KL of V-V relations)` (MiniLMv2: Wang et al., 2021, arXiv:2012.15828).

    All heads of a layer are laid side by side and cut anew into the same number of relation heads in teacher and student;
    the relations of a token are the softmax of its scaled dot products with the others, `KL(teacher || student)`, averaged
    over tokens, layers and relation heads. So neither head counts nor widths need to agree. As in the attention of a
    decoder, a token is related to itself and those before it (the paper's encoders relate all to all). States are as
    `conf/keys` says, before or after the rotary embedding.

    Parameters
    ----------
    pairing
        Shapes of the two models.
    lambda_relations, lambda_relations_decay, lambda_relations_warmup_steps
        Weight of the term and its schedule, see `Schedule`.
    relation_heads
        How many relation heads; must divide the numbers of queries and of keys and values of both models.
    layers
        Student layers that are compared, each with its teacher layer; None: the last alone, as in the paper.

    Raises
    ------
    ValueError
        If the heads cannot be cut so, or a layer is not the student's.
    """

    signals = ("relations",)
    counted = "aligned"

    def __init__(
        self,
        pairing: Pairing,
        *,
        lambda_relations: NonNegativeFloat,
        lambda_relations_decay: Decay | None = None,
        lambda_relations_warmup_steps: NonNegativeInt | None = None,
        relation_heads: PositiveInt,
        layers: LayerList | None,
    ) -> None:
        widths = set()
        for shape in (pairing.teacher, pairing.student):
            widths |= {shape.num_query_heads * shape.key_width}
            widths |= {shape.num_key_value_heads * width for width in (shape.key_width, shape.value_width)}
        common = math.gcd(*widths)
        if common % relation_heads:
            raise ValueError(
                f"loss.relation_heads={relation_heads} is not allowed: it must divide {common}, the greatest common divisor "
                "of both models' queries, keys and values; choose another number"
            )
        weight = Schedule(lambda_relations, lambda_relations_decay, lambda_relations_warmup_steps)
        self.schedules, self._heads = {"relation_loss": weight}, relation_heads
        self._layers = chosen_layers(layers, pairing.student.num_layers, [pairing.student.num_layers - 1])

    def components(self, comparison: Comparison) -> dict[str, Masked]:
        """`query_relation_loss`, `key_relation_loss` and `value_relation_loss`."""
        states, mask = comparison.of(SourceComparison), comparison.aligned
        ours, theirs = states.student.tensors(), states.source.tensors()
        return {
            f"{kind}_relation_loss": self._divergence(ours[name], theirs[name], mask)
            for kind, name in (("query", "q"), ("key", "k"), ("value", "v"))
        }

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """`relation_loss`."""
        query, key, value = (means[f"{kind}_relation_loss"] for kind in ("query", "key", "value"))
        return {"relation_loss": query + key + value}

    def _divergence(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Masked:
        ours, theirs = (self._relation_heads(each[:, self._layers]) for each in (student, teacher))
        # Zeros change no dot product; the divergence wants one width.
        width = max(ours.shape[-1], theirs.shape[-1])
        ours, theirs = (F.pad(each, (0, width - each.shape[-1])) for each in (ours, theirs))
        return attention_divergence(
            ours,
            ours,
            theirs,
            theirs,
            mask,
            forms=(AttentionSpec(scaling=1.0),) * len(self._layers),
            temperature=1.0,
        )

    def _relation_heads(self, states: Float[Tensor, "b l h t d"]) -> Float[Tensor, "b l r t e"]:
        """Cut all heads anew, and scale so that dot products are over the root of the relation heads' width."""
        together = rearrange(states.to(torch.promote_types(states.dtype, torch.float32)), "b l h t d -> b l t (h d)")
        heads = rearrange(together, "b l t (r e) -> b l r t e", r=self._heads)
        scaled: Tensor = heads * float(heads.shape[-1]) ** -0.25
        return scaled


def chosen_layers(layers: list[int] | None, num_layers: int, default: list[int]) -> list[int]:
    """Return the student layers that a loss compares.

    Raises
    ------
    ValueError
        If one of them is not the student's.
    """
    if layers is not None and max(layers) >= num_layers:
        raise ValueError(
            f"loss.layers={list(layers)} names layer {max(layers)} and the student's are 0 to {num_layers - 1}"
        )
    return default if layers is None else list(layers)
