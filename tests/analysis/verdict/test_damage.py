"""What is read is checked against what else is there: no damage to a run's files makes a verdict, or gives an arm a
win.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.read.scan import find_runs
from analysis.report.report import write_report
from analysis.verdict.study import Study, study_sweep
from kv_align.runs.run_dir import RunDirectory, write_json
from kv_align.runs.sweep_dir import PlannedRun, SweepDirectory
from tests.analysis.synthetic import SMALL, Recipe, config_of, make_plan, write_run, write_sweep

pytestmark = pytest.mark.usefixtures("undrawn")
SIX = Recipe(seeds=6, steps=50, examples=4, losses=("kv",), controls=("none",))


def planned(arm: str, seed: int) -> PlannedRun:
    return next(run for run in make_plan(SMALL).runs if (run.arm, run.seed) == (arm, seed))


def edit(file: Path, **changes: object) -> None:
    write_json(file, json.loads(file.read_text()) | changes)


def edit_last_row(file: Path, **changes: object) -> None:
    *rows, last = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows) + json.dumps(json.loads(last) | changes) + "\n")


def drop_first_row(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


def named(study: Study, run: RunDirectory) -> list[str]:
    problems = study.collected.problems
    return problems.loc[problems["run"] == f"runs/{run.path.name}", "detail"].tolist()


def lower_both(run: RunDirectory) -> None:
    """Loss and perplexity lowered in the summary and in the rows, so that they agree with each other."""
    lowered = {"validation_loss": 1.5, "validation_perplexity": float(np.exp(1.5))}
    edit(run.summary_file, **lowered)
    edit_last_row(run.evaluations_file, **lowered)


def raise_exact_match(run: RunDirectory) -> None:
    edit(run.summary_file, exact_match=1.0)
    edit_last_row(run.evaluations_file, exact_match=1.0)


DAMAGES: dict[str, tuple[Callable[[RunDirectory], object], str]] = {
    "a lowered loss": (
        lambda run: edit(run.summary_file, validation_loss=1.5),
        "validation_loss is 1.5 in summary.json",
    ),
    "a lowered perplexity": (
        lambda run: edit(run.summary_file, validation_perplexity=4.0),
        "validation_perplexity is 4 in summary.json",
    ),
    "a raised probe": (lambda run: edit(run.summary_file, probe_r2_key=0.99), "probe_r2_key is 0.99 in summary.json"),
    "a raised probe in the rows": (
        lambda run: edit_last_row(run.evaluations_file, probe_r2_value=0.99),
        "probe_r2_value is 0.",
    ),
    "a loss lowered in summary and rows": (lower_both, "validation_loss is 1.5 in evaluations.jsonl and "),
    "exact match raised in summary and rows": (raise_exact_match, "exact_match is 1 in evaluations.jsonl and "),
    "no loss": (lambda run: edit(run.summary_file, validation_loss=None), "validation_loss is missing in summary.json"),
    "no loss in the rows": (
        lambda run: edit_last_row(run.evaluations_file, validation_loss=None),
        "validation_loss is 2.",
    ),
    "finished early": (lambda run: edit(run.status_file, step=2, total_steps=4), "it says finished at step 2 of 4"),
    "evaluations gone": (lambda run: run.evaluations_file.unlink(), "evaluations.jsonl holds no evaluation"),
    "evaluations empty": (lambda run: run.evaluations_file.write_text(""), "evaluations.jsonl holds no evaluation"),
    "last evaluation lost": (
        lambda run: run.evaluations_file.write_text(run.evaluations_file.read_text().splitlines(keepends=True)[0]),
        "its last evaluation is of step 0, its end at step 50",
    ),
    "another arm": (lambda run: edit(run.status_file, arm="v4_0_3"), "its status is of arm v4_0_3, its summary of arm"),
    "another seed": (lambda run: edit(run.status_file, seed=7), "its status is of seed 7, the plan of seed 1"),
    "called diverged": (
        lambda run: edit(run.status_file, state="diverged"),
        "its status says diverged, and beside it lies the summary of a finished run",
    ),
}


@pytest.mark.parametrize("arm", ["v4_0_2", "baseline"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_named_is_a_missing_pair_and_ends_the_claim(small, name, arm):
    run = small.run(planned(arm, 1))
    damage, sentence = DAMAGES[name]
    damage(run)
    study = study_sweep(small.path)
    if name == "no loss in the rows":
        sentence = "validation_loss is "
    assert any(detail.startswith(sentence) for detail in named(study, run)), named(study, run)
    cells = study.grid.cells.set_index(["arm", "seed"])
    assert cells.loc[(arm, 1), "state"] == "damaged"
    primary = study.verdict.primary
    assert primary.pairs.seeds == (0, 2)
    assert not primary.pairs.diverged.any()
    assert not primary.pairs.reference_diverged.any()
    assert not study.verdict.complete
    assert primary.p_value is None
    assert [level.reached for level in study.verdict.levels] == [None, None, None]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: run.metrics_file.unlink(), "metrics.jsonl is missing"),
        (lambda run: run.metrics_file.write_text(""), "metrics.jsonl holds no step"),
        (
            lambda run: drop_first_row(run.metrics_file),
            "the logged steps begin at 10, not at 1: its training curve is left out",
        ),
        (
            lambda run: run.metrics_file.write_text(
                "".join(
                    line for line in run.metrics_file.read_text().splitlines(keepends=True) if '"step": 30,' not in line
                )
            ),
            "between two logged steps lie up to 20, else 10: some are lost: its training curve is left out",
        ),
        (lambda run: run.outcomes_file.unlink(), "outcomes.parquet is missing"),
    ],
    ids=["metrics gone", "metrics empty", "first row lost", "a row in the middle lost", "outcomes gone"],
)
def test_lost_rows_of_one_control_are_named_and_change_nothing_of_the_others(small, damage, sentence):
    before = study_sweep(small.path)
    run = small.run(planned("none", 1))
    damage(run)
    after = study_sweep(small.path)
    assert sentence in named(after, run)
    assert after.grid.window == before.grid.window == (1.0, 50.0)
    columns = ["arm", "seed", "validation_loss", "training_area", "probe_r2"]
    ours, theirs = (each.grid.cells.query("arm != 'none'")[columns] for each in (after, before))
    pd.testing.assert_frame_equal(ours, theirs)
    assert after.verdict.sequence[2].comparison.summary == before.verdict.sequence[2].comparison.summary


def test_a_lost_loss_of_a_baseline_run_gives_the_arm_no_win(tmp_path):
    """Six seeds without any effect: with one baseline loss deleted nothing may be won."""
    sweep = write_sweep(tmp_path / "s", replace(SIX, effects={}))
    run = sweep.run(
        next(run for run in make_plan(replace(SIX, effects={})).runs if (run.arm, run.seed) == ("baseline", 0))
    )
    edit(run.summary_file, validation_loss=None)
    found = study_sweep(sweep.path)
    assert found.verdict.primary.wins.endswith("/5")
    assert found.verdict.primary.p_value is None


def test_a_lowered_loss_in_six_runs_makes_no_paper_level(tmp_path):
    recipe = replace(SIX, effects={})
    sweep = write_sweep(tmp_path / "s", recipe)
    for run in make_plan(recipe).runs:
        if run.arm == "v4_0_2":
            edit(sweep.run(run).summary_file, validation_loss=2.0, validation_perplexity=float(np.exp(2.0)))
    found = study_sweep(sweep.path)
    assert not found.verdict.complete
    assert found.verdict.primary.pairs.seeds == ()
    assert len(found.collected.problems.query("kind == 'contradicts itself'")) == 12


def test_a_folder_that_cannot_be_listed_is_unreadable_and_not_missing(small, monkeypatch):
    run = small.run(planned("v4_0_2", 1))
    scandir = os.scandir

    def refused(path):
        if Path(path) == run.path:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refused)
    assert [each.signature for each in find_runs(small.path) if each.run == f"runs/{run.path.name}"] == [
        "cannot be listed"
    ]
    found = study_sweep(small.path)
    assert "planned, and no folder holds it" not in named(found, run)


def test_an_emptied_status_leaves_a_planned_folder_unreadable(small):
    run = small.run(planned("v4_0_2", 1))
    run.status_file.write_text("{")
    found = study_sweep(small.path)
    cells = found.grid.cells.set_index(["arm", "seed"])
    assert cells.loc[("v4_0_2", 1), ["state", "reason"]].tolist() == [
        "unreadable",
        "its folder or its status cannot be read",
    ]
    assert "planned, and no folder holds it" not in named(found, run)


def multirun(folder: Path) -> Path:
    runs = [(arm, seed) for seed in range(3) for arm in ("baseline", "v4_0_2", "none")]
    for number, (arm, seed) in enumerate(runs):
        loss = "ce" if arm == "none" else "kv"
        run = PlannedRun(str(number), arm, loss, loss, False, seed, f"{number:064d}", config_of(arm, loss, seed))
        write_run(RunDirectory(folder / str(number)), run, SMALL)
    return folder


@pytest.mark.parametrize("gone", [0, 1, 2], ids=["baseline", "arm", "control"])
def test_one_missing_configuration_of_a_multirun_leaves_the_names_of_all_arms(tmp_path, gone):
    folder = multirun(tmp_path / "m")
    (folder / str(gone) / "config.yaml").unlink()
    found = study_sweep(folder)
    assert found.grid.arms == [("baseline", "kv", False), ("v4_0_2", "kv", False), ("none", "", True)]
    assert found.verdict.primary.pairs.seeds == (0, 1, 2)


def test_an_arm_or_a_seed_edited_in_the_status_of_a_multirun_is_named(tmp_path):
    folder = multirun(tmp_path / "m")
    edit(folder / "1" / "status.json", seed=2)
    found = study_sweep(folder)
    problems = found.collected.problems.query("run == '1'")["detail"].tolist()
    assert "its status is of seed 2, its configuration of seed 0" in problems
    assert "its status is of seed 2, its summary of seed 0" in problems


# As declared before the runs


def reasons(sweep: SweepDirectory) -> str:
    return " ".join(study_sweep(sweep.path).verdict.exploratory)


def test_a_plan_that_is_younger_than_its_runs_is_named(small):
    assert reasons(small) == ""
    small.write_plan(replace(make_plan(SMALL), created=1.7e9 + 3600))
    assert "15 runs had started before the plan was made" in reasons(small)


def test_runs_that_recorded_other_criteria_than_the_plan_are_named(small):
    edit(small.run(planned("v4_0_2", 1)).provenance_file, criteria_sha256="0" * 64)
    assert "1 run recorded other criteria than those of the plan." in reasons(small)


def test_inputs_that_are_not_those_of_the_plan_are_named(small):
    plan = make_plan(SMALL)
    runs = tuple(replace(run, config=run.config | {"inputs": {"data": "a" * 64}}) for run in plan.runs)
    small.write_plan(replace(plan, runs=runs))
    edit(small.run(planned("v4_0_2", 1)).provenance_file, inputs={"data": "b" * 64})
    assert "1 run read other inputs (data, models or tokenizers) than were planned." in reasons(small)


def test_a_plan_rewritten_between_two_reports_is_named(small):
    write_report(small.path)
    plan = make_plan(SMALL)
    criteria = plan.criteria | {"ideal": plan.criteria["ideal"] | {"improvement_percent": 0.5}}
    small.write_plan(replace(plan, criteria=criteria))
    assert "The plan is not the one that earlier reports of this sweep were made with" in reasons(small)


def test_a_removed_plan_is_named(small):
    write_report(small.path)
    small.plan_file.unlink()
    said = reasons(small)
    assert "There is no plan.json beside runs/" in said
    assert "The plan that earlier reports of this sweep were made with is gone." in said


def three_reports(sweep: SweepDirectory) -> list[str]:
    for seed in (0, 1, 2):
        run = sweep.run(planned("baseline", seed))
        if seed:
            shutil.rmtree(run.path)
            write_run(run, planned("baseline", seed), replace(SMALL, effects={"baseline": 0.001 * seed}))
        write_report(sweep.path)
    return sweep.history_file.read_text(encoding="utf-8").splitlines(keepends=True)


def test_a_history_that_was_left_alone_is_not_complained_about(small):
    three_reports(small)
    assert reasons(small) == "The primary test was made on 3 different sets of runs, and 1 was declared."


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lines: [*lines[:-3], *lines[-2:]], "line 1 does not follow from the one before it"),
        (lambda lines: [*lines[:-2], lines[-1]], "line 2 does not follow from the one before it"),
        (lambda lines: lines[:-1], "HISTORY.md held 3 lines when the last report was made, and its last one is gone."),
        (lambda lines: [], "HISTORY.md held 3 lines when the last report was made, and its last one is gone."),
        (
            lambda lines: [*lines[:-3], lines[-3].replace('"tested": true', '"tested": false'), *lines[-2:]],
            "line 2 does not follow from the one before it",
        ),
    ],
    ids=["first gone", "middle gone", "last gone", "all gone", "edited"],
)
def test_a_history_that_was_changed_is_named(small, change, sentence):
    lines = three_reports(small)
    small.history_file.write_text("".join(change(lines)), encoding="utf-8")
    assert sentence in reasons(small)


def test_a_history_of_the_first_version_is_continued_without_complaint(small):
    old = '- 2026-01-01 00:00 UTC, look 1; runs `x`: No verdict. <!-- look {"results": "x", "tested": false} -->\n'
    small.history_file.write_text(f"# What the reports on this sweep concluded\n\n{old}", encoding="utf-8")
    write_report(small.path)
    assert reasons(small) == ""


def test_a_reason_with_bytes_that_no_page_can_show_is_reported(small):
    run = small.run(planned("v4_0_2", 1))
    edit(run.status_file, state="failed", reason="Broken\x00 pipe\x1b[31m\nline")
    report = write_report(small.path)
    text = report.markdown.read_text(encoding="utf-8")
    assert "Broken pipe" in text.replace("  ", " ")
    assert "\x00" not in text + report.page.read_text(encoding="utf-8")
