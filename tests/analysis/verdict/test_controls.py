"""Arms against the controls: what is warned about, what is noted, and that the tables say it too."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.design.cells import Grid
from analysis.design.criteria import parse_criteria
from analysis.design.pairing import PairedGrid
from analysis.report.report import write_report
from analysis.verdict.controls import Control, control_notes, control_warnings, controls_to_beat, not_better_than
from analysis.verdict.declared_comparisons import arm_comparisons, primary_comparison
from tests.analysis.synthetic import CONTROLS, CRITERIA, SMALL, Recipe, config_of, simulated_cells, write_sweep

READ = parse_criteria(CRITERIA, "test")
EXACT = Recipe(noise=0.0001, losses=("kv",))


def grid_with(**effects: float) -> Grid:
    cells = simulated_cells(replace(EXACT, effects=effects), np.random.default_rng(0))
    named = dict.fromkeys(zip(cells["arm"], cells["group"], strict=True))
    configs = {(arm, group): config_of(arm, CONTROLS.get(arm, "kv"), 0) for arm, group in named}
    return Grid(cells, "baseline", {}, {}, configs, True)


def found(sweep: Grid) -> tuple[list[Control], list[str]]:
    paired = PairedGrid(sweep.cells)
    primary = primary_comparison(paired, sweep, READ)
    controls = controls_to_beat(paired, sweep, READ)
    return controls, control_warnings(controls, [primary, *arm_comparisons(paired, sweep, READ)])


def test_the_controls_are_found_by_what_they_are_and_the_declared_one_comes_first():
    controls, _ = found(grid_with())
    assert [(each.name, each.kind) for each in controls] == [
        ("none", "declared"),
        ("frozen_random", "frozen"),
        ("shuffled_teacher", "shuffled"),
    ]
    assert list(controls[1].against) == [(arm, "kv") for arm in ("baseline", "v4_0_1", "v4_0_2", "v4_0_3")]
    assert ("logit_kd", "kv") in controls[0].against


def test_an_arm_that_beats_them_all_is_not_warned_about():
    effects = dict.fromkeys(("v4_0_1", "v4_0_2", "v4_0_3"), -0.05)
    controls, warnings = found(grid_with(**effects))
    assert warnings == []
    assert {each.standing("v4_0_2", "kv") for each in controls} == {"better"}
    assert not_better_than(controls, "v4_0_2", "kv") == []


def test_beating_the_baseline_but_not_the_declared_control_is_no_success():
    controls, warnings = found(grid_with(v4_0_1=0.01, v4_0_2=-0.05, v4_0_3=-0.2, none=-0.1))
    (said,) = (each for each in warnings if "none" in each)
    # v4_0_1 is worse than the baseline: it claims nothing that a control could take away.
    assert said.startswith(
        "Below baseline, but not better than none: v4_0_2 with loss kv (−4.9\u00a0% against baseline, +5.1\u00a0% "
    )
    assert "v4_0_1" not in said
    assert "v4_0_3" not in said
    assert said.endswith("so this is no success of the method.")
    assert not_better_than(controls, "v4_0_2", "kv") == ["none"]


@pytest.mark.parametrize(
    ("control", "because", "too"),
    [
        ("frozen_random", "that a learned alignment helps is not shown", "; they differ in init too"),
        ("shuffled_teacher", "another example", ""),
    ],
)
def test_not_beating_a_teacher_that_cannot_teach_is_said_whatever_the_baseline_does(control, because, too):
    bad = {"frozen_random": 0.5, "shuffled_teacher": 0.5}
    effects = {"v4_0_1": -0.1, "v4_0_2": 0.02, "v4_0_3": -0.01, **bad, control: -0.05}
    controls, (said,) = found(grid_with(**effects))
    assert said.startswith(f"Not better than {control}: v4_0_2 with loss kv (+7.3\u00a0%{too})")
    assert "v4_0_3 with loss kv (+4.1\u00a0%; they differ in aligner.share_dim_proj" in said
    assert "v4_0_1" not in said
    assert because in said
    assert not_better_than(controls, "v4_0_3", "kv") == [control]


def test_an_advantage_that_the_interval_does_not_show_is_noted_for_the_primary_arm():
    cells = simulated_cells(
        replace(EXACT, noise=0.05, effects={"v4_0_2": -0.06, "frozen_random": -0.05}), np.random.default_rng(1)
    )
    sweep = replace(grid_with(), cells=cells)
    paired = PairedGrid(cells)
    primary = primary_comparison(paired, sweep, READ)
    notes = control_notes(controls_to_beat(paired, sweep, READ), primary)
    assert any(
        each.startswith("Against frozen_random, v4_0_2 is neither shown to be better nor shown not to be (")
        for each in notes
    )


def test_the_report_says_it_at_the_top_and_in_its_tables(tmp_path, undrawn):
    recipe = replace(SMALL, controls=("none", "frozen_random"), effects={"v4_0_2": -0.05, "frozen_random": -0.2})
    report = write_report(write_sweep(tmp_path / "s", recipe).path)
    text = report.markdown.read_text(encoding="utf-8")
    assert text.index("Not better than frozen_random: ") < text.index("## Expected against found")
    (row,) = (line for line in text.splitlines() if line.startswith("| **v4_0_2**"))
    assert "not better than frozen_random" in row
    table = text[text.index("### Against the controls") :]
    assert table.split("\n")[2] == "| arm | loss | against none | against frozen_random |"
    assert table.split("\n")[6].startswith("| v4_0_2 | kv | −")
    assert "frozen_random" in (report.page.parent / "results.csv").read_text(encoding="utf-8")
