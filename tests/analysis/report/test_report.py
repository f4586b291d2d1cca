"""The report as a whole: a golden text, its rules, its escaping, its history, and the command line."""

import json
import math
import os
import re
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.report.render.latex import escaped
from analysis.report.report import Report, write_report
from analysis.verdict.factorial import levels_of
from analysis.verdict.study import study_sweep
from kv_align.runs.run_dir import RunDirectory, write_json
from kv_align.runs.sweep_dir import PlannedRun, SweepDirectory
from tests.analysis.synthetic import CRITERIA, HOSTILE, SMALL, Recipe, config_of, make_plan, write_run, write_sweep

GOLDEN = Path(__file__).parent / "golden_report.md"
"""Written by this test with KV_ALIGN_WRITE_GOLDEN=1 and read by eye; its numbers are those of the synthetic effects."""
pytestmark = pytest.mark.usefixtures("undrawn")  # the module's golden report is drawn before
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
FULL = Recipe(seeds=8, steps=100, examples=10)


@pytest.fixture(scope="module")
def golden_sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    """All arms; one run diverged, one collapsed, one is foreign, one was copied, one cannot be paired."""
    sweep = write_sweep(tmp_path_factory.mktemp("golden") / "sweep", FULL)
    by_cell = {(run.arm, run.group, run.seed): run for run in make_plan(FULL).runs}

    def again(arm: str, group: str, seed: int, **settings: object) -> RunDirectory:
        planned = by_cell[arm, group, seed]
        directory = sweep.run(planned)
        shutil.rmtree(directory.path)
        write_run(directory, planned, FULL, **settings)
        return directory

    again("v4_0_3", "kv", 1, state="diverged", until=40)
    again("v4_0_1", "kv", 2, collapsed=True)
    directory = sweep.run(by_cell["v4_0_1", "kv+struct", 3])
    provenance = json.loads(directory.provenance_file.read_text())
    write_json(directory.provenance_file, provenance | {"data_order_sha256": "0" * 64})
    shutil.copytree(sweep.run(by_cell["none", "", 0]).path, sweep.runs / "copy")
    write_run(RunDirectory(sweep.runs / "foreign"), replace(by_cell["none", "", 1], content_hash="f" * 64), FULL)
    return sweep


@pytest.fixture(scope="module")
def golden(golden_sweep: SweepDirectory) -> Report:
    return write_report(golden_sweep.path, now=NOW)


def test_the_report_of_a_fixed_sweep_is_the_golden_one(golden):
    text = golden.markdown.read_text(encoding="utf-8")
    if os.environ.get("KV_ALIGN_WRITE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), (
        "meant? then once with KV_ALIGN_WRITE_GOLDEN=1, and read the diff"
    )


def test_the_sections_come_in_the_order_of_the_specification(golden):
    headings = re.findall(r"^## (.*)$", golden.markdown.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [
        "Verdict",
        "Expected against found",
        "Training and alignment",
        "What makes the difference",
        "Coverage and audit",
        "Methods",
    ]
    page = golden.page.read_text(encoding="utf-8")
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == headings


def test_page_and_markdown_hold_the_same_numbers(golden):
    page = re.sub(r"<svg.*?</svg>", "", golden.page.read_text(encoding="utf-8"), flags=re.DOTALL)
    numbers = re.compile(r"\d+\.\d+")
    markdown = golden.markdown.read_text(encoding="utf-8")
    assert set(numbers.findall(markdown)) <= set(numbers.findall(page))


def test_the_page_asks_nothing_of_the_network(golden):
    page = golden.page.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)
    assert not re.findall(r"url\((?!#)", page)
    assert "<script" not in page
    assert page.count("<svg ") == len(list((golden.page.parent / "figures").glob("*.svg"))) == 6
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_tables_are_written_beside_the_report(golden):
    table = pd.read_csv(golden.page.parent / "results.csv")
    primary = table[table["role"] == "primary"].iloc[0]
    assert (primary["arm"], primary["loss"], primary["pairs"]) == ("v4_0_2", "kv", 8)
    assert primary["p"] == pytest.approx(2 / 256)
    assert primary["difference_nats"] == golden.study.verdict.primary.summary.mean
    pd.testing.assert_frame_equal(
        table, pd.read_parquet(golden.page.parent / "results.parquet"), check_dtype=False, check_exact=False
    )
    for name in ("differences", "seeds", "training", "validation", "alignment", "heads"):
        assert (golden.page.parent / "figures" / f"{name}.png").stat().st_size > 5000


