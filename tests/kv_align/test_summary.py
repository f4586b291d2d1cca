"""The closing tables: numbers as the runs wrote them, and what so many seeds cannot show."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kv_align.experiment.closing_table import print_summary
from kv_align.runs.run_dir import RunDirectory, append_row, write_json
from kv_align.summary import main, print_comparison


def write_run(folder: Path, arm: str, loss: str, seed: int, validation_loss: float, **more: Any) -> RunDirectory:
    """A finished run as far as the tables read it."""
    directory = RunDirectory(folder / f"{arm}-{loss}-{seed}")
    aligner = "" if arm in ("none", "hidden") else "kv_align.align.flat.FlatMap"
    config = {"loss": {"name": loss}, "seed": seed, "aligner": {"_target_": aligner}}
    status = directory.begin(config, arm=arm, content_hash=f"{arm}{loss}{seed}", total_steps=3)
    summary = {
        "arm": arm,
        "loss": loss,
        "seed": seed,
        "steps": 3,
        "content_hash": f"{arm}{loss}{seed}",
        "settings_hash": f"{arm}{loss}",
        "validation_loss": validation_loss,
        "validation_perplexity": math.exp(validation_loss),
        "untrained_validation_perplexity": 500.0,
        "teacher_validation_perplexity": 1.25,
        "exact_match": 0.125,
        "probe_r2_key": 0.75,
        "probe_r2_value": 0.5,
        "step_time_s_median": 0.25,
        "collapses": [],
        **more,
    }
    write_json(directory.summary_file, summary)
    terms = [key.removeprefix("validation_") for key in more if key.startswith("validation_")]
    append_row(directory.metrics_file, {"step": 3, **{f"weight_{term}": 0.5 for term in terms}})
    directory.update(status, state="finished", step=3)
    return directory


def shown(folder: Path) -> str:
    text = io.StringIO()
    print_comparison(folder, "baseline", Console(file=text, width=80))
    return text.getvalue()


def row(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{label} ") and "%" in line]
    return line.split()


def test_arms_are_compared_within_their_loss_and_by_seed(tmp_path: Path) -> None:
    for seed, loss in ((0, 1.0), (1, 2.0)):
        write_run(tmp_path, "baseline", "kv", seed, loss)
        write_run(tmp_path, "v4_0_2", "kv", seed, loss + math.log(0.95))
        write_run(tmp_path, "baseline", "kv+struct", seed, loss + 9)
    text = shown(tmp_path)
    assert row(text, "v4_0_2 kv") == ["v4_0_2", "kv", "2", "4.801", "-5.0", "%", "2/2", "12.5%", "0.250"]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("arm", "loss"), [("none", "ce"), ("hidden", "hidden")])
def test_a_control_is_compared_with_flat_under_its_own_name(tmp_path: Path, arm: str, loss: str) -> None:
    write_run(tmp_path, "baseline", "kv", 0, 1.0)
    write_run(tmp_path, arm, loss, 0, 1.0 + math.log(1.1))
    assert row(shown(tmp_path), arm)[:5] == [arm, "1", "2.990", "+10.0", "%"]


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        (1, "1 seed cannot show a difference"),
        (3, "test of them can reach is 0.25"),
        (5, "test of them can reach is 0.0625"),
        (6, "6 seeds can reach p = 0.031"),
        (8, "8 seeds can reach p = 0.0078"),
    ],
)
def test_it_says_what_so_many_seeds_can_show(tmp_path: Path, seeds: int, sentence: str) -> None:
    for seed in range(seeds):
        write_run(tmp_path, "baseline", "kv", seed, 1.0)
        write_run(tmp_path, "v4_0_2", "kv", seed, 0.9)
    write_run(tmp_path, "an_extra_one", "kv", 0, 1.0)
    write_run(tmp_path, "v4_0_2", "kv", 99, 0.9)  # has no partner
    assert sentence in " ".join(shown(tmp_path).split())


def test_where_nothing_is_compared_it_says_why(tmp_path: Path) -> None:
    write_run(tmp_path, "flat", "kv", 0, 1.0)
    write_run(tmp_path, "heads", "kv", 0, 1.0)
    assert "Nothing is compared: no arm is called baseline; name one with --baseline: flat, heads." in " ".join(
        shown(tmp_path).split()
    )
    write_run(tmp_path, "baseline", "kv", 1, 1.0)
    assert "Nothing is compared: no other arm has a seed in common with baseline." in " ".join(shown(tmp_path).split())


def test_runs_that_did_not_finish_are_named_and_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path, "baseline", "kv", 0, 1.0)
    broken = write_run(tmp_path, "baseline", "kv", 1, 5.0)
    status = broken.status()
    assert status is not None
    broken.update(status, state="diverged", reason="the loss was not finite at step 2")
    text = shown(tmp_path)
    assert "diverged at step 3 the loss was not finite at step 2" in text
    assert row(text, "baseline kv")[2:4] == ["1", "2.718"]


def test_a_collapse_is_counted(tmp_path: Path) -> None:
    write_run(tmp_path, "baseline", "kv", 0, 1.0, collapses=["target key variance of layer 0"])
    write_run(tmp_path, "baseline", "kv", 1, 1.0)
    assert "1/2" in shown(tmp_path)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    assert shown(tmp_path).startswith("no finished run in")


def test_the_summary_of_a_run_shows_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(write_run(tmp_path, "v4_0_1", "kv", 4, 1.0, validation_kv_loss=0.0625))
    lines = capsys.readouterr().out
    assert "v4_0_1, kv, seed 4" in lines
    assert "2.718" in lines
    assert "0.0625" in lines
    assert "12.5%" in lines


def test_the_terms_of_any_loss_are_shown_whatever_they_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = {"validation_curl_loss": 0.03125, "validation_spin_loss": 4.0}
    print_summary(write_run(tmp_path, "mine", "curl+spin", 4, 1.0, **terms))
    lines = capsys.readouterr().out
    assert re.search(r"curl_loss \(validation\) +│ +0\.0312 ", lines)
    assert re.search(r"spin_loss \(validation\) +│ +4\.0000 ", lines)
    inside = shown(tmp_path).partition("what happened inside")[2]
    assert re.search(r"^ *mine curl\+spin +curl 0\.031 .*\n +spin 4\.000 *$", inside, re.MULTILINE), inside


def test_runs_that_differ_in_more_than_their_seed_are_not_pooled(tmp_path: Path) -> None:
    write_run(tmp_path, "baseline", "kv", 0, 1.0, settings_hash="1111")
    write_run(tmp_path, "baseline", "kv", 1, 3.0, settings_hash="2222")
    text = shown(tmp_path)
    assert row(text, "baseline@1111 kv")[2:4] == ["1", "2.718"]
    assert row(text, "baseline@2222 kv")[2:4] == ["1", "20.086"]


def test_a_run_that_was_done_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "baseline", "kv", 0, 1.0)
    write_run(tmp_path / "b", "baseline", "kv", 0, 1.0)
    assert row(shown(tmp_path), "baseline kv")[2] == "1"


def test_an_arm_whose_loss_has_no_baseline_is_compared_with_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, "baseline", "kv", 0, 1.0)
    write_run(tmp_path, "v4_0_2", "kv+struct", 0, 2.0)
    assert row(shown(tmp_path), "v4_0_2 kv+struct")[4] == "12.5%"


def test_runs_of_other_lengths_data_or_teachers_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "baseline", "kv", 0, 1.0)
    longer = write_run(tmp_path, "v4_0_2", "kv", 0, 0.5, steps=600)
    text = shown(tmp_path)
    assert row(text, "v4_0_2 kv") == ["v4_0_2", "kv", "1", "1.649", "12.5%", "0.250"]
    assert "not compared: v4_0_2 kv: other steps than baseline has with the same seed" in text
    summary = {**json.loads(longer.summary_file.read_text()), "steps": 3}
    write_json(longer.summary_file, summary)
    assert row(shown(tmp_path), "v4_0_2 kv")[4:6] == ["-39.3", "%"]
    write_json(longer.provenance_file, {"texts_sha256": {"train": "other"}, "teacher_sha256": "other"})
    text = shown(tmp_path)
    assert row(text, "v4_0_2 kv")[4] == "12.5%"
    assert "other data and teacher than baseline" in text
    assert "teacher " not in text.split("what happened inside")[0]  # there is more than one


def test_long_names_keep_the_table_in_eighty_columns(tmp_path: Path) -> None:
    write_run(tmp_path, "v4_0_2-lr=0.0001-weight_decay=0.01-clip_norm=1", "kv+struct", 0, 1.0, validation_kv_loss=0.1)
    assert max(map(len, shown(tmp_path).splitlines())) <= 80


def test_the_command_line_gives_tables_for_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_run(tmp_path, "baseline", "kv", 0, 1.0)
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path), "--json"])
    main()
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["arm"], run["validation_loss"], run["basis"]["steps"]) == ("baseline", 1.0, 3)
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path), "--csv"])
    main()
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (line["arm"], line["seed"], line["validation_loss"]) == ("baseline", "0", "1.0")
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert (
        capsys.readouterr().err
        == f"kv-align: {tmp_path}/none is no folder: name one that holds runs, such as outputs.\n"
    )


def test_any_arm_may_be_the_one_that_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for seed, (flat, heads) in enumerate([(1.0, 0.9), (1.2, 1.0)]):
        write_run(tmp_path, "flat", "kv", seed, flat)
        write_run(tmp_path, "heads", "kv", seed, heads)
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path), "--baseline", "flat"])
    main()
    printed = capsys.readouterr().out
    assert "against flat" in " ".join(printed.split())
    assert "2/2" in printed
