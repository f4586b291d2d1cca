"""All objects of a run, made from its configuration, and a record of what they start from."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

from kv_align.align.aligner import count_parameters
from kv_align.config.config import Config
from kv_align.config.extras import extras_versions
from kv_align.config.identity import content_hash, continued_run
from kv_align.config.signals import Signals, signals_of
from kv_align.data.example import Example
from kv_align.data.loader import data_order, total_steps
from kv_align.data.prepared import PreparedSplit, prepare_split, same_tokenizer
from kv_align.evaluation.evaluate import Evaluator, share_correct
from kv_align.experiment.build import make_adapter, make_distiller, make_source
from kv_align.experiment.limits import check_limits
from kv_align.models.load import check_queries, check_unrotated, load_student, load_teacher, weights_digest
from kv_align.runs.errors import ConfigError, invalid_value
from kv_align.runs.provenance import attempt_provenance
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.seeds import derive_seed
from kv_align.teacher.cache import TeacherCache
from kv_align.teacher.teacher import StateSource, Teacher
from kv_align.training.distributed.ddp import DDP, Parallel
from kv_align.training.distributed.fsdp import FSDP
from kv_align.training.distributed.processes import Processes
from kv_align.training.loop import Loop

LOGGER = logging.getLogger(__name__)


class Assembly:
    """The objects of a run, in the order in which they depend on each other.

    Parameters
    ----------
    config, directory, checkpoints
        What to do, and where.
    """

    def __init__(self, config: Config, directory: RunDirectory, checkpoints: Path) -> None:
        tracker = None if config.trainer.tracker == "none" else config.trainer.tracker
        # Its state is global; runs of one process (a multirun) may differ in it.
        AcceleratorState._reset_state(reset_partial_state=True)
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        # One process has nothing to share out.
        kind = FSDP if several and config.trainer.parallel == "fsdp" else DDP
        self.parallel: Parallel = kind(
            # Left to itself, it takes several processes without a GPU for as many runs of one.
            cpu=several and not torch.accelerator.is_available(),
            mixed_precision=config.trainer.mixed_precision,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=str(directory.path)),
            kwargs_handlers=[
                # Where the aligner sits a step out, its parameters have no gradient to wait for.
                DistributedDataParallelKwargs(
                    find_unused_parameters=config.align is not None and config.align.fit != "joint"
                ),
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # longer than any evaluation
            ],
        )
        self.accelerator = self.parallel.accelerator
        if several:
            atexit.register(_leave_group)
        self.processes = Processes(self.accelerator, config.trainer)
        if tracker is not None:
            self.accelerator.init_trackers("kv-align", init_kwargs={})
        device = self.accelerator.device
        torch.manual_seed(derive_seed(config.seed, "dropout"))

        longest = config.data.max_length
        self.teacher_reader = load_teacher(config.model, device, self.processes.number, longest=longest)
        self.student_reader = load_student(config.model, config.seed, device, make_adapter(config), longest=longest)
        readers = (self.student_reader, self.teacher_reader)
        signals = signals_of(config.loss)
        with_queries = [signal for signal in signals if "q" in signal.fields]
        if with_queries:
            pair = (self.teacher_reader, self.student_reader)
            attention = any(signal.through_aligner for signal in with_queries)
            check_queries(config.model, config.loss.name, *pair, attention=attention)
        if config.keys is not None and not config.keys.rotated:
            check_unrotated(config.model, self.teacher_reader, self.student_reader)
        source, data = make_source(config), config.data
        self.train = prepare_split(source, "train", data, *readers, shuffle=data.shuffle_teacher)
        self.validation = prepare_split(source, "validation", data, *readers, shuffle=False)
        self.test = prepare_split(source, "test", data, *readers, shuffle=False)
        check_limits(config, *readers, {"train": self.train, "validation": self.validation, "test": self.test})
        self.num_steps = total_steps(config, len(self.train.examples))
        _check_lengths(config, self.num_steps, len(self.validation.examples))

        tokenizers = (self.teacher_reader.tokenizer, self.student_reader.tokenizer)
        if any(signal.predicting for signal in signals) and not same_tokenizer(*tokenizers):
            raise ConfigError(
                f"loss={config.loss.name} is not allowed with model.teacher={config.model.teacher}: its vocabulary is "
                f"another than that of model.student={config.model.student}; use a pair with one tokenizer, or another loss."
            )
        cache = TeacherCache(config, self.teacher_reader, self.accelerator.autocast)
        distiller, self.teacher, self.layers = make_distiller(
            config,
            self.teacher_reader,
            self.student_reader,
            self.train,
            self.accelerator.autocast,
            kept=lambda teacher, wanted: cache.states(teacher, self.train, wanted, rounded=True),
        )
        distiller = distiller.to(device)
        self.initial_digests = {
            "student": weights_digest(distiller.student),
            "aligner": "" if distiller.aligner is None else weights_digest(distiller.aligner),
        }
        self.distiller, adapter = self.parallel.for_evaluation(distiller, self.student_reader.adapter)
        self.aligner, self.loss = self.distiller.aligner, self.distiller.loss
        self.student_reader = replace(self.student_reader, model=self.distiller.student, adapter=adapter)

        def on_validation(teacher: Teacher, wanted: Signals) -> StateSource:
            return cache.states(teacher, self.validation, wanted, rounded=False)

        self.validation_teacher = on_validation(self.teacher, self.loss.requests)
        self.evaluator = Evaluator(
            config.evaluation,
            self.validation,
            self.test,
            self.student_reader,
            self.teacher_reader,
            autocast=self.accelerator.autocast,
            kept=on_validation,
        )
        self.loop = Loop(
            config,
            directory,
            checkpoints,
            self.parallel,
            self.processes,
            distiller,
            cache.training(self.teacher, self.train, self.loss.requests, distiller.aligner, self.layers),
            self.train,
            self.num_steps,
            lambda step: self.evaluate(config, step),
        )

    def evaluate(self, config: Config, step: int) -> dict[str, Any]:
        """Columns of one evaluation: loss, agreement, probe, and exact match where it is declared."""
        with self.parallel.full_weights():
            row = self.evaluator.validate(self.distiller, self.validation_teacher).row() | self.evaluator.probe().row()
            at_intervals = config.evaluation.exact_match_at_intervals
            if at_intervals:
                answers = self.evaluator.exact_match("validation", at_intervals)
                row |= {"exact_match": share_correct(answers), "exact_match_examples": len(answers)}
        LOGGER.info("step %d: validation perplexity %.3f", step, row["validation_perplexity"])
        return row

    def part(self) -> None:
        """Close the trackers and end together: a launcher may end all processes when the first has gone.

        They stay a group for the next run of this job: made anew in the same processes, it may wait for the old one's.
        """
        self.processes.wait()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_lengths(config: Config, num_steps: int, num_validation: int) -> None:
    """Refuse what can be known to be wrong only when the data has been read."""
    limits = [("trainer.warmup_steps", config.trainer.warmup_steps)]
    if config.align is not None and config.align.fit_steps is not None:
        limits.append(("align.fit_steps", config.align.fit_steps))
    for key, value in limits:
        if value >= num_steps:
            raise invalid_value(key, value, f"a number below {num_steps}, the steps of this run")
    if num_validation < 2:
        raise invalid_value(
            "data", config.data.name, "a source with at least 2 validation texts: the probe needs two halves"
        )


def starting_point(config: Config, built: Assembly) -> dict[str, Any]:
    """Return what `provenance.json` says of a run: seeds, hashes, sizes, and this attempt."""
    projection = built.distiller.trainable_projection
    splits = {"train": built.train, "validation": built.validation, "test": built.test}
    return {
        "content_hash": content_hash(config),
        "seed": config.seed,
        "seeds": {purpose: derive_seed(config.seed, purpose) for purpose in ("student start", "data order", "dropout")},
        "data_order_sha256": data_order(config, len(built.train.examples)).digest(built.num_steps, built.train.ids),
        "initial_weights_sha256": built.initial_digests["student"],
        "initial_aligner_sha256": built.initial_digests["aligner"],
        "texts_sha256": {name: texts_digest(split.examples) for name, split in splits.items()},
        "teacher_sha256": weights_digest(built.teacher_reader.model),
        "inputs": config.inputs,
        "continues": continued_run(config),
        "layer_map": built.layers,
        "key_variance": built.distiller.key_variance.tolist(),
        "value_variance": built.distiller.value_variance.tolist(),
        "parameters": {
            "teacher": built.teacher_reader.model.num_parameters(),  # also of one whose weights are packed
            "student": count_parameters(built.student_reader.model),
            "student_trainable": built.student_reader.model.num_parameters(only_trainable=True),
            # Or what the loss learns itself: whatever learns beside the student.
            "aligner": 0 if projection is None else count_parameters(projection),
        },
        "examples": {name: _split_facts(split) for name, split in splits.items()},
        "device": str(built.accelerator.device),
        "processes": built.processes.number,
        "attempts": [
            attempt_provenance() | {"torch_threads": torch.get_num_threads(), "extras": extras_versions(config)}
        ],
    }


def texts_digest(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) over the texts of a split, with their ids, segments and answers: what was read, from wherever it came."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(
            repr((example.id, example.question, example.steps, example.answer, example.turns)).encode() + b"\n"
        )
    return digest.hexdigest()


def _split_facts(split: PreparedSplit) -> dict[str, int]:
    return {"used": len(split.examples), "cut": split.cut, "left_out": split.dropped}
