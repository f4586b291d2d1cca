"""Which runs a sweep was to have, and the folder of each: out of its frozen plan, or as a plain multirun suggests it.

A plain Hydra multirun has no plan: its grid is every arm found times every seed found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from analysis.read.collect import Collected
from analysis.read.health import RUNS, chosen_folder
from analysis.read.records import UNREADABLE
from kv_align.runs.errors import ConfigError
from kv_align.runs.sweep_dir import Plan


@dataclass(frozen=True)
class ExpectedRun:
    """A cell of the grid.

    Attributes
    ----------
    arm, group, control, seed
        As in `kv_align.runs.sweep_dir.PlannedRun`.
    folder
        Key of the run folder that counts; it need not exist, and is empty where a multirun lacks the cell.
    inputs
        SHA-256 of what its configuration says that it reads, by name; empty where that was not recorded.
    """

    arm: str
    group: str
    control: bool
    seed: int
    folder: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """The grid, and what is known of its arms.

    Attributes
    ----------
    runs
        Every cell once.
    configs
        By (arm, group), the configuration of one of its runs; empty where it could not be read.
    baseline
        The arm that the others are compared with; None where none offers itself.
    percent, descriptions
        By arm, the improvement that was expected of it, and a sentence on it; arms without are not in them.
    """

    runs: tuple[ExpectedRun, ...]
    configs: dict[tuple[str, str], dict[str, Any]]
    baseline: str | None
    percent: dict[str, float] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)


def expected_runs(collected: Collected) -> Expected:
    """Return the grid of a sweep.

    Raises
    ------
    ConfigError
        If there is neither a plan nor a run whose status can be read.
    """
    return _planned(collected, collected.plan) if collected.plan is not None else _found(collected)


def _planned(collected: Collected, plan: Plan) -> Expected:
    by_hash: dict[str, list[str]] = {}
    for run, content_hash in zip(collected.runs["run"], collected.runs["content_hash"], strict=True):
        by_hash.setdefault(content_hash, []).append(run)
    states, hash_of = _states(collected), dict(zip(collected.runs["run"], collected.runs["content_hash"], strict=True))
    runs = []
    for planned in plan.runs:
        own, folders = f"{RUNS}/{planned.id}", by_hash.get(planned.content_hash, [])
        # Where the planned folder holds another run, nothing holds the planned one.
        folder = chosen_folder(folders, states, own) if folders else "" if hash_of.get(own) else own
        inputs = planned.config.get("inputs") or {}
        runs.append(ExpectedRun(planned.arm, planned.group, planned.control, planned.seed, folder, inputs))
    configs: dict[tuple[str, str], dict[str, Any]] = {}
    for planned in plan.runs:
        configs.setdefault((planned.arm, planned.group), planned.config)
    percent = {
        arm: float(settings["expected_percent"])
        for arm, settings in plan.arms.items()
        if settings.get("expected_percent") is not None
    }
    descriptions = {
        arm: str(settings["description"]) for arm, settings in plan.arms.items() if settings.get("description")
    }
    return Expected(tuple(runs), configs, plan.baseline, percent, descriptions)


def _found(collected: Collected) -> Expected:
    runs = collected.runs[collected.runs["state"] != UNREADABLE]
    folders = runs.groupby("content_hash", sort=False)["run"].agg(list)
    states = _states(collected)
    used = [chosen_folder(member, states) for member in folders]
    runs = runs[runs["run"].isin(used)]
    if runs.empty:
        raise ConfigError(f"{collected.sweep} holds no run whose status can be read: nothing can be reported.")
    configs = _with_siblings(list(zip(runs["arm"], runs["loss"], strict=True)), list(runs["config"]))
    controls = [_is_control(config) for config in configs]
    names = _telling_names(list(runs["arm"]), list(runs["loss"]), configs)
    by_cell: dict[tuple[str, str], dict[str, Any]] = {}
    inputs: dict[str, dict[str, Any]] = {}
    places: dict[tuple[str, str, bool], dict[int, str]] = {}
    identities = zip(runs["run"], runs["loss"], runs["seed"], runs["content_hash"], strict=True)
    for (run, loss, seed, content_hash), name, config, control in zip(
        identities, names, configs, controls, strict=True
    ):
        group = "" if control else loss
        if int(seed) in places.get((name, group, control), {}):
            # Another run under the same name, whose configuration cannot be read: its hash still tells it apart.
            name = f"{name} {content_hash[:8]}"
        by_cell.setdefault((name, group), config)
        inputs[run] = config.get("inputs") or {}
        places.setdefault((name, group, control), {})[int(seed)] = run
    seeds = sorted({seed for by_seed in places.values() for seed in by_seed})
    grid = [
        ExpectedRun(arm, group, control, seed, by_seed.get(seed, ""), inputs.get(by_seed.get(seed, ""), {}))
        for (arm, group, control), by_seed in sorted(places.items(), key=lambda item: item[0][2])
        for seed in seeds
    ]
    arms = list(dict.fromkeys(member.arm for member in grid))
    flat = (arm for arm in arms if _is_flat(arm, by_cell))
    return Expected(tuple(grid), by_cell, "baseline" if "baseline" in arms else next(flat, None))


def _with_siblings(cells: list[tuple[str, str]], texts: list[str]) -> list[dict[str, Any]]:
    """The configurations; where one cannot be read, that of the others of its arm and loss, if they have but one.

    A run whose configuration is gone would else differ from all others in every key.
    """
    configs = [json.loads(text) if text else {} for text in texts]
    variants: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for cell, config in zip(cells, configs, strict=True):
        if config:
            key = json.dumps(dict(config_leaves(config)), sort_keys=True)
            variants.setdefault(cell, {})[key] = config
    return [
        next(iter(variants[cell].values())) if not config and len(variants.get(cell, {})) == 1 else config
        for cell, config in zip(cells, configs, strict=True)
    ]


def _states(collected: Collected) -> dict[str, str]:
    return dict(zip(collected.runs["run"], collected.runs["state"], strict=True))


def _is_control(config: dict[str, Any]) -> bool:
    """Whether a run stands outside the loss axis: nothing is aligned, or what is aligned cannot teach."""
    align, data = config.get("align"), config.get("data") or {}
    return bool(config) and (align is None or align.get("fit") == "frozen" or bool(data.get("shuffle_teacher")))


def _is_flat(arm: str, configs: dict[tuple[str, str], dict[str, Any]]) -> bool:
    return any(
        name == arm and (config.get("aligner") or {}).get("name") == "flat" for (name, _), config in configs.items()
    )


def _telling_names(arms: list[str], losses: list[str], configs: list[dict[str, Any]]) -> list[str]:
    """Tell runs apart that have one arm and loss but not one configuration: by the keys in which they differ."""
    flat = [dict(config_leaves(config)) for config in configs]
    names = list(arms)
    for cell in set(zip(arms, losses, strict=True)):
        # One whose configuration cannot be read tells nothing of the others' keys.
        members = [place for place in range(len(arms)) if (arms[place], losses[place]) == cell and flat[place]]
        keys = sorted({key for place in members for key in flat[place]})
        differing = [key for key in keys if len({json.dumps(flat[place].get(key)) for place in members}) > 1]
        for place in members:
            marks = [f"{key}={flat[place].get(key)}" for key in differing]
            names[place] = " ".join([arms[place], *marks])
    return names


def config_leaves(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of everything in a configuration but what only names or places a run, keys joined by dots."""
    for key, value in config.items():
        if not above and key in ("seed", "arm", "output_dir", "run_name"):
            continue
        if isinstance(value, dict):
            yield from config_leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def differing_choices(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, ...]:
    """Name what two configurations differ in, but for what only names or places a run.

    A group is named alone where its choices differ (`aligner`), and with the key where only that does
    (`loss.lambda_kv`). Empty where either is unknown.
    """
    if not one or not other:
        return ()
    names: dict[str, None] = {}
    first, second = dict(config_leaves(one)), dict(config_leaves(other))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            group = key.partition(".")[0]
            a, b = one.get(group), other.get(group)
            same_choice = isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name")
            names[key if same_choice else group] = None
    return tuple(names)
