"""One run, top to bottom: configure, build, fit, evaluate, write."""

from __future__ import annotations

import logging
import math
import statistics
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from safetensors.torch import save_file

from kv_align.align.aligner import count_parameters
from kv_align.build import calibrate, layer_map, make_aligner, make_objective, make_source
from kv_align.compose import arm_name
from kv_align.config import Config, content_hash
from kv_align.data.prepared import PreparedSplit, prepare_split
from kv_align.distill import Distiller, Teacher
from kv_align.errors import ConfigError
from kv_align.evaluate import Evaluator, Validation
from kv_align.loop import Loop, data_order, total_steps
from kv_align.models import Reader, load_student, load_teacher, weights_digest
from kv_align.provenance import attempt_provenance
from kv_align.quiet import quiet_libraries
from kv_align.runs import RunDirectory, State, append_row, read_json, read_rows, write_json
from kv_align.seeds import derive_seed
from kv_align.summary import print_summary

LOGGER = logging.getLogger(__name__)


def run(config: Config, path: Path) -> State:
    """Do a run in a directory, or go on with it, and return its end state.

    A finished run of the same configuration is left as it is and its summary is shown.

    Raises
    ------
    ConfigError
        For bad input; nothing of an earlier run is touched then.
    """
    quiet_libraries()
    directory, identity = RunDirectory(path), content_hash(config)
    with ExitStack() as stack:
        stack.enter_context(directory.lock())
        before = directory.status()
        if before is not None and before.content_hash == identity and directory.is_complete():
            LOGGER.info("%s already holds this run, finished: nothing to do", path)
            print_summary(directory)
            return "finished"
        status = directory.begin(
            config.model_dump(by_alias=True), arm=arm_name(config), content_hash=identity, total_steps=0
        )
        try:
            built = build(config, directory)
            status = directory.update(_with_steps(status, built.num_steps))
            state, reason = built.loop.fit(status)
            status = directory.status() or status
            if state == "running":
                finish(config, directory, built)
                state = "finished"
            directory.update(status, state=state, step=built.loop.progress.step, reason=reason)
        except ConfigError as error:
            directory.update(directory.status() or status, state="failed", reason=str(error))
            raise
        except Exception as error:
            LOGGER.error("%s", traceback.format_exc())
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else type(error).__name__
            directory.update(directory.status() or status, state="failed", reason=f"{kind}: {error}")
            return "failed"
    if state == "finished":
        print_summary(directory)
    else:
        LOGGER.warning("the run is %s: %s", state, reason)
    return state


