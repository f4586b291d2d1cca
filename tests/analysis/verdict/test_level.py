"""The whole verdict as a test: how often it is wrong when there is nothing, and how often it finds what is there.

Simulated at the level of the table that files are turned into, so that pairing, tests, intervals, criteria and levels all
take part. A few hundred sweeps a row here; 2,000 in the tests that are marked slow.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.design.cells import Grid
from analysis.design.criteria import parse_criteria
from analysis.stats.sign_flip_power import level_power
from analysis.verdict.testing import shown_better, shown_worse
from analysis.verdict.verdict import Verdict, decide
from tests.analysis.synthetic import CRITERIA, Recipe, simulated_cells

FEW, MANY = 200, 2000
SIZES = [pytest.param(FEW, id=str(FEW)), pytest.param(MANY, id=str(MANY), marks=pytest.mark.slow)]
CRITERIA_READ = parse_criteria(CRITERIA, "test")
ALPHA = CRITERIA_READ.alpha
NULL = replace(Recipe(), effects={}, noise=0.03, losses=("kv",), controls=("none",))
WIN = {"v4_0_2": -0.05}

Change = Callable[[pd.DataFrame, np.random.Generator], None]


def unchanged(cells: pd.DataFrame, rng: np.random.Generator) -> None:
    """The recipe as it is."""


def skewed(cells: pd.DataFrame, rng: np.random.Generator) -> None:
    """The arm's own noise has a long tail to the worse side and mean 0; all others are steady."""
    seeds = cells["seed"].nunique()
    for name in ("validation_loss", "training_area"):
        base = cells.loc[cells["arm"] == "baseline", name].to_numpy()
        for arm in ("v4_0_2", "none"):
            own = rng.exponential(0.03, seeds) - 0.03 if arm == "v4_0_2" else 0.001 * rng.standard_normal(seeds)
            cells.loc[cells["arm"] == arm, name] = base + own


def skewed_against_none(cells: pd.DataFrame, rng: np.random.Generator) -> None:
    """As `skewed`, and flat is truly worse: only the step against `none` is left without a real advantage."""
    skewed(cells, rng)
    for name in ("validation_loss", "training_area"):
        cells.loc[cells["arm"] == "baseline", name] += 0.1


def tied(cells: pd.DataFrame, rng: np.random.Generator) -> None:
    """Numbers as coarse as a table's: many differences are 0."""
    for name, step in (("validation_loss", 0.03), ("training_area", 0.03), ("probe_r2", 0.01)):
        cells[name] = (cells[name] / step).round() * step


def diverging(cells: pd.DataFrame, rng: np.random.Generator) -> None:
    """One run in twenty diverges, whatever its arm."""
    lost = rng.random(len(cells)) < 0.05
    cells.loc[lost, "state"] = "diverged"
    cells.loc[lost, ["validation_loss", "training_area", "probe_r2"]] = np.nan


SCENARIOS: dict[str, tuple[dict[str, float], Change]] = {
    "everything null": ({}, unchanged),
    "flat harmful, the arm equal to none": ({**WIN, "none": -0.05}, unchanged),
    "the arm 1 % worse than none": ({**WIN, "none": -0.05 - math.log(1.01)}, unchanged),
    "skewed": ({}, skewed),
    "skewed, flat harmful": ({}, skewed_against_none),
    "ties": ({}, tied),
    "ties, flat harmful": ({**WIN, "none": -0.05}, tied),
    "5 % divergence": ({}, diverging),
    "5 % divergence, flat harmful": ({**WIN, "none": -0.05}, diverging),
}


def simulate(recipe: Recipe, count: int, seed: int, change: Change = unchanged) -> list[Verdict]:
    rng, verdicts = np.random.default_rng(seed), []
    for _ in range(count):
        cells = simulated_cells(recipe, rng)
        cells = cells[cells["arm"].isin(["baseline", "v4_0_2", "none"])].reset_index(drop=True)
        change(cells, rng)
        verdicts.append(decide(Grid(cells, "baseline", {}, {}, {}, True), CRITERIA_READ))
    return verdicts


def at_most(count: int, of: int, level: float) -> bool:
    """Whether so many errors are compatible with a rate of at most `level` (one-sided, 1 in 1,000)."""
    return bool(stats.binom.sf(count - 1, of, level) > 0.001)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_paper_level_is_reached_without_a_real_advantage_at_most_at_alpha(name, count):
    effects, change = SCENARIOS[name]
    verdicts = simulate(replace(NULL, effects=effects), count, seed=1, change=change)
    paper = sum(bool(verdict.reached("paper")) for verdict in verdicts)
    print(f"P(paper | {name}) = {paper / count:.3f} of {count}")
    assert at_most(paper, count, ALPHA)


@pytest.mark.parametrize("count", SIZES)
def test_without_an_effect_the_primary_test_keeps_its_level(count):
    verdicts = simulate(NULL, count, seed=2)
    better = sum(shown_better(verdict.primary, CRITERIA_READ) for verdict in verdicts)
    worse = sum(shown_worse(verdict.primary, CRITERIA_READ) for verdict in verdicts)
    assert at_most(better + worse, count, ALPHA)
    assert at_most(better, count, ALPHA / 2)
    assert at_most(sum(verdict.primary.judgement.superior_by_margin for verdict in verdicts), count, 0.001)
    # The exact test is not timid either: with 8 seeds its attainable level is 12/256.
    low, high = stats.binom.interval(0.999, count, 12 / 256)
    assert low <= better + worse <= high


@pytest.mark.parametrize("count", SIZES)
def test_harm_at_the_margin_is_rarely_called_harmless(count):
    verdicts = simulate(replace(NULL, effects={"v4_0_2": CRITERIA_READ.tolerated_nats}), count, seed=3)
    assert at_most(sum(bool(verdict.reached("minimum")) for verdict in verdicts), count, 0.025)


@pytest.mark.parametrize("count", SIZES)
def test_harm_at_the_margin_is_rarely_called_harmless_where_runs_diverge(count):
    recipe = replace(NULL, effects={"v4_0_2": CRITERIA_READ.tolerated_nats})
    verdicts = simulate(recipe, count, seed=4, change=diverging)
    assert at_most(sum(bool(verdict.reached("minimum")) for verdict in verdicts), count, 0.025)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(("percent", "seed"), [(3, 5), (5, 6)])
def test_a_real_improvement_is_found_with_the_power_that_is_said(percent, seed, count):
    effect = math.log(1 - percent / 100)
    verdicts = simulate(replace(NULL, effects={"v4_0_2": effect}), count, seed=seed)
    found = np.mean([shown_better(verdict.primary, CRITERIA_READ) for verdict in verdicts])
    paper = np.mean([bool(verdict.reached("paper")) for verdict in verdicts])
    said = level_power(-effect, NULL.noise, 8, asked=CRITERIA_READ.improvement_nats)
    print(
        f"at a true -{percent} %, spread 3 %, 8 seeds: power of p {found:.2f} (said {said.test:.2f}), of the paper level "
        f"{paper:.2f} (said: at most {said.level:.2f}); {count} sweeps"
    )
    tolerance = 3.5 * math.sqrt(0.25 / count)
    assert found == pytest.approx(said.test, abs=tolerance)
    assert 0.1 < paper < said.level + tolerance
