"""All objects of a run, made from its configuration in the order in which they depend on each other."""

from __future__ import annotations

import atexit
import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from kv_align.config.config import Config
from kv_align.config.signals import Signals, signals_of
from kv_align.data.loader import total_steps
from kv_align.data.prepared import PreparedSplit, check_read_alike, prepare_split, same_tokenizer
from kv_align.evaluation.evaluate import Evaluator, share_correct
from kv_align.experiment.choices import make_adapter, make_source
from kv_align.experiment.distiller import make_distiller
from kv_align.experiment.limits import check_lengths, check_limits
from kv_align.models.load import (
    LanguageModel,
    check_queries,
    check_unrotated,
    load_student,
    load_teacher,
    weights_digest,
)
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.seeds import derive_seed
from kv_align.runs.stopwatch import Stopwatch
from kv_align.teacher.cache import TeacherCache
from kv_align.teacher.remembered import Memory
from kv_align.teacher.teacher import StateSource, Teacher
from kv_align.training.distributed.ddp import DDP, Parallel
from kv_align.training.distributed.fsdp import FSDP
from kv_align.training.distributed.processes import Processes
from kv_align.training.loop import Loop
from kv_align.training.step import Distiller

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The texts of a run, tokenised for both models."""

    train: PreparedSplit
    validation: PreparedSplit
    test: PreparedSplit

    def by_name(self) -> dict[str, PreparedSplit]:
        """Return them by the names that configurations and provenance use."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class Assembly:
    """The objects of a run.

    Attributes
    ----------
    parallel, processes
        How the processes of the run hold their parameters, and how they agree.
    teacher_model, student_model
        The pair, each with its tokenizer and shapes; the student's is the one that is evaluated.
    splits
        The texts.
    num_steps
        Optimizer steps from start to end.
    distiller, teacher, layers
        What learns, as it is evaluated; what teaches it; the teacher layer of each student layer (empty where no states
        are compared).
    validation_teacher
        Whom to ask for what the teacher gives of the validation texts.
    evaluator, loop
        What measures it, and what trains it.
    initial_digests
        SHA-256 of the weights of `student` and `aligner` (empty where there is none) before the first step.
    stopwatch
        Counts what is no step.
    """

    parallel: Parallel
    processes: Processes
    teacher_model: LanguageModel
    student_model: LanguageModel
    splits: Splits
    num_steps: int
    distiller: Distiller
    teacher: Teacher
    layers: list[int]
    validation_teacher: StateSource
    evaluator: Evaluator
    loop: Loop
    initial_digests: dict[str, str]
    stopwatch: Stopwatch

    @property
    def accelerator(self) -> Accelerator:
        """Device, precision and trackers."""
        return self.parallel.accelerator

    def part(self) -> None:
        """Close the trackers and end together: a launcher may end all processes when the first has gone.

        They stay a group for the next run of this job: made anew in the same processes, it may wait for the old one's.
        """
        self.processes.wait()
        self.loop.trackers.finish()


def assemble(
    config: Config, directory: RunDirectory, checkpoints: Path, stopwatch: Stopwatch | None = None
) -> Assembly:
    """Make the objects of a run; nothing is trained and nothing is written.

    Parameters
    ----------
    config, directory, checkpoints
        What to do, and where.
    stopwatch
        Counts what is no step; None: a new one.

    Raises
    ------
    ConfigError
        If models, tokenizers or texts show that the configuration cannot be done.
    """
    stopwatch = stopwatch or Stopwatch()
    parallel = _parallel(config)
    accelerator = parallel.accelerator
    processes = Processes(accelerator, config.trainer)
    torch.manual_seed(derive_seed(config.seed, "dropout"))  # also of what is drawn by whoever has no seed of its own
    teacher_model, student_model = _pair(config, accelerator.device, processes)
    splits = _splits(config, teacher_model, student_model)
    num_steps = total_steps(config, len(splits.train.examples))
    check_lengths(config, num_steps, len(splits.validation.examples))

    cache = TeacherCache(config, teacher_model, accelerator.autocast)
    with stopwatch.timed("calibration"):
        distiller, teacher, layers = make_distiller(
            config,
            teacher_model,
            student_model,
            splits.train,
            accelerator.autocast,
            kept=lambda teacher, wanted: cache.states(teacher, splits.train, wanted, rounded=True),
        )
    distiller = distiller.to(accelerator.device)
    initial_digests = {
        "student": weights_digest(distiller.student),
        "aligner": "" if distiller.aligner is None else weights_digest(distiller.aligner),
    }
    evaluated, adapter = parallel.for_evaluation(distiller, student_model.adapter)
    student_model = replace(student_model, model=evaluated.student, adapter=adapter)

    memory = Memory()

    def on_validation(teacher: Teacher, wanted: Signals) -> StateSource:
        source = cache.states(teacher, splits.validation, wanted, rounded=False)
        return memory.of(source) if isinstance(source, Teacher) else source

    validation_teacher = on_validation(teacher, evaluated.loss.requests)
    evaluator = Evaluator(
        config.evaluation,
        splits.validation,
        splits.test,
        student_model,
        teacher_model,
        autocast=accelerator.autocast,
        kept=on_validation,
    )

    def evaluate(step: int) -> dict[str, Any]:
        with parallel.full_weights():
            return _evaluation(config, evaluator, evaluated, validation_teacher, step, stopwatch)

    loop = Loop(
        config,
        directory,
        checkpoints,
        parallel,
        processes,
        distiller,
        cache.training(teacher, splits.train, evaluated.loss.requests, distiller.aligner, layers),
        splits.train,
        num_steps,
        evaluate,
        stopwatch,
    )
    # Seeds that models and adapters are drawn from are taken back on the CPU alone: GPUs would go on from them.
    torch.manual_seed(derive_seed(config.seed, processes.own("dropout")))
    return Assembly(
        parallel,
        processes,
        teacher_model,
        student_model,
        splits,
        num_steps,
        evaluated,
        teacher,
        layers,
        validation_teacher,
        evaluator,
        loop,
        initial_digests,
        stopwatch,
    )


