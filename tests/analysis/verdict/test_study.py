"""Sweeps that are not as one would have them: nothing ended, one or two seeds, split arms, no flat arm, only controls."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.report.report import write_report
from analysis.report.sections.wording import headline
from analysis.verdict.study import study_sweep
from kv_align.runs.digests import digest_of_json as digest
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import PlannedRun, SweepDirectory
from tests.analysis.synthetic import SMALL, Recipe, config_of, make_plan, write_run, write_sweep

pytestmark = pytest.mark.usefixtures("undrawn")
TWO = replace(SMALL, seeds=2)


def multirun(folder: Path, arms: tuple[str, ...], seeds: int = 2) -> Path:
    for number, (seed, arm) in enumerate((seed, arm) for seed in range(seeds) for arm in arms):
        loss = {"none": "ce", "logit_kd": "logit_kd"}.get(arm, "kv")
        planned = PlannedRun(str(number), arm, loss, loss, False, seed, f"{number:064d}", config_of(arm, loss, seed))
        write_run(RunDirectory(folder / str(number)), planned, SMALL)
    return folder


def test_a_sweep_of_which_nothing_has_run_is_reported(tmp_path):
    report = write_report(write_sweep(tmp_path / "s", TWO, keep=lambda run: False).path)
    text = report.markdown.read_text(encoding="utf-8")
    assert "> **No verdict yet**\n>\n> 0 of 10 runs ended" in text
    # One line for each arm, with all of its seeds.
    assert text.count("| 0, 1 | missing | no folder holds it |") == 5
    table = pd.read_csv(report.page.parent / "runs.csv")
    assert (len(table), set(table["state"])) == (10, {"missing"})
    assert len(pd.read_csv(report.page.parent / "problems.csv")) == 10
    assert report.study.looks.tests == 0


def test_a_sweep_of_which_everything_diverged_is_judged_and_reaches_nothing(tmp_path):
    sweep = write_sweep(tmp_path / "s", TWO, keep=lambda run: False)
    for planned in make_plan(TWO).runs:
        write_run(sweep.run(planned), planned, TWO, state="diverged", until=20)
    found = study_sweep(sweep.path)
    assert found.verdict.complete
    assert [level.reached for level in found.verdict.levels] == [False, False, False]
    # Both runs of each pair diverged: a tie, which no sign can turn.
    assert found.verdict.primary.p_value == 1.0


def test_two_seeds_are_estimated_and_cannot_reach_significance(tmp_path):
    report = write_report(write_sweep(tmp_path / "s", TWO).path)
    text = report.markdown.read_text(encoding="utf-8")
    assert "2 seeds cannot reach p \\< 0.05" in text
    assert "not significant" not in text
    assert not report.study.verdict.reached("paper")


def test_one_seed_gives_differences_and_neither_interval_nor_p(tmp_path):
    found = study_sweep(write_sweep(tmp_path / "s", replace(SMALL, seeds=1)).path)
    assert {each.p_value for each in (*found.arms, *found.contrasts)} == {None}
    assert {each.summary.interval for each in found.arms} == {None}
    assert "one pair has no spread" in headline(found.verdict, found.criteria)


def test_arms_that_an_extra_axis_has_split_are_compared_under_their_own_names(tmp_path):
    plan, runs = make_plan(TWO), []
    for seed in range(2):
        for arm in ("baseline", "v4_0_2"):
            for rate in (0.001, 0.01):
                name = f"{arm}-aligner_lr={rate}"
                config = config_of(arm, "kv", seed) | {"arm": name, "trainer": {"aligner_lr": rate}}
                content_hash = digest(config)
                runs.append(PlannedRun(f"{name}-kv-{seed}", name, "kv", "kv", False, seed, content_hash, config))
    first = runs[0].arm
    arms = {run.arm: {"expected_percent": None, "control": False, "description": ""} for run in runs}
    sweep = SweepDirectory(tmp_path / "s")
    sweep.write_plan(replace(plan, runs=tuple(runs), arms=arms, baseline=first))
    for run in runs:
        write_run(sweep.run(run), run, TWO)
    report = write_report(sweep.path)
    text = report.markdown.read_text(encoding="utf-8")
    assert "> **No verdict**\n>\n> This sweep does not hold v4_0_2 and its baseline with loss kv" in text
    assert f"The baseline is {first}; the criteria declare baseline." in text
    assert [each.arm[0] for each in report.study.arms] == [run.arm for run in runs[1:4]]
    assert {len(each.pairs.seeds) for each in report.study.arms} == {2}
    assert report.study.looks.tests == 0


def test_a_multirun_without_a_flat_arm_asks_for_a_baseline(tmp_path, capsys):
    folder = multirun(tmp_path / "m", ("v4_0_1", "v4_0_2"))
    assert main(["report", str(folder)]) == 2
    assert "holds no flat arm to compare with: its arms are v4_0_1, v4_0_2; choose one" in capsys.readouterr().err
    found = study_sweep(folder, baseline="v4_0_1")
    assert [each.arm[0] for each in found.arms] == ["v4_0_2"]


def test_a_multirun_of_controls_only_is_refused_in_one_sentence(tmp_path, capsys):
    folder = multirun(tmp_path / "m", ("none", "logit_kd"))
    assert main(["report", str(folder), "--baseline", "none"]) == 2
    said = capsys.readouterr().err
    assert "holds controls only (none, logit_kd)" in said
    assert said.count("\n") == 1
    output = tmp_path / "out.md"
    assert main(["compare", f"{folder}:none", f"{folder}:logit_kd", "--output", str(output)]) == 0


def test_runs_of_one_name_and_seed_whose_configuration_is_gone_do_not_hide_each_other(tmp_path):
    folder = multirun(tmp_path / "m", ("baseline", "v4_0_2", "v4_0_2"), seeds=1)
    for run in folder.iterdir():
        (run / "config.yaml").unlink()
    found = study_sweep(folder)
    assert [arm for arm, _, _ in found.grid.arms] == ["baseline", "v4_0_2", f"v4_0_2 {2:064d}"[:15]]


def test_another_baseline_has_no_expectations(tmp_path):
    sweep = write_sweep(tmp_path / "s", TWO)
    assert {each.expected_percent for each in study_sweep(sweep.path).arms} == {2.0, 5.0, 6.0, None}
    found = study_sweep(sweep.path, baseline="v4_0_1")
    assert {each.expected_percent for each in found.arms} == {None}
    assert found.verdict.exploratory == ("The baseline of this report is v4_0_1; the plan's is baseline.",)


def test_an_extended_sweep_is_exploratory(tmp_path):
    plan = replace(make_plan(TWO), extensions=({"created": 1.7e9, "seeds": [1]},))
    sweep = SweepDirectory(tmp_path / "s")
    sweep.write_plan(plan)
    for run in plan.runs:
        write_run(sweep.run(run), run, TWO)
    (reason,) = study_sweep(sweep.path).verdict.exploratory
    assert reason.startswith("The sweep was extended 1 time after it was frozen")


@pytest.mark.parametrize("left", ["metrics.jsonl", "status.json"])
def test_hours_of_a_run_that_did_not_finish_count(tmp_path, left):
    recipe = Recipe(seeds=1, steps=50, examples=2, losses=("kv",), controls=())
    sweep = write_sweep(tmp_path / "s", recipe)
    planned = next(run for run in make_plan(recipe).runs if run.arm == "v4_0_2")
    directory = sweep.run(planned)
    shutil.rmtree(directory.path)
    write_run(directory, planned, recipe, state="failed", until=20)
    (directory.path / left).unlink()
    (cost,) = (each for each in study_sweep(sweep.path).cost if each.arm == "v4_0_2")
    # Twenty steps of half a second were logged, or nothing was.
    assert cost.hours == (None if left == "metrics.jsonl" else pytest.approx(10 / 3600))


def test_a_run_whose_logged_steps_were_lost_does_not_shorten_the_curves_of_the_others(tmp_path):
    sweep = write_sweep(tmp_path / "s", SMALL)
    whole = study_sweep(sweep.path)
    planned = next(run for run in make_plan(SMALL).runs if (run.arm, run.seed) == ("v4_0_2", 1))
    file = sweep.run(planned).metrics_file
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    found = study_sweep(sweep.path)
    assert found.grid.window == whole.grid.window == (1.0, 50.0)
    assert found.verdict.sequence[2].comparison.pairs.seeds == (0, 2)
    assert found.verdict.primary.pairs.seeds == (0, 1, 2)
    (problem,) = found.collected.problems["detail"]
    assert problem == "the logged steps end at 20, the run at 50: its training curve is left out"
