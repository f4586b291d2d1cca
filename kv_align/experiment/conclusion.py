"""The end of a run: the last evaluation, and what stays of it."""

from __future__ import annotations

import math
import statistics
from typing import Any

from safetensors.torch import save_file

from kv_align.config.compose import arm_name
from kv_align.config.config import Config
from kv_align.config.identity import content_hash, settings_hash
from kv_align.evaluation.evaluate import Validation, share_correct
from kv_align.evaluation.harness import task_scores
from kv_align.experiment.assembly import Assembly
from kv_align.experiment.student_card import student_card
from kv_align.runs.preemption import Preemption
from kv_align.runs.run_dir import RunDirectory, append_row, give_usual_mode, read_rows, write_json
from kv_align.training.distributed.processes import is_first


def conclude(config: Config, directory: RunDirectory, built: Assembly, preemption: Preemption) -> None:
    """Evaluate the trained student and write what stays: outcomes, student, aligner, summary.

    Raises
    ------
    Preempted
        If the run is asked to leave; all of this is then done again.
    """
    evaluation, timed = config.evaluation, built.stopwatch.timed
    with timed("evaluation"):
        validation = built.evaluator.validate(built.distiller, built.validation_teacher)
    preemption.leave_if_asked()
    with timed("exact match"):
        answers = built.evaluator.exact_match(evaluation.exact_match_split, evaluation.exact_match_examples)
    preemption.leave_if_asked()
    with timed("probe"):
        row = validation.row() | built.evaluator.probe().row()
    row |= {"exact_match": share_correct(answers), "exact_match_examples": len(answers)}
    append_row(directory.evaluations_file, {"step": built.num_steps, **row})
    with timed("artefacts"):
        _write_artefacts(config, directory, built, validation, answers)
    with timed("evaluation"):
        summary = _summary(config, directory, built, validation, row)
    (directory.student / "README.md").write_text(student_card(config, directory, summary), encoding="utf-8")
    scores: dict[str, float] = {}
    if evaluation.lm_eval:
        with built.processes.first_alone(), timed("harness"):
            if is_first():  # the saved student, whatever it was shared out over
                device = built.student_model.model.device
                scores = task_scores(evaluation.lm_eval, directory.student, device, evaluation.batch_size)
    parts = built.stopwatch.parts()
    summary |= scores | {"overhead_s": sum(parts.values()), "overhead_s_by_part": parts}
    write_json(directory.summary_file, {**summary, "artefacts": directory.artefact_sizes()})


def _write_artefacts(
    config: Config,
    directory: RunDirectory,
    built: Assembly,
    validation: Validation,
    answers: list[dict[str, Any]],
) -> None:
    """Write outcomes, student and aligner."""
    _write_outcomes(directory, config, validation, answers)
    if built.student_model.adapter is not None:
        built.student_model.adapter.save(directory.student_adapter)
        built.student_model.adapter.merge()  # the last use of the student in training's form
    built.student_model.model.save_pretrained(directory.student)
    built.student_model.tokenizer.save_pretrained(directory.student)
    if built.distiller.aligner is not None:
        directory.aligner.mkdir(exist_ok=True)
        state = {
            name: tensor.detach().cpu().contiguous() for name, tensor in built.distiller.aligner.state_dict().items()
        }
        save_file(state, directory.aligner / "aligner.safetensors", {"layer_map": str(built.layers)})
    for folder in (directory.student, directory.student_adapter, directory.aligner):
        give_usual_mode(*folder.glob("*.safetensors"))


def _summary(
    config: Config, directory: RunDirectory, built: Assembly, validation: Validation, row: dict[str, Any]
) -> dict[str, Any]:
    metrics, evaluations = read_rows(directory.metrics_file), read_rows(directory.evaluations_file)
    # Without the steps in which the alignment loss moves the aligner alone.
    reach = [each["kv_grad_norm"] for each in metrics if each.get("kv_grad_norm")]
    by_head = {f"cosine_{kind}_by_head": each.cosine.tolist() for kind, each in validation.quality.items()}
    raw = {"key": built.distiller.key_variance, "value": built.distiller.value_variance}
    # A small KV loss means little where the target itself is small beside what the teacher has.
    shares = {
        f"target_variance_share_{kind}": (each.target_variance / raw[kind].cpu()).mean().item()
        for kind, each in validation.quality.items()
    }
    teacher_loss = built.evaluator.teacher_loss()
    untrained = evaluations[0]
    return {
        "arm": arm_name(config),
        "loss": config.loss.name,
        "seed": config.seed,
        "content_hash": content_hash(config),
        "settings_hash": settings_hash(config),
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


def _write_outcomes(
    directory: RunDirectory, config: Config, validation: Validation, answers: list[dict[str, Any]]
) -> None:
    """One row per example and split; columns that were not measured on it are missing."""
    import pandas as pd  # takes a while, and no run needs it before its end

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
