"""What the groups of `conf/` choose, each made alone: a choice's target, called with what its group gives and its options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from hydra.utils import get_method, get_object
from transformers import PreTrainedModel

from kv_align.align.aligner import Aligner, count_parameters, map_generator
from kv_align.align.head_map import HeadMap, MapInit, MapShape
from kv_align.align.layer_map.learned import Mixture
from kv_align.align.layer_time_map import LayerMixture
from kv_align.align.paired_states import Calibration, Kind
from kv_align.align.time_warp import SegmentWarp
from kv_align.config.config import Config
from kv_align.config.options import parameters_of
from kv_align.config.schema import Choice
from kv_align.config.signals import uses_aligner
from kv_align.data.example import DataSource
from kv_align.losses.base import Loss, Pairing
from kv_align.models.adapter import Adapter
from kv_align.models.capture.prepare import Geometry
from kv_align.models.devices import is_out_of_memory
from kv_align.runs.errors import ConfigError
from kv_align.runs.seeds import derive_seed

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layers:
    """Which teacher layers a run looks at.

    Attributes
    ----------
    of_student
        The teacher layer of each student layer, or the one that weighs most at the start of a learned mixture; empty where
        nothing is compared.
    read
        What the teacher must give, in this order.
    mixture
        Where a learned mixture of all of `read` starts; None where layers are selected.
    """

    of_student: list[int]
    read: list[int]
    mixture: Mixture | None = None

    def placed(self) -> list[int] | LayerMixture:
        """What a `LayerTimeMap` does with the layers that were read; a mixture is a new one at each call."""
        if self.mixture is not None:
            return LayerMixture(self.mixture)
        return [self.read.index(layer) for layer in self.of_student]


def make(choice: Choice, *arguments: Any) -> Any:
    """Call a choice's target with what its group passes, and with its options.

    Raises
    ------
    ConfigError
        If the target refuses an option, cannot be imported, or is not all that its group asks for, or where what it makes
        finds no room in memory.
    """
    try:
        return get_object(choice.target)(*arguments, **choice.options)
    except ValueError as error:
        raise ConfigError(f"{choice.name}: {error}.") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        numbers = {key: value for key, value in choice.options.items() if type(value) in (int, float)}
        asked = " and ".join(f"{key}={value}" for key, value in numbers.items()) or "models of this size"
        raise ConfigError(
            f"{choice.name} is not allowed with {asked}: what it makes finds no room in memory; make it smaller."
        ) from error
    except (ImportError, TypeError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"_target_={choice.target} is not allowed: {message}; correct that class.") from error


def make_source(config: Config) -> DataSource:
    """Return the data source."""
    return cast(DataSource, make(config.data))


def make_adapter(config: Config) -> Callable[[PreTrainedModel], Adapter] | None:
    """Return what makes the adapter of a student, from a seed of its own; None where the student itself learns."""
    if not config.adapter.target:
        return None
    return lambda student: cast(Adapter, make(config.adapter, student, derive_seed(config.seed, "student adapter")))


def make_time_warp(config: Config) -> SegmentWarp:
    """Return the resampling of tokens, of a run that compares states."""
    assert config.time_warp is not None
    return cast(SegmentWarp, make(config.time_warp))


def make_loss(choice: Choice, pairing: Callable[[], Pairing]) -> Loss:
    """Return the loss, with the pair's shapes if it asks for them (by a parameter `pairing`).

    Raises
    ------
    ConfigError
        As `make`, and if it does not say what its means are over.
    """
    loss = cast(Loss, make(choice, *([pairing()] if "pairing" in parameters_of(choice.target) else [])))
    for part in loss.parts:
        counted = getattr(part, "counted", None)
        if counted not in ("scored", "aligned"):
            raise ConfigError(
                f"loss={choice.name} is not allowed: {type(part).__name__}.counted is {counted!r} and must be 'scored' or "
                "'aligned', the tokens that its components are means over; correct that class."
            )
    return loss


def choose_layers(
    config: Config,
    teacher: Geometry,
    student: Geometry,
    similarity: Callable[[], list[list[float]]] | None = None,
) -> Layers:
    """Return the teacher layers of each student layer.

    Parameters
    ----------
    config
        Of the run.
    teacher, student
        Their shapes.
    similarity
        Measures [L_s][L_t] for a map that asks for it (by a parameter `similarity`).
    """
    if config.layer_map is None:
        return Layers([], [])
    arguments: list[Any] = [teacher.num_layers, student.num_layers, config.seed]
    if "similarity" in parameters_of(config.layer_map.target):
        assert similarity is not None
        arguments.append(similarity())
    chosen = make(config.layer_map, *arguments)
    if isinstance(chosen, Mixture):
        return Layers(chosen.layers, list(range(teacher.num_layers)), chosen)
    layers = list(chosen)
    return Layers(layers, sorted(set(layers)))


def make_aligner(
    config: Config,
    teacher: Geometry,
    student: Geometry,
    *,
    queries: bool,
    layers: Layers | None = None,
    calibration: Callable[[], Calibration] | None = None,
) -> Aligner | None:
    """Return the aligner on the CPU, drawn from the run's seed; None where nothing is aligned.

    Each kind's mix and width map have generators of their own, so that arms which differ in one of them, or in whether
    queries are aligned, start from the same others.

    Parameters
    ----------
    config
        Of the run.
    teacher, student
        Their shapes.
    queries
        Whether the loss needs queries.
    layers
        What `choose_layers` returned; None: it is asked.
    calibration
        Reads both models' states for an init that asks for them (by a parameter `calibration`).
    """
    if not uses_aligner(config):
        return None
    layers = choose_layers(config, teacher, student) if layers is None else layers
    init, states = None, None
    if config.init is not None:
        init = partial(get_method(config.init.target), **config.init.options)
        if "calibration" in parameters_of(config.init.target):
            assert calibration is not None
            states = calibration()
    t, s, number = teacher, student, student.num_layers
    shapes: dict[Kind, MapShape] = {
        "key": MapShape(number, t.num_key_value_heads, t.key_width, s.num_key_value_heads, s.key_width),
        "value": MapShape(number, t.num_key_value_heads, t.value_width, s.num_key_value_heads, s.value_width),
    }
    if queries:
        shapes["query"] = MapShape(number, t.num_query_heads, t.key_width, s.num_query_heads, s.key_width)
    maps: dict[Kind, HeadMap] = {}
    for kind, shape in shapes.items():
        mix, width = (map_generator(config.seed, f"aligner {kind} {part}") for part in ("mix", "width"))
        maps[kind] = make(config.aligner, shape, MapInit(init, mix, width, kind, shapes, states))
    _log_match(config, list(maps.values()))
    return Aligner(layers.placed(), make_time_warp(config), maps["key"], maps["value"], maps.get("query"))


def _log_match(config: Config, maps: list[HeadMap]) -> None:
    matched = [each.matched for each in maps if each.matched is not None]
    if matched:
        own = sum(count_parameters(each) for each in maps)
        LOGGER.info("aligner=%s: %d parameters, matched to %d", config.aligner.name, own, sum(matched))