def test_rendering_again_is_no_look_and_a_new_run_is_one(small):
    first = write_report(small.path, now=NOW)
    write_report(small.path, now=NOW)
    history = small.history_file.read_text(encoding="utf-8")
    lines = [line for line in history.splitlines() if line.startswith("- ")]
    assert [re.search(r", (look [^;]*);", line).group(1) for line in lines] == ["look 1", "look 1 again, the same runs"]
    assert "plan `" + first.study.plan_hash[:12] in lines[0]
    assert "2026-01-02 03:04 UTC" in lines[0]


def test_an_incomplete_sweep_shows_estimates_and_tests_nothing(tmp_path):
    sweep = write_sweep(tmp_path / "part", SMALL, keep=lambda run: (run.arm, run.seed) != ("v4_0_1", 2))
    report = write_report(sweep.path, now=NOW)
    text = report.markdown.read_text(encoding="utf-8")
    assert "> **No verdict yet**\n>\n> 14 of 15 runs ended" in text
    assert "no p value: not tested" in text
    # An interval is a test in all but name: the spread stands in its place, and no band around a difference.
    assert "interval −" not in text
    assert "spread between seeds" in text
    table = pd.read_csv(report.page.parent / "results.csv")
    assert table[["low_nats", "high_nats", "p"]].isna().all().all()
    assert (table["difference_nats"].notna() & table["sd_nats"].notna()).all()
    assert "| v4_0_1 | kv | 2 | missing | no folder holds it |" in text
    assert report.study.looks.tests == 0
    last = next(run for run in make_plan(SMALL).runs if (run.arm, run.seed) == ("v4_0_1", 2))
    write_run(sweep.run(last), last, SMALL)
    complete = study_sweep(sweep.path)
    assert (complete.looks.number, complete.looks.tests, complete.verdict.exploratory) == (2, 1, ())


def test_what_a_run_counts_as_follows_from_what_is_in_its_folder(small):
    runs = [small.run(planned) for planned in make_plan(SMALL).runs]
    summary = json.loads(runs[0].summary_file.read_text())
    write_json(runs[0].summary_file, summary | {"validation_loss": None})
    runs[1].summary_file.unlink()
    runs[2].status_file.write_text("{")
    status = json.loads(runs[3].status_file.read_text())
    write_json(runs[3].status_file, status | {"state": "interrupted", "reason": "asked to leave"})
    shutil.rmtree(runs[4].path)
    cells = study_sweep(small.path).grid.cells
    assert cells["state"].tolist()[:6] == ["damaged", "damaged", "unreadable", "interrupted", "missing", "finished"]
    assert cells["reason"].tolist()[:5] == [
        f"validation_loss is missing in summary.json and {summary['validation_loss']:.6g} in evaluations.jsonl",
        "it finished, but its summary cannot be read",
        "its folder or its status cannot be read",
        "asked to leave",
        "no folder holds it",
    ]
    assert cells["validation_loss"].isna().tolist()[:6] == [True, True, True, True, True, False]


def test_looks_at_complete_sweeps_are_counted_against_the_declared_ones(small):
    first = write_report(small.path, now=NOW)
    assert (first.study.looks.number, first.study.looks.tests, first.study.verdict.exploratory) == (1, 1, ())
    planned = make_plan(SMALL).runs[0]
    shutil.rmtree(small.run(planned).path)
    write_run(small.run(planned), planned, replace(SMALL, effects={planned.arm: 0.001}))
    second = write_report(small.path, now=NOW)
    assert (second.study.looks.number, second.study.looks.tests) == (2, 2)
    assert "2 different sets of runs, and 1 was declared" in second.markdown.read_text(encoding="utf-8")
    assert not second.study.verdict.reached("paper")