class Built:
    """The objects of a run, in the order in which they depend on each other.

    Parameters
    ----------
    config, directory
        What to do, and where.
    """

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        tracker = None if config.trainer.tracker == "none" else config.trainer.tracker
        # Its state is global; runs of one process (a multirun) may differ in it.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(
            mixed_precision=config.trainer.mixed_precision,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=str(directory.path)),
        )
        if tracker is not None:
            self.accelerator.init_trackers("kv-align", init_kwargs={})
        device = self.accelerator.device
        torch.manual_seed(derive_seed(config.seed, "dropout"))

        self.teacher_reader = load_teacher(config.model, device)
        self.student_reader = load_student(config.model, config.seed, device)
        readers = (self.student_reader, self.teacher_reader)
        source, data = make_source(config), config.data
        self.train = prepare_split(source, "train", data, *readers, shuffle=data.shuffle_teacher)
        self.validation = prepare_split(source, "validation", data, *readers, shuffle=False)
        self.test = prepare_split(source, "test", data, *readers, shuffle=False)
        self.num_steps = total_steps(config, len(self.train.examples))

        self.objective = make_objective(config)
        rotated = config.keys is not None and config.keys.rotated
        geometries = (self.teacher_reader.geometry, self.student_reader.geometry)
        self.layers = layer_map(config, *geometries)
        self.teacher = Teacher(self.teacher_reader.model, self.layers, rotated=rotated)
        self.aligner = make_aligner(config, *geometries, queries=self.objective.signal == "keys_values_queries")
        key_variance, value_variance = calibrate(config, self.teacher, self.layers, self.train, device)
        self.distiller = Distiller(
            self.student_reader.model,
            self.aligner,
            self.objective,
            rotated=rotated,
            key_variance=key_variance,
            value_variance=value_variance,
        ).to(device)
        self.initial_digests = {
            "student": weights_digest(self.student_reader.model),
            "aligner": "" if self.aligner is None else weights_digest(self.aligner),
        }
        self.evaluator = Evaluator(
            config.evaluation, self.validation, self.test, *readers, autocast=self.accelerator.autocast
        )
        self.loop = Loop(
            config,
            directory,
            self.accelerator,
            self.distiller,
            self.teacher,
            self.train,
            self.num_steps,
            lambda step: self.evaluate(config, step),
        )

    def evaluate(self, config: Config, step: int) -> dict[str, Any]:
        """Columns of one evaluation: loss, agreement, probe, and exact match where it is declared."""
        row = self.evaluator.validate(self.distiller, self.teacher).row() | self.evaluator.probe().row()
        at_intervals = config.evaluation.exact_match_at_intervals
        if at_intervals:
            answers = self.evaluator.exact_match("validation", at_intervals)
            row |= {"exact_match": _share(answers), "exact_match_examples": len(answers)}
        LOGGER.info("step %d: validation perplexity %.3f", step, row["validation_perplexity"])
        return row


def build(config: Config, directory: RunDirectory) -> Built:
    """Build a run, check that it starts from what its earlier attempts started from, and go to its last checkpoint."""
    built = Built(config, directory)
    for split in (built.train, built.validation):
        if split.cut or split.dropped:
            LOGGER.info(
                "data.max_length=%d: %d of %d texts cut, %d left out",
                config.data.max_length,
                split.cut,
                len(split.examples) + split.dropped,
                split.dropped,
            )
    new = _provenance(config, built)
    old = read_json(directory.provenance_file)
    if old is not None:
        for what in ("data_order_sha256", "initial_weights_sha256", "teacher_sha256"):
            if old[what] != new[what]:
                raise ConfigError(
                    f"{directory.path} cannot go on: its {what} is no longer what it started from, so code, data or a "
                    "model has changed since; restore that, or choose another run_name."
                )
        new["attempts"] = [*old["attempts"], *new["attempts"]]
    write_json(directory.provenance_file, new)
    built.loop.resume()
    return built


def finish(config: Config, directory: RunDirectory, built: Built) -> None:
    """Evaluate the trained student and write what stays: outcomes, student, aligner, summary."""
    validation = built.evaluator.validate(built.distiller, built.teacher)
    answers = built.evaluator.exact_match(config.evaluation.exact_match_split, config.evaluation.exact_match_examples)
    row = validation.row() | built.evaluator.probe().row()
    row |= {"exact_match": _share(answers), "exact_match_examples": len(answers)}
    append_row(directory.evaluations_file, {"step": built.num_steps, **row})
    _write_outcomes(directory, config, validation, answers)
    built.student_reader.model.save_pretrained(directory.student)
    built.student_reader.tokenizer.save_pretrained(directory.student)
    if built.aligner is not None:
        directory.aligner.mkdir(exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in built.aligner.state_dict().items()}
        save_file(state, directory.aligner / "aligner.safetensors", {"layer_map": str(built.layers)})
    built.accelerator.end_training()
    write_json(directory.summary_file, _summary(config, directory, built, validation, row))


