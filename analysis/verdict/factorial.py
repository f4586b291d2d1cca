"""Effects of single choices and their interactions, where the design allows: found by comparing configurations.

Two cells of a sweep that differ in one factor and in nothing else are a matched pair; a factor's effect is, per seed,
the mean difference over all its matched pairs. Two matched pairs that differ from each other in one other factor give
an interaction: the difference of the differences. What a design does not contain, such as the fourth cell of
init x share_dim_proj, is not estimated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.design.cells import Grid
from analysis.design.criteria import Criteria
from analysis.design.expected import config_leaves
from analysis.design.pairing import PairedGrid
from analysis.stats.checks import FloatArray
from analysis.stats.paired import PairedSummary, holm, paired_summary
from analysis.stats.sign_flip import sign_flip_floor, sign_flip_test

FACTORS = {
    "init": ("init.",),
    "share_dim_proj": ("aligner.share_dim_proj",),
    "loss": ("loss.",),
    "keys": ("keys.",),
    "layer map": ("layer_map.",),
}
"""By factor, the configuration keys in which its levels differ. The aligner's is the declared contrast of that name,
since a structured aligner cannot differ from a flat one in a single key."""

Cell = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Effect:
    """An effect or an interaction on validation loss, in nats per token; negative is better.

    Attributes
    ----------
    name
        `loss: kv to kv+struct`, or `aligner x loss`.
    interaction
        Whether it is one.
    num_matched
        Matched pairs, or pairs of pairs, that it is the mean of.
    differences
        (n,) one per seed in which all of them are complete.
    summary
        Of the differences; None with no seed.
    p_value, adjusted_p
        Exact sign-flip p, and under Holm over all main effects, or all interactions; None where nothing was tested.
    floor
        Smallest adjusted p that was possible.
    """

    name: str
    interaction: bool
    num_matched: int
    differences: FloatArray
    summary: PairedSummary | None
    p_value: float | None = None
    adjusted_p: float | None = None
    floor: float | None = None


def effects(paired: PairedGrid, grid: Grid, criteria: Criteria) -> list[Effect]:
    """Estimate all main effects and two-factor interactions that the design allows; test them if the sweep is "
    "complete."""
    controls = {(arm, group) for arm, group, control in grid.arms if control}
    flat = {cell: _levels(config) for cell, config in grid.configs.items() if config and cell not in controls}
    pairs = dict(_matched_pairs(flat, grid, criteria))
    # An effect with one matched pair may be a declared contrast, which is estimated and tested already.
    estimated = [
        _effect(paired, name, matched, criteria)
        for name, matched in pairs.items()
        if not _repeats_contrast(matched, criteria)
    ]
    for first, (name, matched) in enumerate(pairs.items()):
        for other in list(pairs)[first + 1 :]:
            crossed = list(_crossed(matched, pairs[other]))
            if crossed:
                estimated.append(
                    _interaction(paired, f"{name.split(':')[0]} × {other.split(':')[0]}", crossed, criteria)
                )
    if not paired.complete:
        return estimated
    # Two families: which factors matter, and which depend on each other.
    return [
        *_tested([effect for effect in estimated if not effect.interaction]),
        *_tested([effect for effect in estimated if effect.interaction]),
    ]


def _levels(config: dict[str, Any]) -> dict[str, str]:
    """All that can change a number, as text by key."""
    return {key: json.dumps(value) for key, value in config_leaves(config)}


def _matched_pairs(
    flat: dict[Cell, dict[str, str]], grid: Grid, criteria: Criteria
) -> Iterator[tuple[str, list[tuple[Cell, Cell]]]]:
    """Yield (name, [(cell at the first level, cell at the second), ...])."""
    aligner = criteria.contrasts.get("aligner")
    if aligner is not None:
        matched = []
        for group in grid.groups:
            own, other = grid.group_of(aligner.arm, group), grid.group_of(aligner.against, group)
            if own is not None and other is not None:
                matched.append(((aligner.against, other), (aligner.arm, own)))
        if matched:
            yield f"aligner: {aligner.against} to {aligner.arm}", matched
    cells = list(flat)
    by_name: dict[str, list[tuple[Cell, Cell]]] = {}
    for place, a in enumerate(cells):
        for b in cells[place + 1 :]:
            differing = [key for key in flat[a].keys() | flat[b].keys() if flat[a].get(key) != flat[b].get(key)]
            for factor, prefixes in FACTORS.items():
                if differing and all(key.startswith(prefixes) for key in differing):
                    first, second = levels_of(flat[a], flat[b], factor, differing)
                    name, backward = f"{factor}: {first} to {second}", f"{factor}: {second} to {first}"
                    if backward in by_name:
                        by_name[backward].append((b, a))
                    else:
                        by_name.setdefault(name, []).append((a, b))
    yield from by_name.items()