def test_three_seeds_say_what_they_cannot_reach(small):
    text = write_report(small.path, now=NOW).markdown.read_text(encoding="utf-8")
    assert "3 seeds cannot reach p \\< 0.05" in text
    assert "not significant" not in text
    assert "out of reach" in text


def test_other_criteria_make_the_report_exploratory(small, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(CRITERIA | {"alpha": 0.1}), encoding="utf-8")
    report = write_report(small.path, criteria_file=file, now=NOW)
    text = report.markdown.read_text(encoding="utf-8")
    assert text.index(" (exploratory)**") < text.index("This report is exploratory.")
    assert "not the ones that were frozen with the plan" in text
    same = tmp_path / "same.yaml"
    same.write_text(yaml.safe_dump(CRITERIA), encoding="utf-8")
    assert write_report(small.path, criteria_file=same, now=NOW).study.verdict.exploratory == ()


def test_an_arm_that_beats_flat_but_not_none_is_warned_about(tmp_path):
    recipe = replace(SMALL, effects={"v4_0_2": -0.05, "none": -0.2})
    report = write_report(write_sweep(tmp_path / "s", recipe).path, now=NOW)
    text = report.markdown.read_text(encoding="utf-8")
    assert re.search("Below baseline, but not better than none: .*v4_0_2 with loss kv", text)
    assert "no success of the method" in text


def test_the_primary_can_be_declared_at_another_step_than_the_last(small, tmp_path):
    file = tmp_path / "early.yaml"
    file.write_text(yaml.safe_dump(CRITERIA | {"primary": CRITERIA["primary"] | {"step": 0}}), encoding="utf-8")
    early = write_report(small.path, criteria_file=file, now=NOW).study.verdict.primary
    # Whatever the criteria ask for, the same runs are no other look.
    again = write_report(small.path, now=NOW).study
    assert (again.looks.number, again.looks.tests, again.verdict.exploratory) == (1, 1, ())
    # At step 0 every synthetic student is at 6 nats, so that no difference is left.
    assert early.pairs.values.tolist() == pytest.approx([6.0] * 3)
    assert early.summary.reason == "the differences do not vary, so there is no t statistic"
    file.write_text(yaml.safe_dump(CRITERIA | {"primary": CRITERIA["primary"] | {"step": 7}}), encoding="utf-8")
    never = write_report(small.path, criteria_file=file, now=NOW).study.verdict.primary
    assert never.summary is None
    assert {pair.reason for pair in never.pairs.unpaired} == {
        "v4_0_2 is finished, but has no validation_loss; baseline is finished, but has no validation_loss"
    }


def test_more_seeds_than_declared_make_the_report_exploratory(small, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(CRITERIA | {"seeds": 2}), encoding="utf-8")
    reasons = write_report(small.path, criteria_file=file, now=NOW).study.verdict.exploratory
    assert "The criteria declare 2 seeds; this sweep has 3." in reasons
    text = write_report(small.path, now=NOW).markdown.read_text(encoding="utf-8")
    assert "The criteria declare 8 seeds; this sweep was made with 3." in text


def test_hostile_arm_names_reach_every_output_escaped(tmp_path):
    recipe = replace(SMALL, seeds=2)
    plan = make_plan(recipe)
    runs = tuple(
        replace(run, arm=HOSTILE, id=f"hostile-{run.seed}") if run.arm == "v4_0_1" else run for run in plan.runs
    )
    arms = {HOSTILE if arm == "v4_0_1" else arm: each for arm, each in plan.arms.items()}
    sweep = SweepDirectory(tmp_path / "h")
    sweep.write_plan(replace(plan, name="$x$ <b>", runs=runs, arms=arms))
    for run in runs:
        write_run(sweep.run(run), run, recipe)
    report = write_report(sweep.path, now=NOW)
    page = report.page.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert "<script" not in report.markdown.read_text(encoding="utf-8").replace("\\<", "")


