"""The three verbs: what they print, write and return, and what they refuse in one sentence."""

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from analysis.__main__ import main
from tests.analysis.synthetic import CRITERIA, SMALL, make_plan, write_sweep


@pytest.mark.usefixtures("undrawn")
def test_the_command_line_reports_and_requires(small, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["report", str(small.path)]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if not line.startswith("Report: ")) <= 80
    assert "v4_0_2" in shown
    assert str(small.report / "report.html") in shown
    assert main(["report", str(small.path), "--require", "ideal"]) == 0
    assert main(["report", str(small.path), "--require", "paper"]) == 3
    assert "--require=paper" in capsys.readouterr().err
    assert main(["collect", str(small.path)]) == 0
    assert "15 runs, 0 of them read now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["report", "nowhere"], "nowhere is no folder"),
        (["report", "SWEEP", "--baseline", "x"], "--baseline=x is not allowed: the arms are baseline, v4_0_1"),
        (["report", "SWEEP", "--criteria", "gone.yaml"], "--criteria=gone.yaml cannot be read"),
        (
            ["report", "SWEEP", "--criteria", "SWEEP/twice.yaml"],
            "is not YAML: alpha stands twice; leave one of them out",
        ),
        (["compare", "SWEEP:v4_0_2", "SWEEP:none", "--output", "SWEEP/plan.json"], "name a file that ends in .md"),
        (["compare", "SWEEP:v4_0_2", "SWEEP:none", "--output", "SWEEP"], "name a file that ends in .md"),
        (["collect", "x" * 300], "cannot be used: File name too long; see to that and run this again"),
        (["compare", "SWEEP:v4", "SWEEP:none"], "the arms of that sweep are baseline"),
        (["compare", "nowhere", "SWEEP:none"], "A=nowhere is not allowed"),
        (["compare", "SWEEP", "SWEEP:none"], "is no run's folder"),
        (["compare", "SWEEP:none:kv2", "SWEEP:baseline:kv2"], "the losses of that arm are kv"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(small, capsys, arguments, sentence):
    (small.path / "twice.yaml").write_text("alpha: 0.05\nalpha: 0.5\n")
    given = [each.replace("SWEEP", str(small.path)) for each in arguments]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m analysis: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_criteria_without_bottom_are_one_sentence(small, capsys, tmp_path):
    file = tmp_path / "deep.yaml"
    file.write_text("a: " + "[" * 5000 + "]" * 5000, encoding="utf-8")
    assert main(["report", str(small.path), "--criteria", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"--criteria={file} is not YAML: it is nested too deeply; correct it." in said
    assert said.count("\n") == 1


def test_a_report_that_is_a_file_is_one_sentence(small, capsys):
    small.report.write_text("not a folder")
    assert main(["report", str(small.path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m analysis: ")
    assert "is a file where a folder is needed" in said
    assert said.count("\n") == 1


def test_a_folder_of_other_things_is_not_searched_to_its_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("analysis.read.scan.MOST_FOLDERS", 20)
    for number in range(40):
        (tmp_path / "wrong" / str(number)).mkdir(parents=True)
    assert main(["report", str(tmp_path / "wrong")]) == 2
    said = capsys.readouterr().err
    assert "holds no run in the first 20 folders below it" in said
    assert said.count("\n") == 1


def test_what_is_searched_for_long_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("analysis.read.scan.QUIET_S", -1.0)
    (tmp_path / "wrong" / "inside").mkdir(parents=True)
    assert main(["report", str(tmp_path / "wrong")]) == 2
    assert f"searching {tmp_path / 'wrong'} and the folders below it for runs ..." in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["report", "collect"])
def test_a_wrong_folder_is_refused_before_anything_heavy_is_imported(tmp_path, verb):
    code = (
        f"import sys; from analysis.__main__ import main; main([{verb!r}, {str(tmp_path)!r}])\n"
        "print([name for name in ('numpy', 'pandas', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "is no sweep" in done.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"alpha": 2}, "alpha=2 is not allowed"),
        ({"alfa": 0.05}, "alfa is an unknown key"),
        ({"minimum": {"tolerated": 1}}, "minimum.tolerated"),
        ({"primary": None}, "primary"),
        ({"training_window": [1]}, "training_window"),
    ],
)
def test_bad_criteria_are_one_sentence(small, capsys, tmp_path, change, sentence):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(CRITERIA | change), encoding="utf-8")
    before = sorted(small.path.rglob("*"))
    assert main(["report", str(small.path), "--criteria", str(file)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert sorted(small.path.rglob("*")) == before


def test_asking_for_help_imports_nothing_heavy():
    code = (
        "import sys; from analysis.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('numpy', 'pandas', 'scipy', 'statsmodels', 'matplotlib', 'torch') if name in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_report_imports_no_torch():
    modules = "analysis.report.report, analysis.compare.report, analysis.report.terminal"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_comparing_two_runs_says_what_one_seed_cannot_show(small, tmp_path, capsys):
    runs = {(run.arm, run.seed): str(small.runs / run.id) for run in make_plan(SMALL).runs}
    output = tmp_path / "V4_AB_TEST_RESULTS.md"
    assert main(["compare", runs["v4_0_2", 0], runs["baseline", 0], "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert "One seed cannot show that A and B differ" in text
    assert "There is no p value" in text
    assert "p =" not in text
    assert "| step | A | B | A against B |" in text
    assert "| probe R² of keys | 0.7500 | 0.7000 | A |" in text
    assert output.with_suffix(".png").exists()
    assert "paired over 1 seed" in text


def test_runs_of_different_seeds_are_compared_but_not_paired(small, tmp_path):
    runs = {(run.arm, run.seed): str(small.runs / run.id) for run in make_plan(SMALL).runs}
    output = tmp_path / "out.md"
    assert main(["compare", runs["v4_0_2", 0], runs["baseline", 1], "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert "the two are not paired" in text
    assert "No pair: A and B share no seed" in text


def test_runs_that_other_code_has_made_are_named_in_a_comparison(small, tmp_path):
    runs = {(run.arm, run.seed): small.runs / run.id for run in make_plan(SMALL).runs}
    file = runs["v4_0_2", 0] / "provenance.json"
    file.write_text(file.read_text().replace("c0ffee", "bad0c0"))
    output = tmp_path / "out.md"
    assert main(["compare", str(runs["v4_0_2", 0]), str(runs["baseline", 0]), "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert f"Different git commits, which are part of the difference: A {'bad0c0' * 6}, B {'c0ffee' * 6}." in text
    assert "Different devices" not in text


def test_comparing_two_arms_pairs_their_seeds(tmp_path):
    sweep = write_sweep(tmp_path / "s", replace(SMALL, seeds=8))
    output = tmp_path / "out.md"
    assert main(["compare", f"{sweep.path}:v4_0_2", f"{sweep.path}:baseline:kv", "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert "paired over 8 seeds" in text
    assert "p = 0.0078, exact sign-flip" in text
    assert "This is the declared primary comparison." in text
    assert '| aligner.name | "structured" | "flat" |' in text
