"""From cells to levels: what reaches which level, what is not judged, what is refused."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis.design.cells import Grid
from analysis.design.criteria import Criteria, parse_criteria
from analysis.design.pairing import PairedGrid
from analysis.stats.equivalence import Label
from analysis.verdict.comparison import seeds_needed
from analysis.verdict.declared_comparisons import arm_comparisons, contrast_comparisons, primary_comparison
from analysis.verdict.testing import decide_alone, decide_together, under_holm
from analysis.verdict.verdict import Verdict, decide, paired_grid
from tests.analysis.synthetic import CRITERIA, EFFECTS, EXPECTED, Recipe, simulated_cells

READ = parse_criteria(CRITERIA, "test")
GOOD = Recipe(effects=dict(EFFECTS), noise=0.01)


def cells_of(recipe: Recipe = GOOD, seed: int = 0) -> pd.DataFrame:
    return simulated_cells(recipe, np.random.default_rng(seed))


def grid_with(cells: pd.DataFrame) -> Grid:
    expected = {arm: percent for arm, percent in EXPECTED.items() if percent is not None}
    return Grid(cells, "baseline", expected, {}, {}, True)


def judged(cells: pd.DataFrame, criteria: Criteria = READ, exploratory: tuple[str, ...] = ()) -> Verdict:
    return decide(grid_with(cells), criteria, exploratory)


def change(cells: pd.DataFrame, arm: str, seeds: object = slice(None), group: str = "kv", **values: object) -> None:
    rows = cells.index[(cells["arm"] == arm) & (cells["group"] == group)][seeds]
    for name, value in values.items():
        cells.loc[rows, name] = value


def failed(verdict: Verdict, level: str) -> list[str]:
    (found,) = (each for each in verdict.levels if each.name == level)
    return [check.name for check in found.checks if not check.passed]


def test_a_clear_improvement_reaches_all_levels_with_the_exact_p():
    verdict = judged(cells_of())
    assert [level.reached for level in verdict.levels] == [True, True, True]
    primary = verdict.primary
    assert primary.p_value == pytest.approx(2 / 256)
    assert primary.summary.mean == pytest.approx(-0.05, abs=0.015)
    assert primary.judgement.superior_by_margin
    assert (verdict.ended, verdict.expected, verdict.complete) == (96, 96, True)


def test_the_primary_difference_is_that_of_the_paired_values():
    cells = cells_of()
    ours = cells[(cells["arm"] == "v4_0_2") & (cells["group"] == "kv")].set_index("seed")["validation_loss"]
    theirs = cells[(cells["arm"] == "baseline") & (cells["group"] == "kv")].set_index("seed")["validation_loss"]
    shuffled = cells.sample(frac=1, random_state=1).reset_index(drop=True)
    assert judged(shuffled).primary.summary.mean == pytest.approx((ours - theirs).mean())


def test_without_improvement_the_minimum_alone_is_reached():
    verdict = judged(cells_of(Recipe(effects={}, noise=0.004)))
    assert [level.reached for level in verdict.levels] == [True, False, False]
    assert "estimate" in failed(verdict, "ideal")
    assert verdict.primary.judgement.equivalent


def test_harm_beyond_what_is_tolerated_reaches_nothing():
    verdict = judged(cells_of(Recipe(effects={"v4_0_2": 0.03}, noise=0.004)))
    assert [level.reached for level in verdict.levels] == [False, False, False]
    assert verdict.primary.judgement.label is Label.WORSE


def test_harm_that_the_seeds_cannot_exclude_is_not_called_harmless():
    verdict = judged(cells_of(Recipe(effects={}, noise=0.05), seed=1))
    interval = verdict.primary.summary.interval
    assert interval.low < READ.tolerated_nats < interval.high
    assert failed(verdict, "minimum") == ["harm excluded"]
    assert verdict.reached("minimum") is False


@pytest.mark.parametrize(
    ("what", "level", "asked"),
    [
        ({"validation_loss": 2.0}, "ideal", "validation_loss against none"),
        ({"training_area": 9.0}, "ideal", "training_area against baseline"),
        ({"probe_r2": 0.1}, "ideal", "probe_r2 against baseline"),
        ({"variance_share_min": 0.009}, "ideal", "nothing collapsed"),
    ],
)
def test_each_condition_of_the_ideal_level_alone_keeps_it_from_being_reached(what, level, asked):
    cells = cells_of()
    (name,) = what
    change(cells, *(("none", slice(None), "") if name == "validation_loss" else ("v4_0_2",)), **what)
    verdict = judged(cells)
    assert failed(verdict, level) == [asked]
    assert [each.reached for each in verdict.levels] == [True, False, False]


def test_a_variance_that_was_never_logged_has_not_been_seen_to_hold():
    cells = cells_of()
    cells["variance_share_min"] = np.nan
    verdict = judged(cells)
    assert failed(verdict, "ideal") == ["nothing collapsed"]
    assert verdict.levels[1].checks[-1].clause.startswith("variances were not measured")


def test_one_missing_run_anywhere_leaves_estimates_only():
    cells = cells_of()
    change(cells, "shuffled_teacher", slice(0, 1), group="", state="running", validation_loss=np.nan)
    verdict = judged(cells)
    assert not verdict.complete
    assert verdict.primary.p_value is None
    assert verdict.primary.judgement is None
    assert verdict.primary.summary.mean < 0
    assert [level.reached for level in verdict.levels] == [None, None, None]


def test_coverage_that_was_declared_lower_is_enough():
    cells = cells_of()
    change(cells, "v4_0_2", slice(0, 1), state="failed", validation_loss=np.nan)
    verdict = judged(cells, READ.model_copy(update={"coverage": 0.9}))
    assert verdict.primary.p_value == pytest.approx(2 / 128)
    assert [pair.seed for pair in verdict.primary.pairs.unpaired] == [0]
    assert failed(verdict, "minimum") == ["all ended"]
    low, high = verdict.primary.bounds
    assert low < verdict.primary.summary.mean < high


@pytest.mark.parametrize(("coverage", "ended", "expected"), [(0.55, 55, 100), (0.07, 7, 100), (1.0, 24, 24)])
def test_exactly_the_declared_coverage_is_enough(coverage, ended, expected, monkeypatch):
    monkeypatch.setattr(
        "analysis.verdict.verdict.PairedGrid", lambda cells, complete: SimpleNamespace(complete=complete)
    )
    cells = pd.DataFrame({"state": ["finished"] * ended + ["failed"] * (expected - ended)})
    grid, criteria = SimpleNamespace(cells=cells), SimpleNamespace(coverage=coverage)
    assert paired_grid(grid, criteria).complete
    one_less = SimpleNamespace(cells=cells.assign(state=["failed", *cells["state"][1:]]))
    assert not paired_grid(one_less, criteria).complete


def test_a_diverged_run_is_the_worst_outcome():
    cells = cells_of()
    change(cells, "v4_0_2", slice(0, 1), state="diverged", validation_loss=np.nan)
    verdict = judged(cells)
    assert verdict.complete
    primary = verdict.primary
    assert primary.conditional
    # Worst rank 8 against ranks 1 to 7: sums of signed ranks at least 20 in size, 2 * 38 of 256 assignments.
    assert primary.statistic == pytest.approx((8 - 28) / 8)
    assert primary.p_value == pytest.approx(2 * 25 / 256, abs=0.03)
    # It has ended; the worst-rank test cannot exclude harm with one of eight diverged.
    assert failed(verdict, "minimum") == ["harm excluded"]
    assert primary.bounds is not None
    assert primary.wins == "7/8"


def test_a_diverged_baseline_counts_for_the_arm():
    cells = cells_of()
    change(cells, "baseline", slice(0, 1), state="diverged", validation_loss=np.nan)
    verdict = judged(cells)
    primary = verdict.primary
    assert primary.p_value == pytest.approx(2 / 256)
    assert primary.wins == "8/8"
    # The levels follow the declaration: the run has ended, and the worst-rank test excludes harm.
    assert verdict.reached("minimum")


@pytest.mark.parametrize("column", ["data_order_sha256", "initial_weights_sha256"])
@pytest.mark.parametrize("value", ["another", "", None])
def test_what_does_not_match_is_not_paired(column, value):
    cells = cells_of()
    change(cells, "v4_0_2", slice(2, 3), **{column: value})
    verdict = judged(cells)
    primary = verdict.primary
    assert failed(verdict, "paper") == ["coverage"]
    assert verdict.levels[2].checks[1].clause.startswith("96 of 96 runs and 28 of the 32 pairs of the sequence")
    assert primary.pairs.seeds == (0, 1, 3, 4, 5, 6, 7)
    (refused,) = primary.pairs.unpaired
    assert refused.refused
    assert refused.seed == 2
    assert ("differs" if value else "was not recorded") in refused.reason


def test_too_few_seeds_cannot_reach_the_paper_level_and_say_so():
    verdict = judged(cells_of(replace(GOOD, seeds=5)))
    assert verdict.reached("ideal")
    assert not verdict.reached("paper")
    (check,) = (each for each in verdict.levels[2].checks if not each.passed)
    assert check.name == "sequence"
    assert "since 5 seeds cannot reach p < 0.05" in check.clause
    assert verdict.primary.detectable is None


def test_one_seed_gives_no_p():
    verdict = judged(cells_of(replace(GOOD, seeds=1)))
    assert verdict.primary.p_value is None
    assert verdict.primary.reason == "one seed gives no p value"
    assert not verdict.reached("minimum")


def test_an_exploratory_report_does_not_reach_the_paper_level():
    verdict = judged(cells_of(), exploratory=("The criteria differ.",))
    assert [level.reached for level in verdict.levels] == [True, True, False]
    assert failed(verdict, "paper") == ["declared"]


def test_a_sweep_without_the_primary_arm_is_not_judged():
    cells = cells_of()
    verdict = judged(cells[cells["arm"] != "v4_0_2"].reset_index(drop=True))
    assert verdict.primary is None
    assert verdict.reached("minimum") is None


def test_arms_of_a_loss_are_tested_together_and_only_among_themselves():
    sweep = grid_with(cells_of())
    paired = PairedGrid(sweep.cells)
    arms = [each for each in arm_comparisons(paired, sweep, READ) if each.group == "kv"]
    assert [each.arm for each in arms] == [
        ("v4_0_1", "kv"),
        ("v4_0_3", "kv"),
        ("none", ""),
        ("logit_kd", ""),
        ("frozen_random", ""),
        ("shuffled_teacher", ""),
    ]
    tested = decide_together(arms, READ)
    assert tested[1].adjusted_p == pytest.approx(2 / 256)
    assert {each.family for each in tested} == {"max-T over 6 arms"}
    assert all(each.adjusted_p >= each.p_value for each in tested)
    alone = [decide_alone(each, READ) for each in arms]
    assert [each.p_value for each in tested] == pytest.approx([each.p_value for each in alone])


def test_arms_that_lack_seeds_are_tested_on_the_seeds_all_have():
    cells = cells_of()
    change(cells, "v4_0_1", slice(0, 2), state="failed", validation_loss=np.nan)
    sweep = grid_with(cells)
    arms = [each for each in arm_comparisons(PairedGrid(cells), sweep, READ) if each.group == "kv"]
    tested = decide_together(arms, READ)
    assert tested[1].adjusted_p == pytest.approx(2 / 64)
    assert {each.family for each in tested} == {"max-T over 6 arms, 6 seeds"}
    assert tested[1].summary.num_pairs == 8


def test_contrasts_are_one_family_under_holm_whose_floor_is_said():
    sweep = grid_with(cells_of())
    contrasts = under_holm(contrast_comparisons(PairedGrid(sweep.cells), sweep, READ), READ)
    assert [(each.name, each.group) for each in contrasts] == [
        (name, group) for group in ("kv", "kv+struct") for name in ("aligner", "init", "sharing")
    ]
    assert contrasts[0].family == "Holm over 6"
    assert contrasts[0].floor == pytest.approx(6 * 2 / 256)
    assert contrasts[1].summary.mean == pytest.approx(-0.03, abs=0.015)


def test_the_seeds_that_are_needed_follow_from_the_spread():
    few = primary_comparison(PairedGrid(cells_of()), grid_with(cells_of()), READ)
    noisy_cells = cells_of(replace(GOOD, noise=0.05))
    many = primary_comparison(PairedGrid(noisy_cells), grid_with(noisy_cells), READ)
    assert seeds_needed(few, READ) == 6
    assert seeds_needed(many, READ) == pytest.approx(8 * (many.summary.sd / READ.improvement_nats) ** 2, abs=4)
    # The exact test finds a little less than t, which detects 1.156 standard deviations.
    assert many.detectable == pytest.approx(1.18 * many.summary.sd, rel=0.01)


def test_margins_are_the_declared_percentages_of_perplexity():
    assert READ.tolerated_nats == pytest.approx(math.log(1.01))
    assert READ.improvement_nats == pytest.approx(-math.log(0.97))
    assert READ.strong_nats == pytest.approx(-math.log(0.95))