def levels_of(a: dict[str, str], b: dict[str, str], factor: str, differing: list[str]) -> tuple[str, str]:
    """Name two levels: by their choices, and by the options in which they differ where these are the same."""
    first, second = _level(a, factor), _level(b, factor)
    if first != second:
        return first, second

    def told(leaves: dict[str, str]) -> str:
        options = (f"{key.rpartition('.')[2]}={leaves.get(key, 'null')}" for key in sorted(differing))
        return f"{first} ({', '.join(options)})"

    return told(a), told(b)


def _level(leaves: dict[str, str], factor: str) -> str:
    prefix = FACTORS[factor][0]
    key = prefix if prefix in leaves else f"{prefix}name"
    return leaves.get(key, '"none"').strip('"')


def _crossed(
    first: list[tuple[Cell, Cell]], other: list[tuple[Cell, Cell]]
) -> Iterator[tuple[tuple[Cell, Cell], tuple[Cell, Cell]]]:
    """Matched pairs of one factor of which both ends are matched by the other factor."""
    across = set(other)
    for a, b in first:
        for c, d in first:
            if (a, c) in across and (b, d) in across:
                yield (a, b), (c, d)


def _by_seed(paired: PairedGrid, matched: tuple[Cell, Cell]) -> dict[int, float]:
    pairs = paired.pair(matched[1], matched[0], "validation_loss")
    finished = zip(pairs.seeds, pairs.differences, pairs.finished, strict=True)
    return {seed: float(difference) for seed, difference, both in finished if both}


def _effect(paired: PairedGrid, name: str, matched: list[tuple[Cell, Cell]], criteria: Criteria) -> Effect:
    by_pair = [_by_seed(paired, pair) for pair in matched]
    return _summarised(name, False, by_pair, criteria, complete=paired.complete)


def _repeats_contrast(matched: list[tuple[Cell, Cell]], criteria: Criteria) -> bool:
    """Whether an effect is one declared contrast over again."""
    declared = {(contrast.against, contrast.arm) for contrast in criteria.contrasts.values()}
    return len(matched) == 1 and (matched[0][0][0], matched[0][1][0]) in declared


def _interaction(
    paired: PairedGrid, name: str, crossed: list[tuple[tuple[Cell, Cell], tuple[Cell, Cell]]], criteria: Criteria
) -> Effect:
    differences = []
    for low, high in crossed:
        before, after = _by_seed(paired, low), _by_seed(paired, high)
        differences.append({seed: after[seed] - before[seed] for seed in before.keys() & after.keys()})
    return _summarised(name, True, differences, criteria, complete=paired.complete)


def _summarised(
    name: str, interaction: bool, by_pair: list[dict[int, float]], criteria: Criteria, *, complete: bool
) -> Effect:
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in by_pair)))
    differences_S = np.array([np.mean([by_seed[seed] for by_seed in by_pair]) for seed in seeds], dtype=np.float64)
    summary = paired_summary(differences_S, confidence=criteria.confidence) if seeds else None
    if summary is not None and not complete:
        summary = replace(summary, interval=None, t=None, p_value=None)
    return Effect(name, interaction, len(by_pair), differences_S, summary)


def _tested(effects: list[Effect]) -> list[Effect]:
    testable = [effect for effect in effects if effect.differences.size >= 2]
    rng = np.random.default_rng(0)
    p_values = [sign_flip_test(effect.differences, rng=rng).p_value for effect in testable]
    adjusted = holm(p_values)
    done = {
        id(effect): replace(
            effect,
            p_value=p_value,
            adjusted_p=float(own),
            floor=min(1.0, len(testable) * sign_flip_floor(effect.differences.size)),
        )
        for effect, p_value, own in zip(testable, p_values, adjusted, strict=True)
    }
    return [done.get(id(effect), effect) for effect in effects]