def _summary(
    config: Config, directory: RunDirectory, built: Built, validation: Validation, row: dict[str, Any]
) -> dict[str, Any]:
    metrics, evaluations = read_rows(directory.metrics_file), read_rows(directory.evaluations_file)
    reach = [each["kv_grad_norm"] for each in metrics if "kv_grad_norm" in each]
    by_head = {f"cosine_{kind}_by_head": each.cosine.tolist() for kind, each in validation.quality.items()}
    raw = {"key": built.distiller.key_variance, "value": built.distiller.value_variance}
    # A small KV loss means little where the target itself is small beside what the teacher has.
    shares = {
        f"target_variance_share_{kind}": (each.target_variance / raw[kind].cpu()).mean().item()
        for kind, each in validation.quality.items()
    }
    teacher_loss = built.evaluator.reference_loss(built.teacher_reader, as_teacher=True)
    untrained = evaluations[0]
    return {
        "arm": arm_name(config),
        "loss": config.loss.name,
        "seed": config.seed,
        "content_hash": content_hash(config),
        "steps": built.num_steps,
        "tokens": built.loop.progress.tokens,
        **row,
        **by_head,
        **shares,
        "kv_grad_norm_median": statistics.median(reach) if reach else None,
        "kv_grad_norm_last": reach[-1] if reach else None,
        "collapses": built.loop.progress.collapses,
        "collapsed_at_end": bool(metrics[-1].get("collapsed", False)),
        "train_task_loss_last": metrics[-1]["task_loss"],
        "teacher_validation_loss": teacher_loss,
        "teacher_validation_perplexity": math.exp(teacher_loss),
        "untrained_validation_loss": untrained["validation_loss"],
        "untrained_validation_perplexity": untrained["validation_perplexity"],
        "step_time_s_median": statistics.median(each["step_time_s"] for each in metrics),
        "elapsed_s": built.loop.progress.elapsed_s,
    }


def _provenance(config: Config, built: Built) -> dict[str, Any]:
    return {
        "content_hash": content_hash(config),
        "seed": config.seed,
        "seeds": {purpose: derive_seed(config.seed, purpose) for purpose in ("student start", "data order", "dropout")},
        "data_order_sha256": data_order(config, len(built.train.examples)).digest(built.num_steps, built.train.ids),
        "initial_weights_sha256": built.initial_digests["student"],
        "initial_aligner_sha256": built.initial_digests["aligner"],
        "teacher_sha256": weights_digest(built.teacher_reader.model),
        "layer_map": built.layers,
        "key_variance": built.distiller.key_variance.tolist(),
        "value_variance": built.distiller.value_variance.tolist(),
        "parameters": {
            "teacher": count_parameters(built.teacher_reader.model),
            "student": count_parameters(built.student_reader.model),
            "aligner": 0 if built.aligner is None else count_parameters(built.aligner),
        },
        "examples": {
            name: _split_facts(split)
            for name, split in (("train", built.train), ("validation", built.validation), ("test", built.test))
        },
        "device": str(built.accelerator.device),
        "attempts": [attempt_provenance() | {"torch_threads": torch.get_num_threads()}],
    }


def _split_facts(split: PreparedSplit) -> dict[str, int]:
    return {"used": len(split.examples), "cut": split.cut, "left_out": split.dropped}


def _write_outcomes(
    directory: RunDirectory, config: Config, validation: Validation, answers: list[dict[str, Any]]
) -> None:
    """One row per example and split; columns that were not measured on it are missing."""
    losses = pd.DataFrame(validation.outcomes).assign(split="validation")
    if answers:
        answered = pd.DataFrame(answers).assign(split=config.evaluation.exact_match_split)
        table = losses.merge(answered, on=["split", "id"], how="outer")
    else:
        table = losses.assign(answered=None, correct=None)
    table = table.astype({"correct": "boolean", "tokens": "Int64", "answered": "string"})
    table[["split", "id", "loss_nats", "tokens", "answered", "correct"]].to_parquet(
        directory.outcomes_file, index=False
    )


def _share(answers: list[dict[str, Any]]) -> float | None:
    return sum(row["correct"] for row in answers) / len(answers) if answers else None


def _with_steps(status: Any, num_steps: int) -> Any:
    from dataclasses import replace

    return replace(status, total_steps=num_steps)


__all__ = ["Built", "Reader", "build", "finish", "run"]
