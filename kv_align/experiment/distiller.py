"""What stands between a teacher and a student: layers, aligner and loss, measured and made from one configuration."""

from __future__ import annotations

import torch

from kv_align.align.aligner import map_generator
from kv_align.align.layer_time_map import LayerTimeMap
from kv_align.config.config import Config
from kv_align.config.signals import signals_of
from kv_align.data.prepared import PreparedSplit
from kv_align.experiment.calibration import Calibrator
from kv_align.experiment.choices import choose_layers, make_aligner, make_loss, make_time_warp
from kv_align.losses.base import Pairing
from kv_align.models.load import LanguageModel
from kv_align.teacher.teacher import Autocast, Teacher, TeacherFor
from kv_align.training.step import Distiller


def make_distiller(
    config: Config,
    teacher: LanguageModel,
    student: LanguageModel,
    train: PreparedSplit,
    autocast: Autocast,
    kept: TeacherFor,
) -> tuple[Distiller, Teacher, list[int]]:
    """Make all that stands between two models, in the order in which it depends on each other.

    Parameters
    ----------
    config, teacher, student, train
        What to make, of which models, and the texts that it is calibrated on.
    autocast
        Makes the context in which models run in training.
    kept
        Says whom to ask for what the teacher gives of these texts.

    Returns
    -------
    What learns, what teaches it, and the teacher layer of each student layer (empty where no states are compared).
    """
    signals = signals_of(config.loss)
    rotated = config.keys is not None and config.keys.rotated
    queries = any(signal.through_aligner and "q" in signal.fields for signal in signals)
    geometries = (teacher.geometry, student.geometry)
    calibrator = Calibrator(config.evaluation, teacher, student, train, rotated=rotated, autocast=autocast, kept=kept)
    layers = choose_layers(config, *geometries, lambda: calibrator.similarity(make_time_warp(config)))
    reader = Teacher(teacher.model, layers.read, rotated=rotated)

    def layer_time_map() -> LayerTimeMap:
        return LayerTimeMap(layers.placed(), make_time_warp(config)).to(student.model.device)

    def pairing() -> Pairing:
        configs = [each.model.config.get_text_config() for each in (teacher, student)]
        return Pairing(
            *geometries,
            teacher_hidden=configs[0].hidden_size,
            student_hidden=configs[1].hidden_size,
            hidden_variance=lambda: calibrator.hidden_variance(reader, layers.of_student),
            generator=map_generator(config.seed, "objective"),
            vocabulary=min(each.vocab_size for each in configs),
        )

    loss = make_loss(config.loss, pairing)
    aligner = make_aligner(
        config,
        *geometries,
        queries=queries,
        layers=layers,
        calibration=lambda: calibrator.paired(reader, layer_time_map(), queries=queries),
    )
    unprojected = any(signal.concerns and not signal.through_aligner for signal in signals)
    variances = (torch.ones(1), torch.ones(1))
    if aligner is not None:
        variances = calibrator.key_value_variance(reader, layers.of_student)
    distiller = Distiller(
        student.model,
        aligner,
        loss,
        rotated=rotated,
        key_variance=variances[0],
        value_variance=variances[1],
        layer_time_map=layer_time_map() if unprojected and aligner is None else None,
    )
    return distiller, reader, layers.of_student