def test_a_plain_multirun_is_reported_and_calls_itself_exploratory(tmp_path):
    folder = tmp_path / "multirun"
    number = 0
    for seed in range(3):
        for arm in ("baseline", "v4_0_2", "none"):
            loss = "ce" if arm == "none" else "kv"
            config = config_of(arm, loss, seed)
            planned = PlannedRun(str(number), arm, loss, loss, False, seed, f"{number:064d}", config)
            write_run(RunDirectory(folder / str(number)), planned, SMALL)
            number += 1
    report = write_report(folder, now=NOW)
    text = report.markdown.read_text(encoding="utf-8")
    assert "there is no frozen plan" in text
    assert report.study.grid.baseline == "baseline"
    assert report.study.verdict.primary.pairs.seeds == (0, 1, 2)
    assert report.study.grid.groups == ["kv"]
    assert (folder / "HISTORY.md").exists()


def test_runs_of_one_arm_with_different_settings_are_told_apart(tmp_path):
    folder, number = tmp_path / "multirun", 0
    for seed in range(2):
        for rate in (1, 2):
            config = config_of("flat", "kv", seed) | {"trainer": {"lr": rate}, "aligner": {"name": "flat"}}
            config["align"] = {"fit": "joint"}
            planned = PlannedRun(str(number), "flat", "kv", "kv", False, seed, f"{number:064d}", config)
            write_run(RunDirectory(folder / str(number)), planned, SMALL)
            number += 1
    report = write_report(folder, now=NOW)
    assert [arm for arm, _, _ in report.study.grid.arms] == ["flat trainer.lr=1", "flat trainer.lr=2"]
    assert report.study.grid.baseline == "flat trainer.lr=1"


def test_effects_and_interactions_are_those_that_the_design_allows(golden):
    found = {effect.name: effect for effect in golden.study.effects}
    assert set(found) == {
        "aligner: baseline to v4_0_1",
        "init: random to uniform",
        "share_dim_proj: true to false",
        "loss: kv to kv+struct",
        "aligner × loss",
        "loss × init",
        "loss × share_dim_proj",
    }
    assert found["loss: kv to kv+struct"].num_matched == 4
    # Set by the synthetic sweep: kv+struct is 0.01 nats better everywhere, so there is no interaction.
    assert found["loss: kv to kv+struct"].summary.mean == pytest.approx(-0.01, abs=0.004)
    assert found["init: random to uniform"].summary.mean == pytest.approx(-0.03, abs=0.006)
    cells = golden.study.grid.cells
    loss = {
        (arm, group): cells[(cells["arm"] == arm) & (cells["group"] == group)].set_index("seed")["validation_loss"]
        for arm in ("v4_0_1", "v4_0_2")
        for group in ("kv", "kv+struct")
    }
    changes = [loss[arm, "kv+struct"] - loss[arm, "kv"] for arm in ("v4_0_1", "v4_0_2")]
    # Seed 3 of v4_0_1 with kv+struct started from other data and is paired with nothing.
    expected = (changes[1] - changes[0]).drop(3)
    assert found["loss × init"].differences.tolist() == pytest.approx(expected.tolist())
    assert found["loss × init"].floor == pytest.approx(3 * 2 / 128)


def test_levels_of_one_choice_are_named_by_the_options_in_which_they_differ():
    kv = {"loss.name": '"kv"', "loss.lambda_kv": "0.5", "loss.terms": '"both"', "seed": "0"}
    heavier, summed = kv | {"loss.lambda_kv": "6.0"}, kv | {"loss.name": '"kv+struct"'}
    assert levels_of(kv, heavier, "loss", ["loss.lambda_kv"]) == ("kv (lambda_kv=0.5)", "kv (lambda_kv=6.0)")
    assert levels_of(kv, summed, "loss", ["loss.name"]) == ("kv", "kv+struct")


def test_a_report_takes_seconds(small):
    began = time.perf_counter()
    write_report(small.path, now=NOW)
    assert time.perf_counter() - began < 60


# For a paper, and for a notebook


