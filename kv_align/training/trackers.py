"""TensorBoard, MLflow and Weights & Biases get what `metrics.jsonl` gets; what goes wrong with them ends no run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from kv_align.config.config import Config
from kv_align.runs.run_dir import RunDirectory
from kv_align.training.distributed.processes import is_first

LOGGER = logging.getLogger(__name__)
PROJECT = "kv-align"

_MAKERS: dict[str, Callable[[Path], GeneralTracker]] = {
    "tensorboard": lambda folder: TensorBoardTracker(PROJECT, folder),
    # Into MLFLOW_TRACKING_URI, else where MLflow itself keeps runs.
    "mlflow": lambda folder: MLflowTracker(PROJECT, run_name=folder.name),
    "wandb": lambda folder: WandBTracker(PROJECT, name=folder.name, dir=str(folder)),
}


class Trackers:
    """What a run tells besides its own files.

    Parameters
    ----------
    names
        Of `tensorboard`, `mlflow`, `wandb`.
    folder
        The run's.
    settings
        Of the run, by dotted keys, for those that show them.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._trackers: list[GeneralTracker] = []
        for name in names:
            self._trackers += self._try(name, partial(_started, name, folder, settings)) or []

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Give one row of metrics to all of them; one that fails gets no further row."""
        for tracker in list(self._trackers):
            self._do(tracker, partial(tracker.log, dict(row), step=step))

    def finish(self) -> None:
        """Close them."""
        for tracker in list(self._trackers):
            self._do(tracker, tracker.finish)
        self._trackers = []

    def _do(self, tracker: GeneralTracker, act: Callable[[], Any]) -> None:
        if self._try(tracker.name, act) is None:
            self._trackers.remove(tracker)

    def _try(self, name: str, act: Callable[[], Any]) -> list[Any] | None:
        """Return the result of an act, alone in a list; None where it failed."""
        try:
            return [act()]
        except Exception as error:  # whatever a service, a disk or a network does
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            LOGGER.warning("trainer.tracker=%s gets nothing more, and the run goes on: %s", name, reason)
            return None


def trackers_of(config: Config, run: RunDirectory) -> Trackers:
    """Return the trackers that a configuration names, of the one process that writes."""
    return Trackers(config.trainer.tracker if is_first() else (), run.path, flat(config.model_dump(by_alias=True)))


def _started(name: str, folder: Path, settings: Mapping[str, Any]) -> GeneralTracker:
    tracker = _MAKERS[name](folder)
    tracker.start()
    if name != "tensorboard":  # which would write a folder of its own for them
        tracker.store_init_configuration(dict(settings))
    return tracker


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys."""
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return rows
