"""Sweeps that never trained: real run directories, written through the contracts, with effects that are set.

A value is baseline + seed effect (shared by the arms of a seed) + the arm's effect + noise of its own, so that the true
difference between arms is known. Everything is a function of the `Recipe`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import yaml

from analysis.design.cells import COLUMNS
from kv_align.runs.digests import digest_of_json as digest
from kv_align.runs.run_dir import RunDirectory, Status, append_row, write_json
from kv_align.runs.sweep_dir import Plan, PlannedRun, SweepDirectory

CRITERIA = yaml.safe_load(
    (Path(__file__).parents[2] / "conf" / "criteria" / "default.yaml").read_text(encoding="utf-8")
)
EXPECTED = {"baseline": None, "v4_0_1": 2.0, "v4_0_2": 5.0, "v4_0_3": 6.0}
CONTROLS = {"none": "ce", "logit_kd": "logit_kd", "frozen_random": "kv", "shuffled_teacher": "kv"}
LOSSES = ("kv", "kv+struct")
LAYERS, HEADS = 3, 2
PACKAGES = {"kv-align": "0.1.0", "torch": "2.9.0"}
EFFECTS = {"v4_0_1": -0.02, "v4_0_2": -0.05, "v4_0_3": -0.06, "none": -0.01, "logit_kd": -0.08, "frozen_random": 0.02}


@dataclass(frozen=True)
class Recipe:
    """What a synthetic sweep is made of; losses in nats per token.

    Attributes
    ----------
    effects
        True difference of each arm to the baseline, in every loss; arms that are not named have none.
    noise, seed_spread
        Standard deviation of a run's own noise, and of what the runs of a seed share.
    seeds, steps, log_interval, examples
        Sizes.
    """

    effects: dict[str, float] = field(default_factory=lambda: dict(EFFECTS))
    noise: float = 0.01
    seed_spread: float = 0.05
    seeds: int = 8
    steps: int = 200
    log_interval: int = 10
    examples: int = 24
    losses: tuple[str, ...] = LOSSES
    controls: tuple[str, ...] = tuple(CONTROLS)
    criteria: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(CRITERIA))


SMALL = Recipe(seeds=3, steps=50, examples=6, losses=("kv",), controls=("none",))
"""The smallest sweep in which everything that is declared can be computed."""
HOSTILE = '<script>alert(1)</script>|*x*[y](http://z)`_&amp;"'
"""A name that no renderer may believe."""


def config_of(arm: str, loss: str, seed: int) -> dict[str, Any]:
    """A configuration as `kv_align` would freeze it, as far as an analysis reads it."""
    structured = arm.startswith("v4") or arm in ("frozen_random", "shuffled_teacher")
    aligned = structured or arm == "baseline"
    aligner: dict[str, Any] = {"name": "none", "_target_": ""}
    if structured:
        aligner = {"name": "structured", "_target_": "structured", "share_dim_proj": arm != "v4_0_3"}
    elif aligned:
        aligner = {"name": "flat", "_target_": "flat", "mlp_ratio": 4}
    init = "random" if arm in ("v4_0_1", "frozen_random") else "uniform"
    return {
        "arm": arm,
        "seed": seed,
        "output_dir": "outputs",
        "run_name": None,
        "model": {"name": "embedded", "student_start": "scratch"},
        "data": {"name": "arithmetic", "shuffle_teacher": arm == "shuffled_teacher"},
        "aligner": aligner,
        "init": {"name": init} if structured else None,
        "loss": {"name": loss},
        "layer_map": {"name": "proportional"} if aligned else None,
        "keys": {"name": "unrotated", "rotated": False} if aligned else None,
        "align": {"fit": "frozen" if arm == "frozen_random" else "joint"} if aligned else None,
        "trainer": {"max_steps": 200},
    }


def make_plan(recipe: Recipe) -> Plan:
    """The expected-results matrix with controls, as `launch` freezes it."""
    cells = [(arm, loss, loss, False) for loss in recipe.losses for arm in EXPECTED]
    cells += [(arm, CONTROLS[arm], "", True) for arm in recipe.controls]
    runs = []
    for seed in range(recipe.seeds):
        for arm, loss, group, control in cells:
            config = config_of(arm, loss, seed)
            content_hash = digest({**config, "arm": None} | {"steps": recipe.steps})
            name = f"{arm}-{loss}-seed{seed}-{content_hash[:8]}"
            runs.append(PlannedRun(name, arm, loss, group, control, seed, content_hash, config))
    arms = {
        arm: {"expected_percent": EXPECTED.get(arm), "control": arm in CONTROLS, "description": ""}
        for arm in (*EXPECTED, *recipe.controls)
    }
    return Plan("synthetic", 1.7e9, "baseline", arms, recipe.criteria, "c0ffee" * 6, "", PACKAGES, tuple(runs))


def write_sweep(path: Path, recipe: Recipe, *, keep: Callable[[PlannedRun], bool] = lambda run: True) -> SweepDirectory:
    """Write a plan and the run directories of those runs that are kept."""
    sweep = SweepDirectory(path)
    plan = make_plan(recipe)
    sweep.write_plan(plan)
    for planned in plan.runs:
        if keep(planned):
            write_run(sweep.run(planned), planned, recipe)
    return sweep


def loss_of(planned: PlannedRun, recipe: Recipe) -> float:
    """Validation loss of a run at its end, nats per token."""
    shared = recipe.seed_spread * _rng(planned.seed, "seed").standard_normal()
    own = recipe.noise * _rng(planned.seed, planned.arm, planned.group).standard_normal() / np.sqrt(2)
    structural = -0.01 if planned.group == "kv+struct" else 0.0
    return float(3.0 + shared + recipe.effects.get(planned.arm, 0.0) + structural + own)


def write_run(
    directory: RunDirectory,
    planned: PlannedRun,
    recipe: Recipe,
    *,
    state: str = "finished",
    until: int | None = None,
    collapsed: bool = False,
) -> None:
    """Write one run directory; one that did not finish has no summary and no outcomes, and stops at step `until`."""
    # Hundreds of files are flushed to the disk one by one otherwise; no test pulls the plug.
    with patch("os.fsync"):
        _write_run(directory, planned, recipe, state, until, collapsed)


def _write_run(
    directory: RunDirectory, planned: PlannedRun, recipe: Recipe, state: str, until: int | None, collapsed: bool
) -> None:
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.config_file.write_text(yaml.safe_dump(planned.config), encoding="utf-8")
    last = recipe.steps if until is None else until
    reasons = {"diverged": f"the loss or its gradient was not finite at step {last}", "failed": "RuntimeError: broken"}
    status = Status(
        state=state,  # type: ignore[arg-type]
        reason=reasons.get(state, ""),
        arm=planned.arm,
        loss=planned.loss,
        seed=planned.seed,
        content_hash=planned.content_hash,
        step=last,
        total_steps=recipe.steps,
        attempt=1,
        started=1.7e9,
        updated=1.7e9 + 60,
        host="host",
        pid=1,
        job="",
    )
    write_json(directory.status_file, asdict(status))
    write_json(directory.provenance_file, _provenance(planned))
    final = loss_of(planned, recipe)
    rng = _rng(planned.seed, planned.arm, planned.group, "curve")
    for step in [1, *range(recipe.log_interval, last + 1, recipe.log_interval)]:
        append_row(directory.metrics_file, _metrics(step, final, planned, recipe, rng, collapsed))
    if state == "diverged":
        append_row(directory.metrics_file, {"step": last + 1, "task_loss": float("nan"), "total_loss": float("inf")})
    solved = {"exact_match": write_outcomes(directory, planned, recipe)} if state == "finished" else {}
    for step in sorted({*range(0, last + 1, 50), last}):
        evaluation = _evaluation(step, final, planned, recipe) | (solved if step == recipe.steps else {})
        append_row(directory.evaluations_file, {"step": step, **evaluation})
    if state == "finished":
        write_json(directory.summary_file, _summary(planned, recipe, evaluation))


def write_outcomes(directory: RunDirectory, planned: PlannedRun, recipe: Recipe) -> float:
    """Per-example outcomes: harder examples for everyone, solved more often by a better arm; returns the share solved.

    The losses of the validation split have the run's validation loss as their mean per token.
    """
    difficulty = _rng(0, "examples").standard_normal(recipe.examples)
    own = _rng(planned.seed, planned.arm, planned.group, "outcomes").standard_normal(recipe.examples)
    losses = 10 * loss_of(planned, recipe) * np.exp(difficulty * 0.2) / np.exp(difficulty * 0.2).mean()
    skill = -20 * recipe.effects.get(planned.arm, 0.0) - 0.3
    table = pd.DataFrame(
        {
            "split": ["test"] * recipe.examples + ["validation"] * recipe.examples,
            "id": [f"{split}-{place}" for split in ("test", "validation") for place in range(recipe.examples)],
            "loss_nats": [None] * recipe.examples + losses.tolist(),
            "tokens": [None] * recipe.examples + [10] * recipe.examples,
            "answered": ["7"] * recipe.examples + [None] * recipe.examples,
            "correct": [bool(each) for each in difficulty + 0.5 * own < skill] + [None] * recipe.examples,
        }
    ).astype({"loss_nats": "float64", "correct": "boolean", "tokens": "Int64", "answered": "string"})
    table.to_parquet(directory.outcomes_file, index=False)
    return float(table["correct"].mean())


def simulated_cells(recipe: Recipe, rng: np.random.Generator) -> pd.DataFrame:
    """The table that `analysis.design.cells.sweep_of` makes, drawn at once and without any file."""
    names = [(arm, loss, False) for loss in recipe.losses for arm in EXPECTED]
    names += [(arm, "", True) for arm in recipe.controls]
    shared_S = recipe.seed_spread * rng.standard_normal(recipe.seeds)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for arm, group, control in names:
        effect = recipe.effects.get(arm, 0.0)
        loss_S = 3.0 + shared_S + effect + recipe.noise * rng.standard_normal(recipe.seeds) / np.sqrt(2)
        area_S = 4.0 + shared_S + effect + recipe.noise * rng.standard_normal(recipe.seeds)
        probe_S = 0.7 - effect + 0.01 * rng.standard_normal(recipe.seeds)
        every = {
            "arm": arm,
            "group": group,
            "control": control,
            "run": "r",
            "state": "finished",
            "reason": "",
            "inputs": "",
        }
        every |= {"exact_match": 0.1, "cosine": 0.9, "variance_share_min": 0.5, "untrained_validation_loss": 6.0}
        for name, value in every.items():
            columns[name] += [value] * recipe.seeds
        columns["seed"] += list(range(recipe.seeds))
        columns["data_order_sha256"] += [f"order{seed}" for seed in range(recipe.seeds)]
        columns["initial_weights_sha256"] += [f"start{seed}" for seed in range(recipe.seeds)]
        columns["validation_loss"] += loss_S.tolist()
        columns["training_area"] += area_S.tolist()
        columns["probe_r2"] += probe_S.tolist()
    return pd.DataFrame(columns)


def _rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8]))


def _curve(step: int, final: float, recipe: Recipe) -> float:
    """From 6 nats to `final`, which is reached at the last step."""
    left = np.exp(-5.0)
    return final + (6.0 - final) * float((np.exp(-5 * step / recipe.steps) - left) / (1 - left))


def _metrics(
    step: int, final: float, planned: PlannedRun, recipe: Recipe, rng: np.random.Generator, collapsed: bool
) -> dict[str, Any]:
    task = _curve(step, final, recipe) + 0.05 * rng.standard_normal()
    row: dict[str, Any] = {"step": step, "tokens": 1000 * step, "task_loss": task, "total_loss": task}
    if planned.config["align"] is not None:
        row |= {"kv_loss": 2.0, "total_loss": task + 1.0, "kv_grad_norm": 0.5, "collapsed": collapsed}
        share = 0.001 if collapsed and step > recipe.steps // 2 else 1 - 0.5 * step / recipe.steps
        for kind in ("key", "value"):
            row |= {f"{whose}_variance_{kind}": [0.01 * share] * LAYERS for whose in ("target", "student")}
    return row | {"step_time_s": 0.5, "tokens_per_s": 2000.0, "elapsed_s": 0.5 * step}


def _evaluation(step: int, final: float, planned: PlannedRun, recipe: Recipe) -> dict[str, Any]:
    loss, progress = _curve(step, final, recipe), step / recipe.steps
    row: dict[str, Any] = {"validation_loss": loss, "validation_perplexity": float(np.exp(loss))}
    for place, kind in enumerate(("key", "value")):
        probe = 0.6 + 0.1 * progress - recipe.effects.get(planned.arm, 0.0) - 0.1 * place
        row |= {f"probe_r2_{kind}": probe, f"probe_r2_{kind}_by_layer": [probe] * LAYERS}
        if planned.config["align"] is not None:
            row |= {f"cosine_{kind}": 0.9 * progress, f"cosine_{kind}_by_layer": [0.9 * progress] * LAYERS}
    return row


def _summary(planned: PlannedRun, recipe: Recipe, evaluation: dict[str, Any]) -> dict[str, Any]:
    rng = _rng(planned.seed, planned.arm, planned.group, "heads")
    summary: dict[str, Any] = {
        "arm": planned.arm,
        "loss": planned.loss,
        "seed": planned.seed,
        "content_hash": planned.content_hash,
        "steps": recipe.steps,
        "tokens": 1000 * recipe.steps,
        **evaluation,
        "exact_match_examples": recipe.examples,
        "collapses": [],
        "untrained_validation_loss": 6.0,
        "teacher_validation_loss": 2.5,
        "step_time_s_median": 0.5,
        "elapsed_s": 0.5 * recipe.steps,
    }
    if planned.config["align"] is not None:
        for kind in ("key", "value"):
            heads = np.clip(0.85 + 0.05 * rng.standard_normal((LAYERS, HEADS)), 0, 1)
            summary[f"cosine_{kind}_by_head"] = heads.tolist()
    return summary


def _provenance(planned: PlannedRun) -> dict[str, Any]:
    aligner = {"v4_0_3": 4704, "baseline": 90_000}.get(planned.arm, 2352)
    return {
        "content_hash": planned.content_hash,
        "seed": planned.seed,
        "data_order_sha256": digest(["order", planned.seed]),
        "initial_weights_sha256": digest(["start", planned.seed]),
        "teacher_sha256": digest("teacher"),
        "parameters": {
            "teacher": 1_832_640,
            "student": 324_864,
            "aligner": aligner if planned.config["align"] is not None else 0,
        },
        "device": "cpu",
        "attempts": [
            {
                "started": 1.7e9,
                "git_commit": "c0ffee" * 6,
                "git_diff": "",
                "packages": PACKAGES,
                "python": "3.11.7",
                "platform": "Linux",
                "host": "host",
            }
        ],
    }