def test_the_latex_table_has_the_numbers_of_the_csv(golden):
    tex = (golden.page.parent / "results.tex").read_text(encoding="utf-8")
    table = pd.read_csv(golden.page.parent / "results.csv")
    # All against the baseline, and the one declared test of perplexity against another.
    declared = (table["arm"] == "v4_0_2") & (table["against"] == "none") & (table["loss"] == "kv")
    table = pd.concat([table[table["role"] != "contrast"], table[declared]])
    sequence_p = golden.study.verdict.sequence[1].comparison.p_value
    rows = [line.split(" & ") for line in tex.splitlines() if line.count(" & ") == 6][1:]
    assert len(rows) == len(table)
    conditional = {(each.arm[0], each.against[0], each.group) for each in golden.study.arms if each.conditional}
    assert len(conditional) == 1
    assert tex.count("$^{*}$") == 2
    assert "of the pairs of which both runs finished" in tex
    for cells, (_, row) in zip(rows, table.iterrows(), strict=True):
        assert [cell.strip().replace("\\_", "_") for cell in cells[:3]] == [row.arm, row.against, row.loss]
        mark = "$^{*}$" if (row.arm, row.against, row.loss) in conditional else ""
        assert cells[3].strip() == f"${row.difference_percent:+.1f}\\,\\%${mark}"
        low, high = (100 * math.expm1(row[f"{end}_nats"]) for end in ("low", "high"))
        assert cells[4].strip() == ("--" if math.isnan(low) else f"[${low:+.1f}\\,\\%$, ${high:+.1f}\\,\\%$]{mark}")
        assert float(cells[5].strip("$< ")) == pytest.approx(sequence_p if math.isnan(row.p) else row.p, rel=0.05)
        assert cells[6].removesuffix("\\\\").strip() == row.wins


def test_a_name_is_no_command_of_latex():
    assert escaped("a_b & 50 % of $x^2$ {~}\\input #1") == (
        "a\\_b \\& 50 \\% of \\$x\\textasciicircum{}2\\$ \\{\\textasciitilde{}\\}\\textbackslash{}input \\#1"
    )


def test_every_level_is_a_tidy_csv_too(golden):
    data = golden.study.collected.data
    for level in ("runs", "metrics", "evaluations", "outcomes"):
        table, parquet = (
            pd.read_csv(data / f"{level}.csv", low_memory=False),
            pd.read_parquet(data / f"{level}.parquet"),
        )
        assert list(table.columns) == list(parquet.columns)
        assert len(table) == len(parquet) > 0


def test_the_notebook_that_readme_shows_reads_a_sweep(golden, golden_sweep, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (code,) = (each for each in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "report/data" in each)
    (tmp_path / "SWEEP").symlink_to(golden_sweep.path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, pd.Series] = {}
    exec(code, names)
    metrics, runs = pd.read_csv("SWEEP/report/data/metrics.csv"), pd.read_csv("SWEEP/report/data/runs.csv")
    of_none = metrics[metrics["run"].isin(runs.loc[runs["arm"] == "none", "run"])]
    assert names["curves"]["none"].xs(1, level="step").iloc[0] == pytest.approx(
        of_none.loc[of_none["step"] == 1, "task_loss"].mean()
    )


def test_scores_of_the_harness_are_told_by_arm_and_paired_by_seed(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", SMALL)
    values = {("baseline", 0): 0.2, ("baseline", 1): 0.4, ("v4_0_2", 0): 0.3, ("v4_0_2", 1): 0.6, ("v4_0_2", 2): 0.9}
    for planned in make_plan(SMALL).runs:
        file = sweep.run(planned).summary_file
        if (planned.arm, planned.seed) in values:
            own = {"lm_eval_sums_acc": values[planned.arm, planned.seed]}
            write_json(file, json.loads(file.read_text()) | own)
    text = write_report(sweep.path, now=NOW).markdown.read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if "sums" in line and "|" in line
    ]
    by_arm = {row[1]: row[3:] for row in rows}
    assert by_arm["baseline"] == ["2", "0.3000", "0.14", "–", "–"]
    # Two pairs: +0.1 and +0.2, so 0.15 with t(1) = 12.706 times 0.05.
    assert by_arm["v4_0_2"] == ["3", "0.6000", "0.30", "+0.15", "−0.49 to +0.79"]
    assert by_arm["none"] == ["0", "–", "–", "–", "–"]
    assert "Secondary and not tested" in text
