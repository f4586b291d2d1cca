"""Folders into tables: nothing that is wrong with a folder may crash it, and nothing may disappear."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.read.collect import Collected, collect
from analysis.read.store import write_csv
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory
from kv_align.runs.sweep_dir import SweepDirectory
from tests.analysis.synthetic import Recipe, make_plan, write_run, write_sweep

TINY = Recipe(seeds=2, steps=60, losses=("kv",), controls=("none",), examples=6)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "tiny"
    write_sweep(path, TINY)
    return path


@pytest.fixture
def sweep(written: Path, tmp_path: Path) -> SweepDirectory:
    shutil.copytree(written, tmp_path / "tiny")
    return SweepDirectory(tmp_path / "tiny")


def first_run(sweep: SweepDirectory) -> RunDirectory:
    plan = sweep.plan()
    assert plan is not None
    return sweep.run(plan.runs[0])


def found(collected: Collected, directory: RunDirectory) -> pd.DataFrame:
    return collected.problems[collected.problems["run"] == f"runs/{directory.path.name}"]


def test_every_number_comes_back(sweep):
    collected = collect(sweep.path)
    directory = first_run(sweep)
    key = f"runs/{directory.path.name}"
    summary = json.loads(directory.summary_file.read_text())
    row = collected.runs.loc[key]
    assert (row["state"], row["arm"], row["seed"]) == ("finished", "baseline", 0)
    assert row["validation_loss"] == summary["validation_loss"]
    assert json.loads(row["cosine_key_by_head"]) == summary["cosine_key_by_head"]
    assert row["parameters_aligner"] == 90_000
    metrics = collected.table("metrics")
    own = metrics[metrics["run"] == key]
    expected = [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]
    assert own["step"].tolist() == [each["step"] for each in expected]
    assert own["task_loss"].tolist() == [each["task_loss"] for each in expected]
    assert own["target_variance_key"].iloc[-1].tolist() == expected[-1]["target_variance_key"]
    assert len(collected.table("evaluations")) == 2 * 5 * 3
    outcomes = collected.table("outcomes")
    assert outcomes[outcomes["run"] == key]["correct"].notna().sum() == TINY.examples
    assert collected.problems.empty


def test_runs_that_log_no_alignment_have_no_alignment(sweep):
    metrics = collect(sweep.path).table("metrics", ["run", "kv_loss", "not_a_column"])
    assert list(metrics.columns) == ["run", "kv_loss", "not_a_column"]
    assert metrics["not_a_column"].isna().all()
    none = metrics[metrics["run"].astype(str).str.contains("none")]
    assert len(none) > 0
    assert none["kv_loss"].isna().all()


def test_only_what_changed_is_read_again_and_the_tables_are_those_of_a_fresh_collect(sweep, tmp_path):
    assert collect(sweep.path).num_read == 10
    assert collect(sweep.path).num_read == 0
    plan = sweep.plan()
    changed, gone = sweep.run(plan.runs[3]), sweep.run(plan.runs[5])
    with changed.metrics_file.open("a") as stream:
        stream.write('{"step": 70, "task_loss": 1.5, "total_loss": 1.5, "new_metric": 2}\n')
    shutil.rmtree(gone.path)
    again = collect(sweep.path)
    assert again.num_read == 1
    shutil.copytree(sweep.path, tmp_path / "fresh", ignore=shutil.ignore_patterns("report"))
    shutil.copystat(sweep.path, tmp_path / "fresh")
    fresh = collect(tmp_path / "fresh")
    assert fresh.num_read == 9
    for level in ("metrics", "evaluations", "outcomes"):
        ours, theirs = (each.table(level).astype({"run": str}) for each in (again, fresh))
        pd.testing.assert_frame_equal(ours[sorted(ours)], theirs[sorted(theirs)])
    columns = sorted(set(again.runs) - {"signature"})
    pd.testing.assert_frame_equal(again.runs[columns], fresh.runs[columns], check_dtype=False)
    assert again.table("metrics")["new_metric"].sum() == 2
    assert again.problems.to_dict("records") == [
        {"run": f"runs/{gone.path.name}", "kind": "missing", "detail": "planned, and no folder holds it"}
    ]


def test_a_file_changed_without_changing_its_size_is_read_again(sweep):
    before = collect(sweep.path)
    directory = first_run(sweep)
    text = directory.summary_file.read_text().replace('"exact_match_examples": 6', '"exact_match_examples": 9')
    directory.summary_file.write_text(text)
    state = directory.summary_file.stat()
    os.utime(directory.summary_file, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
    key = f"runs/{directory.path.name}"
    assert before.runs.loc[key, "exact_match_examples"] == 6
    assert collect(sweep.path).runs.loc[key, "exact_match_examples"] == 9


@pytest.mark.parametrize("what", ["garbage", "other", "gone"])
def test_a_damaged_cache_is_made_anew(sweep, what):
    collected = collect(sweep.path)
    file = collected.data / "runs.parquet"
    if what == "garbage":
        file.write_bytes(b"PAR1 no")
    elif what == "other":
        pd.DataFrame({"run": ["x"], "signature": ["y"]}).to_parquet(file)
    else:
        (collected.data / "metrics.parquet").unlink()
    again = collect(sweep.path)
    assert again.num_read == 10
    assert len(again.table("metrics")) == len(collected.table("metrics"))


BREAKAGES = {
    "status gone": (lambda run: run.status_file.unlink(), "status.json is missing"),
    "status garbage": (lambda run: run.status_file.write_text("{"), "status.json cannot be read"),
    "status other keys": (lambda run: run.status_file.write_text("{}"), "status.json cannot be read"),
    "status of other types": (
        lambda run: run.status_file.write_text(
            json.dumps(json.loads(run.status_file.read_text()) | {"seed": "three", "content_hash": ["x"]})
        ),
        "status.json cannot be read",
    ),
    "metrics are a folder": (
        lambda run: (run.metrics_file.unlink(), run.metrics_file.mkdir()),
        "metrics.jsonl cannot be read",
    ),
    "summary gone": (lambda run: run.summary_file.unlink(), "summary.json is missing"),
    "summary truncated": (lambda run: run.summary_file.write_text('{"arm": "ba'), "summary.json cannot be read"),
    "summary of another run": (
        lambda run: run.summary_file.write_text('{"content_hash": "x", "validation_loss": 1.0}'),
        "summary.json is of another run than status.json: left out",
    ),
    "loss is null": (
        lambda run: run.summary_file.write_text(
            json.dumps(json.loads(run.summary_file.read_text()) | {"validation_loss": None})
        ),
        "the validation loss at the end is missing, or not a finite number",
    ),
    "loss is NaN": (
        lambda run: run.summary_file.write_text(
            json.dumps(json.loads(run.summary_file.read_text()) | {"validation_loss": float("nan")})
        ),
        "the validation loss at the end is missing, or not a finite number",
    ),
    "provenance gone": (lambda run: run.provenance_file.unlink(), "provenance.json is missing"),
    "provenance garbage": (lambda run: run.provenance_file.write_bytes(b"\x00\xff"), "provenance.json cannot be read"),
    "metrics gone": (lambda run: run.metrics_file.unlink(), "metrics.jsonl is missing"),
    "last line truncated": (
        lambda run: run.metrics_file.write_text(run.metrics_file.read_text()[:-20]),
        "the last line of metrics.jsonl cannot be read and is left out",
    ),
    "lines damaged": (
        lambda run: run.metrics_file.write_text("\x00\x00\n[1]\n" + run.metrics_file.read_text()),
        "2 line(s) of metrics.jsonl cannot be read and is left out",
    ),
    "steps twice": (
        lambda run: run.metrics_file.write_text(run.metrics_file.read_text() * 2),
        "steps were written twice: of each the last row counts",
    ),
    "a text for a number": (
        lambda run: run.metrics_file.open("a").write('{"step": 99, "task_loss": "low"}\n'),
        "metrics.jsonl holds no numbers under task_loss: left out",
    ),
    "outcomes garbage": (lambda run: run.outcomes_file.write_bytes(b"no"), "outcomes.parquet cannot be read"),
    "outcomes of another shape": (
        lambda run: pd.DataFrame({"id": [1]}).to_parquet(run.outcomes_file),
        "outcomes.parquet cannot be read",
    ),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_run_is_named_and_the_others_stay_whole(sweep, name):
    directory = first_run(sweep)
    breakage, sentence = BREAKAGES[name]
    breakage(directory)
    collected = collect(sweep.path)
    named = found(collected, directory)
    assert [detail for detail in named["detail"] if detail.startswith(sentence)], named["detail"].tolist()
    assert f"runs/{directory.path.name}" in collected.runs.index
    assert len(collected.runs) == 10
    assert set(collected.problems["run"]) == {f"runs/{directory.path.name}"}
    metrics = collected.table("metrics")
    for other in sweep.plan().runs[1:]:
        assert (metrics["run"] == f"runs/{other.id}").sum() == 7
    assert collect(sweep.path).problems.equals(collected.problems)


def test_numbers_that_are_none_are_counted(sweep):
    directory = first_run(sweep)
    with directory.metrics_file.open("a") as stream:
        stream.write(
            '{"step": 70, "task_loss": NaN}\n{"step": 80, "task_loss": null}\n{"step": 90, "task_loss": Infinity}\n'
        )
    collected = collect(sweep.path)
    assert found(collected, directory)["detail"].tolist() == [
        "3 logged step(s) have a loss that is not a finite number"
    ]
    metrics = collected.table("metrics", ["run", "step"])
    assert (metrics["run"] == f"runs/{directory.path.name}").sum() == 10


def test_rows_of_a_broken_file_are_kept_up_to_the_break(sweep):
    directory = first_run(sweep)
    whole = directory.metrics_file.read_text().splitlines(keepends=True)
    directory.metrics_file.write_text("".join(whole[:3]) + whole[3][:30])
    metrics = collect(sweep.path).table("metrics")
    own = metrics[metrics["run"] == f"runs/{directory.path.name}"]
    assert own["task_loss"].tolist() == [json.loads(line)["task_loss"] for line in whole[:3]]


def test_foreign_duplicated_and_missing_runs_are_named(sweep):
    plan = sweep.plan()
    directory = first_run(sweep)
    shutil.copytree(directory.path, sweep.runs / "copy")
    config = plan.runs[1].config | {"seed": 77}
    foreign = replace(plan.runs[1], content_hash="f" * 64, seed=77, config=config)
    write_run(RunDirectory(sweep.runs / "foreign"), foreign, TINY)
    shutil.rmtree(sweep.run(plan.runs[2]).path)
    (sweep.runs / "empty").mkdir()
    problems = collect(sweep.path).problems
    assert problems.to_dict("records") == [
        {"run": "runs/copy", "kind": "duplicate", "detail": f"the same run as runs/{plan.runs[0].id}, which is used"},
        {"run": "runs/foreign", "kind": "foreign", "detail": "this run is not in the plan and is not used"},
        {"run": f"runs/{plan.runs[2].id}", "kind": "missing", "detail": "planned, and no folder holds it"},
    ]


def test_a_summary_cannot_say_what_the_run_is(sweep):
    directory = first_run(sweep)
    summary = json.loads(directory.summary_file.read_text())
    directory.summary_file.write_text(json.dumps(summary | {"state": 1.0, "run": 2.0, "problems": [1]}))
    collected = collect(sweep.path)
    row = collected.runs.loc[f"runs/{directory.path.name}"]
    assert (row["state"], row["run"]) == ("finished", f"runs/{directory.path.name}")
    assert collected.problems.empty


def test_a_folder_whose_name_is_no_text_is_read(sweep):
    directory = first_run(sweep)
    directory.path.rename(os.fsdecode(os.fsencode(sweep.runs) + b"/\xff\xfe"))
    collected = collect(sweep.path)
    assert "runs/\\xff\\xfe" in collected.runs.index
    assert collect(sweep.path).num_read == 0


def test_a_run_folder_that_is_a_link_is_read(sweep, tmp_path):
    directory = first_run(sweep)
    shutil.move(directory.path, tmp_path / "elsewhere")
    directory.path.symlink_to(tmp_path / "elsewhere")
    (sweep.runs / "loop").symlink_to(sweep.runs)
    collected = collect(sweep.path)
    assert len(collected.runs) >= 10
    assert f"runs/{directory.path.name}" in collected.runs.index


def test_csv_holds_what_parquet_holds(sweep):
    collected = collect(sweep.path)
    files = write_csv(collected.data, collected.problems)
    assert {file.name for file in files} >= {
        "runs.csv",
        "metrics.csv",
        "evaluations.csv",
        "outcomes.csv",
        "problems.csv",
    }
    table, csv = collected.table("metrics"), pd.read_csv(collected.data / "metrics.csv")
    assert csv["task_loss"].tolist() == pytest.approx(table["task_loss"].tolist(), rel=1e-12)
    shown = csv.loc[csv["target_variance_key"].notna(), "target_variance_key"].iloc[0]
    assert [float(each) for each in shown.split()] == table["target_variance_key"].dropna().iloc[0].tolist()


def test_a_gap_in_a_list_leaves_the_rest_of_it(sweep):
    run = first_run(sweep)
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    rows[0]["target_variance_key"][0] = None
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collected = collect(sweep.path)
    write_csv(collected.data, collected.problems)
    csv = pd.read_csv(collected.data / "metrics.csv").query(f"run == 'runs/{run.path.name}'")
    first, *others = csv["target_variance_key"].iloc[0].split()
    assert first == "nan"
    assert [float(each) for each in others] == rows[0]["target_variance_key"][1:]


@pytest.mark.parametrize("what", ["nowhere", "empty", "file", "one run"])
def test_what_is_no_sweep_is_refused_in_one_sentence(tmp_path, what):
    path = tmp_path / "it"
    if what == "empty":
        (path / "sub").mkdir(parents=True)
    elif what == "file":
        path.write_text("x")
    elif what == "one run":
        write_run(RunDirectory(path), make_plan(TINY).runs[0], TINY)
    with pytest.raises(ConfigError, match=r"^[^\n]+: [^\n]+\.$") as refused:
        collect(path)
    assert str(path) in str(refused.value)
    assert not (path / "report").exists()


def test_a_plan_without_any_run_is_collected(tmp_path):
    write_sweep(tmp_path / "tiny", TINY, keep=lambda run: False)
    collected = collect(tmp_path / "tiny")
    assert len(collected.runs) == 0
    assert len(collected.problems) == 10
    assert collected.table("metrics").empty
    assert collect(tmp_path / "tiny").num_read == 0


def test_a_change_costs_what_it_is_and_gives_the_tables_of_a_fresh_collect(small, tmp_path):
    collect(small.path)
    whole = (small.report / "data" / "metrics.parquet").stat().st_mtime_ns
    plan = small.plan()
    for number, planned in enumerate((plan.runs[3], plan.runs[7], plan.runs[3])):
        file = small.run(planned).metrics_file
        file.write_text(
            file.read_text() + f'{{"step": {60 + number}, "task_loss": 1.5, "total_loss": 1.5, "extra": 2}}\n'
        )
        again = collect(small.path)
        assert again.num_read == 1
        if number == 0:  # one of fifteen: the table is left as it is
            assert (small.report / "data" / "metrics.parquet").stat().st_mtime_ns == whole
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        shutil.copytree(small.path, tmp_path / "fresh", ignore=shutil.ignore_patterns("report"))
        fresh = collect(tmp_path / "fresh")
        for level in ("metrics", "evaluations", "outcomes"):
            ours, theirs = (each.table(level).astype({"run": str}) for each in (again, fresh))
            pd.testing.assert_frame_equal(ours[sorted(ours)], theirs[sorted(theirs)])
        columns = sorted(set(again.runs) - {"signature"})
        pd.testing.assert_frame_equal(again.runs[columns], fresh.runs[columns], check_dtype=False)
        assert again.table("metrics", ["step", "extra"]).equals(fresh.table("metrics", ["step", "extra"]))
    assert collect(small.path).num_read == 0
