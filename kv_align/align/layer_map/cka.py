"""`layer_map=cka`: each student layer looks at the teacher layer that is most like it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def cka(
    num_teacher_layers: int,
    num_student_layers: int,
    seed: int,
    similarity: Sequence[Sequence[float]],
    *,
    monotone: bool,
) -> list[int]:
    """Return the layers with the largest sum of similarities.

    Measured on both models' states before training: with an untrained student, the map follows noise.

    Parameters
    ----------
    num_teacher_layers, num_student_layers, seed
        As every layer map is given; the seed is not looked at.
    similarity
        [L_s][L_t], linear CKA of keys and of values, averaged (`kv_align.experiment.calibration`).
    monotone
        Whether the order of layers is kept: no student layer then looks below what the one under it looks at, and the sum
        is the largest that this allows. Otherwise each takes its own best, in whatever order. Either way a teacher layer
        may serve several.
    """
    if not monotone:
        return [max(range(num_teacher_layers), key=list(row).__getitem__) for row in similarity]
    # For each teacher layer, the largest sum of the student layers so far if none looks above it, and how it is reached.
    best: list[tuple[float, list[int]]] = [(0.0, [])] * num_teacher_layers
    for row in similarity:
        best = [(total + row[layer], [*path, layer]) for layer, (total, path) in enumerate(best)]
        for layer in range(1, num_teacher_layers):
            best[layer] = max(best[layer - 1], best[layer], key=lambda each: each[0])
    return best[-1][1]