def _parallel(config: Config) -> Parallel:
    # Its state is global; runs of one process (a multirun) may differ in it.
    AcceleratorState._reset_state(reset_partial_state=True)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # One process has nothing to share out.
    kind = FSDP if several and config.trainer.parallel == "fsdp" else DDP
    parallel = kind(
        # Left to itself, it takes several processes without a GPU for as many runs of one.
        cpu=several and not torch.accelerator.is_available(),
        mixed_precision=config.trainer.mixed_precision,
        kwargs_handlers=[
            # Where the aligner sits a step out, its parameters have no gradient to wait for.
            DistributedDataParallelKwargs(
                find_unused_parameters=config.align is not None and config.align.fit != "joint"
            ),
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # longer than any evaluation
        ],
    )
    if several:
        atexit.register(_leave_group)
    return parallel


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _pair(config: Config, device: torch.device, processes: Processes) -> tuple[LanguageModel, LanguageModel]:
    """Load teacher and student, and refuse a pair of which the loss cannot get what it asks for."""
    longest = config.data.max_length
    teacher = load_teacher(config.model, device, processes.number, longest=longest)
    student = load_student(config.model, config.seed, device, make_adapter(config), longest=longest)
    signals = signals_of(config.loss)
    with_queries = [signal for signal in signals if "q" in signal.fields]
    if with_queries:
        attention = any(signal.through_aligner for signal in with_queries)
        check_queries(config.model, config.loss.name, teacher, student, attention=attention)
    if config.keys is not None and not config.keys.rotated:
        check_unrotated(config.model, teacher, student)
    if any(signal.predicting for signal in signals) and not same_tokenizer(teacher.tokenizer, student.tokenizer):
        raise ConfigError(
            f"loss={config.loss.name} is not allowed with model.teacher={config.model.teacher}: its vocabulary is "
            f"another than that of model.student={config.model.student}; use a pair with one tokenizer, or another loss."
        )
    return teacher, student


def _splits(config: Config, teacher: LanguageModel, student: LanguageModel) -> Splits:
    source, data = make_source(config), config.data
    splits = Splits(
        train=prepare_split(source, "train", data, student, teacher, shuffle=data.shuffle_teacher),
        validation=prepare_split(source, "validation", data, student, teacher, shuffle=False),
        test=prepare_split(source, "test", data, student, teacher, shuffle=False),
    )
    if any(signal.predicting for signal in signals_of(config.loss)):
        check_read_alike(config, {"train": splits.train, "validation": splits.validation})
    check_limits(config, student, teacher, splits.by_name())
    return splits


def _evaluation(
    config: Config, evaluator: Evaluator, distiller: Distiller, teacher: StateSource, step: int, stopwatch: Stopwatch
) -> dict[str, Any]:
    """Columns of one evaluation: loss, agreement, probe, and exact match where it is declared."""
    with stopwatch.timed("evaluation"):
        row = evaluator.validate(distiller, teacher).row()
    with stopwatch.timed("probe"):
        row |= evaluator.probe().row()
    at_intervals = config.evaluation.exact_match_at_intervals
    if at_intervals:
        with stopwatch.timed("exact match"):
            answers = evaluator.exact_match("validation", at_intervals)
        row |= {"exact_match": share_correct(answers), "exact_match_examples": len(answers)}
    LOGGER.info("step %d: validation perplexity %.3f", step, row["validation_perplexity"])
    return row
