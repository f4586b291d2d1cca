"""The expected grid of a sweep, each cell with what was found of it. One row per planned run, whatever became of it.

The columns that later steps read are `COLUMNS`; a simulation makes the same table without any file. A plain Hydra
multirun has no plan: its grid is every arm found times every seed found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.collect import Collected
from analysis.criteria import Criteria
from analysis.problems import RUNS, chosen_folder
from analysis.records import UNREADABLE
from analysis.training import areas
from kv_align.errors import ConfigError

IDENTITY = ("arm", "group", "control", "seed")
HASHES = ("data_order_sha256", "initial_weights_sha256")
METRICS = (
    "validation_loss",
    "exact_match",
    "probe_r2",
    "cosine",
    "training_area",
    "variance_share_min",
    "untrained_validation_loss",
)
COLUMNS = (*IDENTITY, "run", "state", "reason", *HASHES, *METRICS)

FINISHED, DIVERGED, MISSING = "finished", "diverged", "missing"
"""States that later steps tell apart; every other one (failed, interrupted, running, damaged) is a run not ended."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """What was expected and what was found.

    Attributes
    ----------
    cells
        DataFrame with the columns of `COLUMNS`, one row per expected run; metrics are NaN where there are none.
    baseline
        The arm that the others are compared with.
    expected_percent
        Improvement that was expected of an arm, in percent; arms without an expectation are not in it.
    descriptions
        A sentence on an arm, where there is one.
    configs
        By (arm, group), the configuration of one of its runs; empty where it could not be read.
    planned
        Whether there was a frozen plan.
    """

    cells: pd.DataFrame
    baseline: str
    expected_percent: dict[str, float]
    descriptions: dict[str, str]
    configs: dict[tuple[str, str], dict[str, Any]]
    planned: bool

    @property
    def arms(self) -> list[tuple[str, str, bool]]:
        """(arm, group, control), each once, in the order of the cells."""
        return list(dict.fromkeys(zip(self.cells["arm"], self.cells["group"], self.cells["control"], strict=True)))

    @property
    def groups(self) -> list[str]:
        """Losses within which arms are compared; controls stand outside."""
        return list(dict.fromkeys(group for _, group, control in self.arms if not control))

    def group_of(self, arm: str, group: str) -> str | None:
        """The group under which an arm takes part in a comparison within `group`; None if it does not."""
        for name, own, control in self.arms:
            if name == arm and (own == group or control):
                return own
        return None


def sweep_of(
    collected: Collected, criteria: Criteria, baseline: str | None = None, *, needs_baseline: bool = True
) -> Sweep:
    """Lay what was collected over the expected grid.

    Parameters
    ----------
    collected, criteria
        The tables; the criteria say at which step and over which window is measured.
    baseline
        Arm to compare with; None: the plan's, or the flat arm of a multirun.
    needs_baseline
        Whether a multirun in which no arm offers itself is refused; else its first arm is named as the baseline.

    Raises
    ------
    ConfigError
        If `baseline` is not an arm of the sweep, or a multirun has none that offers itself.
    """
    grid, configs, facts = _planned(collected) if collected.plan is not None else _found(collected)
    runs = _with_metrics(collected, criteria)
    cells = pd.DataFrame(
        [{**cell, **cell_of(runs.get(cell.pop("key")))} for cell in grid], columns=list(COLUMNS)
    ).reset_index(drop=True)
    names = list(dict.fromkeys(cells["arm"]))
    chosen = baseline or facts["baseline"] or next((arm for arm in names if _is_flat(arm, configs)), None)
    if chosen is None and not needs_baseline:
        chosen = names[0]
    if chosen not in names:
        asked = f"--baseline={baseline}" if baseline else f"baseline={facts['baseline'] or 'null'}"
        raise ConfigError(f"{asked} is not allowed: the arms are {', '.join(names)}; choose one with --baseline ARM.")
    return Sweep(cells, str(chosen), facts["expected"], facts["descriptions"], configs, collected.plan is not None)


def _planned(
    collected: Collected,
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], dict[str, Any]], dict[str, Any]]:
    plan = collected.plan
    assert plan is not None
    by_hash: dict[str, list[str]] = {}
    for run, content_hash in zip(collected.runs["run"], collected.runs["content_hash"], strict=True):
        by_hash.setdefault(content_hash, []).append(run)
    states = dict(zip(collected.runs["run"], collected.runs["state"], strict=True))
    grid = []
    for planned in plan.runs:
        own, there = f"{RUNS}/{planned.id}", by_hash.get(planned.content_hash, [])
        key = chosen_folder(there, states, own) if there else own
        cell = {"arm": planned.arm, "group": planned.group, "control": planned.control, "seed": planned.seed}
        grid.append({**cell, "key": key})
    configs: dict[tuple[str, str], dict[str, Any]] = {}
    for planned in plan.runs:
        configs.setdefault((planned.arm, planned.group), planned.config)
    facts = {
        "baseline": plan.baseline,
        "expected": {
            arm: float(each["expected_percent"])
            for arm, each in plan.arms.items()
            if each.get("expected_percent") is not None
        },
        "descriptions": {arm: str(each["description"]) for arm, each in plan.arms.items() if each.get("description")},
    }
    return grid, configs, facts


def _found(
    collected: Collected,
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], dict[str, Any]], dict[str, Any]]:
    runs = collected.runs[collected.runs["state"] != UNREADABLE]
    folders = runs.groupby("content_hash", sort=False)["run"].agg(list)
    states = dict(zip(collected.runs["run"], collected.runs["state"], strict=True))
    used = [chosen_folder(each, states) for each in folders]
    runs = runs[runs["run"].isin(used)]
    if runs.empty:
        raise ConfigError(f"{collected.sweep} holds no run whose status can be read: nothing can be reported.")
    configs = [json.loads(text) if text else {} for text in runs["config"]]
    controls = [_is_control(config) for config in configs]
    names = _telling_names(list(runs["arm"]), list(runs["loss"]), configs)
    by_cell: dict[tuple[str, str], dict[str, Any]] = {}
    places: dict[tuple[str, str, bool], dict[int, str]] = {}
    for run, name, loss, seed, config, control in zip(
        runs["run"], names, runs["loss"], runs["seed"], configs, controls, strict=True
    ):
        group = "" if control else loss
        by_cell.setdefault((name, group), config)
        places.setdefault((name, group, control), {})[int(seed)] = run
    seeds = sorted({seed for found in places.values() for seed in found})
    grid = [
        {"arm": arm, "group": group, "control": control, "seed": seed, "key": found.get(seed, "")}
        for (arm, group, control), found in sorted(places.items(), key=lambda item: item[0][2])
        for seed in seeds
    ]
    baseline = "baseline" if any(arm == "baseline" for arm, _ in by_cell) else None
    return grid, by_cell, {"baseline": baseline, "expected": {}, "descriptions": {}}


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
        members = [place for place in range(len(arms)) if (arms[place], losses[place]) == cell]
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


def _with_metrics(collected: Collected, criteria: Criteria) -> dict[str, dict[str, Any]]:
    """By run, the columns of `runs` and the metrics that are computed from other tables."""
    runs = collected.runs
    found: dict[str, dict[str, Any]] = {str(row["run"]): {**row} for row in runs.to_dict("records")}  # type: ignore[dict-item]
    steps = collected.table("metrics", ["run", "step", "task_loss"])
    finished = [run for run, row in found.items() if row["state"] == FINISHED]
    for run, area in areas(steps, finished, criteria.training_window).by_run.items():
        found[run]["training_area"] = area
    if criteria.primary.step != "last":
        evaluations = collected.table("evaluations", ["run", "step", "validation_loss"])
        at_step = evaluations[evaluations["step"] == criteria.primary.step]
        chosen = dict(zip(at_step["run"], at_step["validation_loss"], strict=True))
        for run, row in found.items():
            row["loss_at_step"] = chosen.get(run)
    return found


def cell_of(row: dict[str, Any] | None) -> dict[str, Any]:
    """Columns of a cell out of a row of `runs`; None where no folder holds the run.

    `training_area` is added to the row, and `loss_at_step` where the criteria name a step that is not the last.
    """
    if row is None:
        return {"run": "", "state": MISSING, "reason": "no folder holds it", **dict.fromkeys(HASHES, "")}
    state, reason = _state(row)
    cell = {"run": row["run"], "state": state, "reason": reason}
    cell |= {name: row.get(name) or "" for name in HASHES}
    values: dict[str, Any] = {name: row.get(name) for name in METRICS} if state == FINISHED else {}
    for name in ("probe_r2", "cosine"):
        both = [row.get(f"{name}_{kind}") for kind in ("key", "value")]
        if state == FINISHED and all(value is not None and value == value for value in both):
            values[name] = sum(both) / 2  # type: ignore[arg-type]
    if "loss_at_step" in row and state == FINISHED:
        values["validation_loss"] = row["loss_at_step"]
    values["untrained_validation_loss"] = row.get("untrained_validation_loss")
    values["variance_share_min"] = row.get("variance_share_min")
    return cell | values


def _state(row: dict[str, Any]) -> tuple[str, str]:
    """What a run counts as: a finished one without its numbers is damaged, one without a finite loss has diverged."""
    state, reason = row["state"], row.get("reason") or ""
    if state != FINISHED:
        return state, "its status cannot be read" if state == UNREADABLE else reason
    if not row["has_summary"]:
        return "damaged", "it finished, but its summary cannot be read"
    loss = row.get("validation_loss")
    if loss is None or loss != loss:
        return DIVERGED, "it finished, but its validation loss is not a finite number"
    return FINISHED, ""


def coverage(cells: pd.DataFrame) -> tuple[int, int]:
    """Return (runs that ended, runs expected): a diverged run has ended, it is an outcome."""
    return int(cells["state"].isin([FINISHED, DIVERGED]).sum()), len(cells)


def states(cells: pd.DataFrame) -> Counter[str]:
    """Return how many cells are in each state."""
    return Counter(cells["state"])
