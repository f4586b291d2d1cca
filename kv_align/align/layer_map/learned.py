"""`layer_map=learned`: each student layer looks at a mixture of all teacher layers. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kv_align.align.layer_map.fixed import proportional
from kv_align.config.options import PositiveFloat, UnitFloat


@dataclass(frozen=True)
class Mixture:
    """Where learned weights over the teacher's layers start.

    Attributes
    ----------
    layers
        The teacher layer of each student layer that weighs most: what losses are scaled by and provenance names.
    logits
        [L_s][L_t]; the weights are their softmax.
    temperature
        Divides the logits.
    """

    layers: list[int]
    logits: list[list[float]]
    temperature: float


def learned(
    num_teacher_layers: int,
    num_student_layers: int,
    seed: int,
    *,
    start_weight: UnitFloat,
    temperature: PositiveFloat,
) -> Mixture:
    """Weights over all teacher layers for each student layer, trained with the aligner; one for keys, values and queries.

    Every teacher layer is computed and kept for each batch: about L_t / L_s times the memory of a map that selects.

    Parameters
    ----------
    num_teacher_layers, num_student_layers, seed
        As every layer map is given; the seed is not looked at.
    start_weight
        Of the proportional map's layer; the others share the rest.
    temperature
        Divides the logits. Adam moves a logit by no more than the learning rate per step, so this says how far the
        weights can go in a run.

    Raises
    ------
    ValueError
        If there is nothing to learn: one teacher layer, or a start that has no gradient.
    """
    if num_teacher_layers < 2:
        raise ValueError("the teacher has a single layer, so there is nothing to mix; use layer_map=proportional")
    if not 0 < start_weight < 1:
        raise ValueError(
            f"layer_map.start_weight={start_weight} leaves nothing to learn; use a number between 0 and 1, such as 0.5"
        )
    layers = proportional(num_teacher_layers, num_student_layers, seed)
    lead = temperature * math.log(start_weight * (num_teacher_layers - 1) / (1 - start_weight))
    logits = [[lead if layer == first else 0.0 for layer in range(num_teacher_layers)] for first in layers]
    return Mixture(layers, logits, temperature)
