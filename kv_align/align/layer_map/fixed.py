"""Which teacher layer each student layer looks at: `(L_t, L_s, seed) -> [teacher layer of student layer 0, 1, ...]`.

Layers count from 0. Every map gives every student layer a target. Imports no torch, so that a map which cannot serve a
pair is refused before anything is loaded.
"""

from __future__ import annotations

import random as random_module

from kv_align.config.options import LayerList


def proportional(num_teacher_layers: int, num_student_layers: int, seed: int) -> list[int]:
    """Same relative depth; the last layer maps to the last. Serves any pair."""
    return [
        max(0, -(-(layer + 1) * num_teacher_layers // num_student_layers) - 1) for layer in range(num_student_layers)
    ]


def last(num_teacher_layers: int, num_student_layers: int, seed: int) -> list[int]:
    """Return the teacher's last L_s layers, in order.

    Raises
    ------
    ValueError
        If the student has more layers than the teacher.
    """
    if num_student_layers > num_teacher_layers:
        raise ValueError(
            f"the student has {num_student_layers} layers and the teacher only {num_teacher_layers}; "
            "use layer_map=proportional"
        )
    return list(range(num_teacher_layers - num_student_layers, num_teacher_layers))


def explicit(num_teacher_layers: int, num_student_layers: int, seed: int, *, layers: LayerList) -> list[int]:
    """Return the list that was given.

    Raises
    ------
    ValueError
        If it has another length than the student has layers, or names a layer that the teacher does not have.
    """
    if len(layers) != num_student_layers:
        raise ValueError(
            f"layer_map.layers={list(layers)} has {len(layers)} entries for {num_student_layers} student layers; "
            "give one teacher layer for each"
        )
    if max(layers) >= num_teacher_layers:
        raise ValueError(
            f"layer_map.layers={list(layers)} names layer {max(layers)} and the teacher's are 0 to "
            f"{num_teacher_layers - 1}; use these"
        )
    return list(layers)


def reverse(num_teacher_layers: int, num_student_layers: int, seed: int) -> list[int]:
    """Control: the proportional map upside down."""
    return proportional(num_teacher_layers, num_student_layers, seed)[::-1]


def random(num_teacher_layers: int, num_student_layers: int, seed: int) -> list[int]:
    """Control: teacher layers drawn by the run's seed, without repetition as long as there are enough."""
    generator = random_module.Random(f"kv-align layer map {seed}")
    drawn: list[int] = []
    while len(drawn) < num_student_layers:
        drawn += generator.sample(range(num_teacher_layers), num_teacher_layers)
    return drawn[:num_student_layers]
