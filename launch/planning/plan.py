"""A sweep becomes a frozen plan: every cell composed once, every seed set, every run with its whole configuration.

Composing takes a tenth of a second and setting a seed takes none, so a thousand runs are planned in seconds. Two cells that
mean the same run, by the hash of the effective configuration, are one run.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from kv_align.config.compose import compose_config, expand_sweep
from kv_align.config.config import Config
from kv_align.config.identity import content_hash
from kv_align.config.inputs import check_inputs
from kv_align.config.schema import validate
from kv_align.runs.errors import ConfigError, invalid_value
from kv_align.runs.progress import progress_bar
from kv_align.runs.provenance import git_state, package_versions
from kv_align.runs.sweep_dir import Plan, PlannedRun
from launch.cluster.schema import read_choice
from launch.planning.criteria import check_criteria
from launch.planning.sweep import Arm, Sweep, seeds_of

_MOST_RUNS = 100_000


@dataclass(frozen=True)
class Cell:
    """One arm under one loss, without its seed; `group` is empty for controls."""

    arm: str
    declared: str
    group: str
    control: bool
    config: Config


@dataclass(frozen=True)
class Draft:
    """A plan that was made and not yet written, and what there is to say about it, one line each."""

    plan: Plan
    notes: list[str]
    resources: dict[str, dict[str, Any]]


def make_plan(sweep: Sweep, overrides: Sequence[str], *, config_dir: str | None = None) -> Draft:
    """Compose, validate and freeze a sweep.

    Parameters
    ----------
    sweep
        The declared matrix.
    overrides
        Hydra overrides of every run; with several values (`trainer.lr=1e-3,1e-4`) an extra axis that splits the arms.
    config_dir
        A folder of the user's that is laid over `conf/`.

    Raises
    ------
    ConfigError
        For whatever can be known to be wrong, before anything is written.
    """
    of_arms = [override for arm in (*sweep.arms.values(), *sweep.controls.values()) for override in arm.overrides]
    _refuse_reserved([*sweep.overrides, *of_arms, *overrides])
    axes = _axes(overrides)
    notes: list[str] = []
    cells: list[Cell] = []
    labels = [(label, arm, False) for label, arm in sweep.arms.items()]
    labels += [(label, arm, True) for label, arm in sweep.controls.items()]
    parts = [(*arm, loss) for arm in labels for loss in ([""] if arm[2] else sweep.losses)]
    number = len(parts) * math.prod(len(axis) for axis in axes)
    runs_at_most = number * len(sweep.seeds)
    if runs_at_most > _MOST_RUNS:
        raise ConfigError(
            f"{' '.join(overrides) or sweep.name} is a sweep of {runs_at_most} runs, and at most {_MOST_RUNS} are allowed: "
            "name fewer values, or fewer seeds."
        )
    with progress_bar("planning", number) as advance:
        for label, arm, control, loss in parts:
            configs = {}
            for choice in product(*axes):
                configs[choice] = _compose(sweep, label, arm, loss, choice, config_dir, notes)
                advance(1)
            cells += _cells(label, loss, control, axes, configs)
    runs, doubles = _runs(cells, sweep.seeds)
    notes += doubles
    baseline = next(cell.arm for cell in cells if cell.declared == sweep.baseline)
    if baseline != sweep.baseline:
        notes.append(f"the baseline was split by an extra axis: the others are compared with {baseline}.")
    criteria = read_choice("criteria", sweep.criteria, config_dir)
    check_criteria(criteria, sweep.criteria)
    commit, diff = git_state()
    arms: dict[str, dict[str, Any]] = {}
    for cell in cells:
        declared = {**sweep.arms, **sweep.controls}[cell.declared]
        arms.setdefault(
            cell.arm,
            {
                "expected_percent": declared.expected_percent,
                "control": cell.control,
                "description": " ".join([f"experiment={declared.experiment}", *declared.overrides]),
            },
        )
    missing = _criteria_gap(criteria, arms, cells)
    notes += [missing] if missing else []
    plan = Plan(
        name=sweep.name,
        created=time.time(),
        baseline=baseline,
        arms=arms,
        criteria=criteria,
        git_commit=commit,
        git_diff=diff,
        packages=package_versions(),
        runs=tuple(runs),
    )
    resources = {cell.arm: dict({**sweep.arms, **sweep.controls}[cell.declared].resources) for cell in cells}
    return Draft(plan, list(dict.fromkeys(notes)), {arm: own for arm, own in resources.items() if own})


def extend_plan(plan: Plan, seeds: object) -> tuple[Plan, list[PlannedRun]]:
    """Return the plan with more seeds in every cell, and the runs that this adds; `conf/` is not read again.

    Raises
    ------
    ConfigError
        If there is no new seed among them.
    """
    asked = seeds_of(seeds)
    before = sorted({run.seed for run in plan.runs})
    new = [seed for seed in asked if seed not in before]
    if not new:
        raise ConfigError(
            f"seeds={seeds} is not allowed: the plan has the seeds {', '.join(map(str, before))} already; "
            "give a larger count, or a list with new ones."
        )
    cells: dict[tuple[str, str], Cell] = {}
    for run in plan.runs:
        if (run.arm, run.group) not in cells:
            config = validate(Config, run.config)
            check_inputs(config)
            cells[run.arm, run.group] = Cell(run.arm, run.arm, run.group, run.control, config)
    added, _ = _runs(cells.values(), new)
    record = {"created": time.time(), "seeds": new}
    extended = replace(plan, runs=(*plan.runs, *added), extensions=(*plan.extensions, record))
    return extended, added


def _refuse_reserved(overrides: Sequence[str]) -> None:
    advice = {
        "seed": "give seeds=COUNT or seeds=[0,1,2]",
        "arm": "the sweep names its arms",
        "run_name": "the plan names its runs",
        "output_dir": "give output_dir on the command line of launch",
        "experiment": "the sweep names the experiment of each arm",
        "+experiment": "the sweep names the experiment of each arm",
    }
    for override in overrides:
        key, _, value = override.partition("=")
        if key in advice:
            raise ConfigError(f"{key}={value} is not allowed in a sweep: {advice[key]}.")
        if key.lstrip("+~").partition(".")[0].partition("/")[0] == "hydra":
            raise ConfigError(f"{override} is not allowed in a sweep: Hydra only composes here; take it out.")


def _axes(overrides: Sequence[str]) -> list[list[str]]:
    """Return the values of each override, most of them one."""
    return [[choice for (choice,) in expand_sweep([override])] for override in overrides]


def _compose(
    sweep: Sweep, label: str, arm: Arm, loss: str, choice: Sequence[str], config_dir: str | None, notes: list[str]
) -> Config:
    chosen = [] if not loss else [f"loss={loss}"]
    # The loss follows the experiment, so that an arm's own default does not win over the sweep's axis.
    composed, adjustments = compose_config(
        [f"experiment={arm.experiment}", *chosen, *sweep.overrides, *choice, *arm.overrides], config_dir=config_dir
    )
    # What the defaults choose and an arm has no use for is nothing to speak of; what somebody asked for is.
    asked = {override.partition("=")[0] for override in (*sweep.overrides, *choice, *arm.overrides)}
    notes += [f"{label}: {note}" for note in adjustments if note.partition("=")[0] in asked]
    return composed.model_copy(update={"arm": label, "seed": 0, "output_dir": "outputs", "run_name": None})


def _cells(
    label: str, loss: str, control: bool, axes: list[list[str]], configs: dict[tuple[str, ...], Config]
) -> list[Cell]:
    """One cell per choice that differs; an axis that changes nothing in this arm is not in its name."""
    hashes = {choice: content_hash(config) for choice, config in configs.items()}
    telling = [
        place
        for place, values in enumerate(axes)
        if len(values) > 1
        and any(hashes[choice] != hashes[_with(choice, place, value)] for choice in configs for value in values)
    ]
    cells = {}
    for choice, config in configs.items():
        name = "-".join([label, *(_short(choice[place]) for place in telling)])
        if name not in cells:
            cells[name] = Cell(name, label, loss, control, config.model_copy(update={"arm": name}))
    return list(cells.values())


def _with(choice: tuple[str, ...], place: int, value: str) -> tuple[str, ...]:
    return (*choice[:place], value, *choice[place + 1 :])


def _short(override: str) -> str:
    key, _, value = override.lstrip("+~").partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def _runs(cells: Iterable[Cell], seeds: Sequence[int]) -> tuple[list[PlannedRun], list[str]]:
    runs: dict[str, PlannedRun] = {}
    notes = []
    for cell in cells:
        for seed in seeds:
            config = cell.config.model_copy(update={"seed": seed})
            identity = content_hash(config)
            if identity in runs:
                first = runs[identity]
                same = f"{cell.arm} under {cell.group or config.loss.name}"
                notes.append(f"{same} is the same run as {first.arm} under {first.group or first.loss}: run once.")
                continue
            name = re.sub(r"[^\w.+=-]", "_", f"{cell.arm}-{config.loss.name}-seed{seed}-{identity[:8]}")
            runs[identity] = PlannedRun(
                id=name,
                arm=cell.arm,
                loss=config.loss.name,
                group=cell.group,
                control=cell.control,
                seed=seed,
                content_hash=identity,
                config=config.model_copy(update={"run_name": name}).model_dump(by_alias=True),
            )
    return list(runs.values()), list(dict.fromkeys(notes))


def _criteria_gap(criteria: dict[str, Any], arms: dict[str, Any], cells: list[Cell]) -> str:
    primary = criteria.get("primary")
    if not isinstance(primary, dict):
        raise invalid_value("criteria", criteria.get("name"), "criteria with a primary comparison")
    wanted = {primary.get("arm"), primary.get("baseline")}
    absent = sorted(str(arm) for arm in wanted if arm not in arms)
    if primary.get("loss") not in {cell.group for cell in cells}:
        absent.append(f"loss={primary.get('loss')}")
    if not absent:
        return ""
    return (
        f"the primary comparison needs {', '.join(absent)}, not in this plan: no verdict can come of it; criteria of your "
        "own name your arms (sweep.criteria=NAME, see conf/README.md)."
    )
