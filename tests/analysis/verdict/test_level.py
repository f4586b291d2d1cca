"""The whole verdict as a test: how often it is wrong when there is nothing, and how often it finds what is there.

Simulated at the level of the table that files are turned into, so that pairing, tests, intervals, criteria and levels all
take part.
"""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis.design.cells import Grid
from analysis.design.criteria import parse_criteria
from analysis.verdict.verdict import Verdict, decide
from tests.analysis.synthetic import CRITERIA, Recipe, simulated_cells

SWEEPS = 2000
CRITERIA_READ = parse_criteria(CRITERIA, "test")
SMALL = Recipe(effects={}, losses=("kv",), controls=("none",))


def simulate(recipe: Recipe, count: int, seed: int) -> list[Verdict]:
    rng = np.random.default_rng(seed)
    return [
        decide(Grid(simulated_cells(recipe, rng), "baseline", {}, {}, {}, True), CRITERIA_READ) for _ in range(count)
    ]


def at_most(count: int, of: int, level: float) -> bool:
    """Whether so many errors are compatible with a rate of at most `level` (one-sided, 1 in 1,000)."""
    return bool(stats.binom.sf(count - 1, of, level) > 0.001)


@pytest.fixture(scope="module")
def null_verdicts() -> list[Verdict]:
    return simulate(replace(SMALL, noise=0.05), SWEEPS, seed=1)


def test_without_an_effect_the_primary_test_keeps_its_level(null_verdicts):
    judged = [verdict.primary.judgement for verdict in null_verdicts]
    wrong = sum(each.superior or each.worse for each in judged)
    assert at_most(wrong, SWEEPS, 0.05)
    # The exact test is not timid either: with 8 seeds its attainable level is 12/256.
    assert wrong / SWEEPS == pytest.approx(12 / 256, abs=0.015)
    assert at_most(sum(each.superior for each in judged), SWEEPS, 0.025)


def test_without_an_effect_the_paper_level_is_almost_never_reached(null_verdicts):
    assert at_most(sum(bool(verdict.reached("paper")) for verdict in null_verdicts), SWEEPS, 0.025)
    assert at_most(sum(each.primary.judgement.superior_by_margin for each in null_verdicts), SWEEPS, 0.001)


def test_harm_at_the_margin_is_rarely_called_harmless():
    verdicts = simulate(replace(SMALL, effects={"v4_0_2": CRITERIA_READ.tolerated_nats}, noise=0.05), 1000, seed=2)
    assert at_most(sum(bool(verdict.reached("minimum")) for verdict in verdicts), 1000, 0.025)


def test_the_declared_effect_is_found_with_the_power_that_the_t_test_promises():
    noise = 0.04  # dz of 5 % over 4 % noise: 1.28, with 8 seeds
    effect = -CRITERIA_READ.strong_nats
    verdicts = simulate(replace(SMALL, effects={"v4_0_2": effect, "none": 0.0}, noise=noise), 500, seed=3)
    found = np.mean([verdict.primary.judgement.superior for verdict in verdicts])
    dz = effect / noise
    promised = 1 - stats.nct.cdf(stats.t.ppf(0.975, 7), 7, abs(dz) * np.sqrt(8))
    assert found == pytest.approx(promised, abs=0.05)
    paper = np.mean([bool(verdict.reached("paper")) for verdict in verdicts])
    assert 0.7 < paper <= found
