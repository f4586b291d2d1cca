"""What a sweep is: the typed schema of `conf/sweep/`, arms x losses x seeds, and the controls once per seed."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field

from kv_align.config.schema import Section, validate
from kv_align.runs.errors import ConfigError, invalid_value, unknown_key
from kv_align.runs.values import is_one_line
from launch.cluster.schema import PER_ARM, read_choice

_MOST_SEEDS = 10_000
_LONGEST_LABEL = 100


class Arm(Section):
    """One arm: the experiment it is, what is changed about it, and what it needs of the cluster.

    Attributes
    ----------
    experiment
        A file of `conf/experiment/`.
    expected_percent
        The improvement over the baseline that was expected, or null.
    overrides
        Hydra overrides of this arm alone.
    resources
        Keys of the cluster (`launch.cluster.PER_ARM`) that this arm has otherwise.
    """

    experiment: str
    expected_percent: float | None = None
    overrides: list[str] = Field(default_factory=list)
    resources: dict[str, Any] = Field(default_factory=dict)


class Sweep(Section):
    """A matrix; a declaration may give `seeds` as a count, and `overrides` are Hydra overrides of every run."""

    name: str
    baseline: str
    criteria: str
    losses: list[str]
    seeds: list[int]
    arms: dict[str, Arm]
    controls: dict[str, Arm] = Field(default_factory=dict)
    overrides: list[str] = Field(default_factory=list)


def load_sweep(name: str, changes: dict[str, Any], config_dir: str | None = None) -> Sweep:
    """Read `conf/sweep/<name>.yaml`, change single keys and check it.

    Raises
    ------
    ConfigError
        If there is no such sweep, or a key or value that it does not allow.
    """
    raw = read_choice("sweep", name, config_dir)
    raw.setdefault("name", name)
    if "arms" not in raw:
        raise ConfigError(
            f"sweep={name} is not allowed: its file declares no arms; choose one that does, such as expected_results."
        )
    for key, value in changes.items():
        if key.partition(".")[0] in ("arms", "controls"):
            raise ConfigError(
                f"sweep.{key}={value} is not allowed: arms and controls stand in the sweep's file; edit that."
            )
        if key not in Sweep.model_fields:
            raise unknown_key(
                f"sweep.{key}", [field for field in Sweep.model_fields if field not in ("arms", "controls")], "a sweep"
            )
        raw[key] = value
    if not isinstance(raw.get("name"), str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", raw["name"]):
        raise invalid_value(
            "sweep.name", raw.get("name"), "a plain name of up to 100 letters, digits, - and _, such as demo"
        )
    raw["seeds"] = seeds_of(raw.get("seeds"))
    sweep = validate(Sweep, raw)
    if sweep.baseline not in sweep.arms:
        raise invalid_value("baseline", sweep.baseline, f"one of the arms: {', '.join(sweep.arms)}")
    twice = set(sweep.arms) & set(sweep.controls)
    if twice:
        raise invalid_value("controls", sorted(twice)[0], "names that are not arms too")
    doubled = [loss for loss in sweep.losses if sweep.losses.count(loss) > 1]
    if doubled:
        raise ConfigError(f"losses: {doubled[0]} stands twice; leave one of them out.")
    if not sweep.losses:
        raise invalid_value("losses", "[]", "a list of at least one loss")
    for label, arm in {**sweep.arms, **sweep.controls}.items():
        if not label.strip() or not is_one_line(label) or len(label.encode()) > _LONGEST_LABEL:
            shown = label if len(label) <= _LONGEST_LABEL else f"{label[:20]}..."
            raise invalid_value("arms", repr(shown), f"names of 1 to {_LONGEST_LABEL} letters on one line")
        for key in arm.resources:
            if key not in PER_ARM:
                raise unknown_key(f"arms.{label}.resources.{key}", PER_ARM, "what an arm may ask of the cluster")
    return sweep


def seeds_of(seeds: object) -> list[int]:
    """Return the seeds that a count or a list means.

    Raises
    ------
    ConfigError
        If it is neither, or there are none, a negative one, or one twice.
    """
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > _MOST_SEEDS:
        raise invalid_value("seeds", seeds, f"a count of at most {_MOST_SEEDS}")
    listed = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63 for seed in listed)
        or len(set(listed)) < len(listed)
    ):
        raise invalid_value(
            "seeds", seeds, "a count of at least 1, or a list of different whole numbers from 0 to 2^63 - 1"
        )
    return listed
