"""Runs that were made by different code, packages, teachers or devices are named, pair by pair."""

import json
from dataclasses import replace

import pandas as pd

from analysis.design.criteria import parse_criteria
from analysis.design.pairing import PairedGrid
from analysis.report.report import write_report
from analysis.verdict.comparison import estimate
from analysis.verdict.provenance import origin_sentences, origins, pairs_made_differently
from kv_align.runs.run_dir import write_json
from tests.analysis.synthetic import CRITERIA, SMALL, make_plan, write_sweep

READ = parse_criteria(CRITERIA, "test")


def test_one_origin_is_named_and_several_are_called_mixed():
    runs = pd.DataFrame(
        {"git_commits": ["a", "b", ""], "packages": ["x"] * 3, "teacher_sha256": ["t"] * 3, "device": ["cpu"] * 3},
        index=["1", "2", "3"],
    )
    found = origins(runs, ["1", "2", "3", "gone"])
    assert found["git_commits"] == ["a", "b", "unknown"]
    said, mixed = origin_sentences(found)
    assert mixed
    assert said[:2] == ("Mixed: 3 git commits (a; b; unknown).", "One set of package versions: x.")
    assert origin_sentences(origins(runs, ["2"]))[1] is False


def test_pairs_whose_runs_were_made_differently_are_warned_about_at_the_top(tmp_path, undrawn):
    sweep = write_sweep(tmp_path / "s", SMALL)
    for planned in make_plan(SMALL).runs:
        if planned.arm == "v4_0_2" and planned.seed < 2:
            file = sweep.run(planned).provenance_file
            content = json.loads(file.read_text())
            content["attempts"][0] |= {"git_commit": "beef" * 10}
            write_json(file, content | ({"device": "cuda"} if planned.seed == 0 else {}))
    report = write_report(sweep.path)
    text = report.markdown.read_text(encoding="utf-8")
    said = "Of the 3 pairs of the primary comparison the two runs have different git commits in 2 and devices in 1"
    assert text.index(said) < text.index("## Expected against found")
    assert "- Mixed: 2 git commits (c0ffee" in text
    assert "- Mixed: 2 devices (cpu; cuda)." in text


def test_copies_of_the_code_without_a_commit_are_told_apart_by_their_files(tmp_path):
    from analysis.read.collect import collect

    sweep = write_sweep(tmp_path / "s", replace(SMALL, seeds=2))
    for planned in make_plan(replace(SMALL, seeds=2)).runs:
        file = sweep.run(planned).provenance_file
        content = json.loads(file.read_text())
        digest = ("1a2b3c4d" if planned.seed else "5e6f7a8b") * 8
        content["attempts"][0] |= {"git_commit": "", "git_diff": "", "code_sha256": digest}
        write_json(file, content)
    runs = collect(sweep.path).runs
    said, mixed = origin_sentences(origins(runs, runs.index))
    assert mixed
    assert said[0] == "Mixed: 2 git commits (no commit, files 5e6f7a8b; no commit, files 1a2b3c4d)."


def test_pairs_that_were_made_alike_are_not(tmp_path):
    sweep = write_sweep(tmp_path / "s", replace(SMALL, seeds=2))
    from analysis.design.cells import grid_of
    from analysis.read.collect import collect

    collected = collect(sweep.path)
    found = grid_of(collected, READ)
    comparison = estimate(
        PairedGrid(found.cells), "primary", "v4_0_2", ("v4_0_2", "kv"), ("baseline", "kv"), "kv", READ
    )
    assert pairs_made_differently(collected.runs, comparison, found.run_of) == ""
