"""THE CONTRACT of a sweep: what its directory holds, and the frozen plan in it. Imports no torch.

    plan.json        Plan: every run with its full configuration, frozen before the first of them starts
    runs/<id>/       one run directory each (kv_align.runs.run_dir), named by the id in the plan
    report/          what the analysis writes
    HISTORY.md       the conclusions of every report, appended

A plain Hydra multirun is a sweep directory without a plan: its runs are the sub-folders that hold a `status.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kv_align.runs.digests import digest_of_json
from kv_align.runs.errors import ConfigError
from kv_align.runs.program import program
from kv_align.runs.run_dir import RunDirectory, read_json, write_json

FORMAT = 1


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan.

    Attributes
    ----------
    id
        Folder name below `runs/`: arm, loss, seed and the start of the content hash.
    arm, loss, seed
        The cell. `loss` is the run's own; `group` is the loss axis it is compared within, empty for controls, which
        stand outside it and are compared with every loss.
    group
        See `loss`.
    control
        Whether the arm is a control.
    content_hash
        Of the configuration (`kv_align.config.identity.content_hash`).
    config
        The effective configuration, complete.
    """

    id: str
    arm: str
    loss: str
    group: str
    control: bool
    seed: int
    content_hash: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A frozen sweep.

    Attributes
    ----------
    name, created
        The sweep's name, and when it was frozen (seconds since the epoch).
    baseline
        The arm that the others are compared with.
    arms
        By name, in the order of the expected-results table: `expected_percent` (improvement that was expected of it, or
        null), `control`, `description`.
    criteria
        The success criteria as they were declared (`conf/criteria`).
    git_commit, git_diff, packages
        The code that the plan was made with.
    runs
        All of them, each cell once.
    extensions
        How the plan was added to after it was frozen: a list of {created, seeds}.
    """

    name: str
    created: float
    baseline: str
    arms: dict[str, dict[str, Any]]
    criteria: dict[str, Any]
    git_commit: str
    git_diff: str
    packages: dict[str, str]
    runs: tuple[PlannedRun, ...]
    extensions: tuple[dict[str, Any], ...] = ()

    @property
    def plan_hash(self) -> str:
        """SHA-256 (hex) over which runs there are and what they are compared by; not over when it was made."""
        return digest_of_json(
            {"runs": [(run.arm, run.group, run.content_hash) for run in self.runs], "baseline": self.baseline}
        )

    @property
    def criteria_hash(self) -> str:
        """SHA-256 (hex) over the criteria."""
        return digest_of_json(self.criteria)


class SweepDirectory:
    """Reads and writes a sweep directory; creates nothing until something is written.

    Parameters
    ----------
    path
        The directory; it need not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.plan_file = self.path / "plan.json"
        self.runs = self.path / "runs"
        self.report = self.path / "report"
        self.history_file = self.path / "HISTORY.md"

    def run(self, planned: PlannedRun) -> RunDirectory:
        """Return the directory of a planned run."""
        return RunDirectory(self.runs / planned.id)

    def plan(self) -> Plan | None:
        """Return the frozen plan; None where there is none (a plain Hydra multirun).

        Raises
        ------
        ConfigError
            If there is one that cannot be read, or that was changed by hand.
        """
        if not self.plan_file.exists():
            return None
        try:
            content = dict(read_json(self.plan_file) or {})
            recorded, version = content.pop("sha256"), content.pop("format")
            sound = version == FORMAT and recorded == digest_of_json(content)
            runs = tuple(PlannedRun(**each) for each in content.pop("runs"))
            plan = Plan(**content | {"runs": runs, "extensions": tuple(content["extensions"])})
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.plan_file} cannot be read as a plan: restore it, or submit a new sweep."
            ) from error
        if not sound:
            raise ConfigError(f"{self.plan_file} was changed after it was frozen: restore it, or submit a new sweep.")
        return plan

    def frozen_plan(self) -> Plan:
        """Return the plan of a sweep that must have one.

        Raises
        ------
        ConfigError
            If there is none, or one that cannot be read.
        """
        plan = self.plan()
        if plan is None:
            raise ConfigError(f"{self.path} has no frozen plan: submit the sweep with {program('launch')} submit.")
        return plan

    def write_plan(self, plan: Plan) -> None:
        """Write a plan atomically, with its digest."""
        content = json.loads(json.dumps(asdict(plan)))
        write_json(self.plan_file, {"format": FORMAT, "sha256": digest_of_json(content), **content})

    def found_runs(self) -> list[RunDirectory]:
        """Return all run directories that are there, planned or not, in the order of their paths."""
        return [RunDirectory(file.parent) for file in sorted(self.path.rglob("status.json"))]
