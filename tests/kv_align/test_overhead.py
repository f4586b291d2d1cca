"""What of a run is no training step: that it is measured, and that evaluations and diagnostics do nothing twice."""

import json
import time

import pytest
import torch

from kv_align.experiment.assembly import assemble
from kv_align.experiment.experiment import run as do_run
from kv_align.runs import stopwatch
from kv_align.runs.run_dir import RunDirectory, read_rows
from kv_align.runs.stopwatch import Stopwatch, process_began
from kv_align.teacher import remembered
from tests.short_runs import short_config


def test_parts_add_up_to_all_that_was_no_step(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(stopwatch.time, "time", lambda: clock[0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock[0])
    watch = Stopwatch(began=93.0)
    clock[0] = 105.0
    with watch.timed("calibration"):
        clock[0] = 109.0
    clock[0] = 110.0
    watch.started()
    assert watch.parts() == {"calibration": 4.0, "start": 13.0}
    with watch.timed("evaluation"):
        clock[0] = 112.5
    watch.go_on({"start": 20.0, "probe": 1.0})
    assert watch.parts() == {"start": 33.0, "probe": 1.0, "calibration": 4.0, "evaluation": 2.5}


def test_only_the_first_run_of_a_process_begins_with_it(monkeypatch):
    monkeypatch.setattr(stopwatch, "_taken", False)
    first, second = process_began(), process_began()
    assert first < second
    assert second == pytest.approx(time.time(), abs=60)


def test_a_summary_and_the_status_say_what_was_no_step(tmp_path):
    assert do_run(short_config("trainer.log_interval=2", "trainer.grad_norm_interval=3"), tmp_path) == "finished"
    run = RunDirectory(tmp_path)
    summary = json.loads(run.summary_file.read_text())
    parts = summary["overhead_s_by_part"]
    assert set(parts) == {"calibration", "start", "evaluation", "probe", "checkpoints", "exact match", "artefacts"}
    assert all(part > 0 for part in parts.values())
    assert summary["overhead_s"] == pytest.approx(sum(parts.values()))
    status = run.status()
    assert (status.training_s, status.overhead_s) == (summary["elapsed_s"], pytest.approx(summary["overhead_s"], abs=5))
    rows = read_rows(run.metrics_file)
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert [row["step"] for row in rows if "kv_grad_norm" in row] == [1, 4, 6]
    assert all("cosine_key" in row for row in rows)


@pytest.mark.parametrize(("budget", "again"), [(2**28, 0), (0, 4)])
def test_evaluations_ask_the_teacher_once_within_the_budget(tmp_path, monkeypatch, budget, again):
    """Of 8 texts in batches of 4 the loss and the probe read the same states, so both of them need two forward passes."""
    monkeypatch.setattr(remembered, "BUDGET_BYTES", budget)
    built = assemble(short_config("evaluation.batch_size=4"), RunDirectory(tmp_path), tmp_path)
    monkeypatch.setattr(built.evaluator._raw_teacher.memory, "left", budget)
    assert all(
        each.source.head for each in (built.validation_teacher, built.evaluator._teacher_losses)
    )  # found by trying
    passes = []
    built.teacher_model.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))

    def evaluate():
        validation = built.evaluator.validate(built.distiller, built.validation_teacher)
        return validation.row() | built.evaluator.probe().row()

    first = evaluate()
    assert len(passes) == (2 if budget else 4)
    passes.clear()
    assert evaluate() == first
    assert len(passes) == again
    passes.clear()
    remembered_loss = built.evaluator.teacher_loss()
    assert passes == []
    built.evaluator._teacher_losses = built.evaluator._teacher_losses.source
    assert built.evaluator.teacher_loss() == pytest.approx(remembered_loss, rel=1e-6)
    assert len(passes) == 2


def test_a_whole_vocabulary_is_not_remembered(tmp_path):
    built = assemble(short_config("experiment=logit_kd"), RunDirectory(tmp_path), tmp_path)
    built.evaluator.validate(built.distiller, built.validation_teacher)
    assert built.validation_teacher._kept == {}
    assert torch.is_grad_enabled()
