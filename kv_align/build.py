"""From a configuration to the objects of a run: each choice's target, called with its options."""

from __future__ import annotations

from typing import Any, cast

import torch
from hydra.utils import get_method, get_object
from torch import Tensor

from kv_align.align.aligner import Aligner, map_generator
from kv_align.align.heads import HeadMap, MapShape, MapStart
from kv_align.capture import Geometry
from kv_align.config import Choice, Config
from kv_align.data.example import DataSource
from kv_align.data.prepared import PreparedSplit
from kv_align.distill import Teacher
from kv_align.effective import uses_keys_values
from kv_align.errors import ConfigError
from kv_align.objectives.objective import Objective
from kv_align.quality import variance


def make(choice: Choice, *arguments: Any) -> Any:
    """Call a choice's target with what its group passes, and with its options.

    Raises
    ------
    ConfigError
        If the target refuses an option.
    """
    try:
        return get_object(choice.target)(*arguments, **choice.options)
    except ValueError as error:
        raise ConfigError(f"{choice.name}: {error}.") from error


def make_source(config: Config) -> DataSource:
    """Return the data source."""
    return cast(DataSource, make(config.data))


def make_objective(config: Config) -> Objective:
    """Return the objective."""
    return cast(Objective, make(config.loss))


def layer_map(config: Config, teacher: Geometry, student: Geometry) -> list[int]:
    """Return the teacher layer of each student layer; empty where nothing is aligned."""
    if config.layer_map is None:
        return []
    return list(make(config.layer_map, teacher.num_layers, student.num_layers, config.seed))


def make_aligner(config: Config, teacher: Geometry, student: Geometry, *, queries: bool) -> Aligner | None:
    """Return the aligner on the CPU, drawn from the run's seed; None where nothing is aligned.

    Each kind's mix and width map have generators of their own, so that arms which differ in one of them, or in whether
    queries are aligned, start from the same others.
    """
    if not uses_keys_values(config) or config.time_warp is None:
        return None
    layers = layer_map(config, teacher, student)
    places = {layer: place for place, layer in enumerate(sorted(set(layers)))}

    def head_map(kind: str, teacher_heads: int, teacher_width: int, student_heads: int, student_width: int) -> HeadMap:
        start = MapStart(
            None if config.init is None else get_method(config.init.target),
            map_generator(config.seed, f"aligner {kind} mix"),
            map_generator(config.seed, f"aligner {kind} width"),
        )
        shape = MapShape(student.num_layers, teacher_heads, teacher_width, student_heads, student_width)
        return cast(HeadMap, make(config.aligner, shape, start))

    t, s = teacher, student
    return Aligner(
        [places[layer] for layer in layers],
        make(config.time_warp),
        head_map("key", t.num_key_value_heads, t.key_width, s.num_key_value_heads, s.key_width),
        head_map("value", t.num_key_value_heads, t.value_width, s.num_key_value_heads, s.value_width),
        head_map("query", t.num_query_heads, t.key_width, s.num_query_heads, s.key_width) if queries else None,
    )


def calibrate(
    config: Config, teacher: Teacher, layers: list[int], train: PreparedSplit, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Variance of the teacher's raw keys and values by student layer, over the first training examples.

    The examples do not depend on the seed, and nothing of the student or the aligner enters: the same in all arms.

    Returns
    -------
    Two tensors [L_s]; ones where nothing is aligned.
    """
    if not layers:
        return torch.ones(1, device=device), torch.ones(1, device=device)
    places = {layer: place for place, layer in enumerate(sorted(set(layers)))}
    order = [places[layer] for layer in layers]
    count = min(config.evaluation.calibration_examples, len(train.examples))
    size = config.evaluation.batch_size
    found: dict[str, list[Tensor]] = {"k": [], "v": []}
    tokens = []
    for start in range(0, count, size):
        # Matched batches, read by the teacher alone; an average of batch variances, weighted by tokens.
        batch = train.collate(list(range(start, min(start + size, count)))).to(device)
        states = teacher.read(batch, "keys_values")
        assert states.k is not None
        assert states.v is not None
        found["k"].append(variance(states.k, batch.teacher.mask))
        found["v"].append(variance(states.v, batch.teacher.mask))
        tokens.append(batch.teacher.mask.sum().double())
    weights = torch.stack(tokens) / torch.stack(tokens).sum()
    key, value = (torch.einsum("n,nl->l", weights, torch.stack(found[kind])) for kind in ("k", "v"))
    return key[order].float(), value[order].float()
