"""What is wrong with the folders of a sweep, in one table: damaged, not finite, duplicated, foreign, missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from kv_align.runs.sweep_dir import Plan, SweepDirectory

RUNS = SweepDirectory("sweep").runs.name


def chosen_folder(folders: Sequence[str], states: Mapping[str, str], own: str | None = None) -> str:
    """Of several folders with the same run, return the one that counts: its own, else the first that ended."""
    if own in folders:
        return str(own)
    return next((run for run in folders if states[run] in ("finished", "diverged")), folders[0])


def problems_of(runs: pd.DataFrame, plan: Plan | None) -> pd.DataFrame:
    """Everything that is wrong, run by run, and every planned run that is not there or not once."""
    found: list[tuple[str, str, str]] = []
    for run, sentences, bad in zip(runs["run"], runs["problems"], runs["rows_not_finite"], strict=True):
        found += [(run, "damaged", sentence) for sentence in sentences]
        if bad:
            found.append((run, "not finite", f"{int(bad)} logged step(s) have a loss that is not a finite number"))
    by_hash: dict[str, list[str]] = {}
    for run, content_hash in zip(runs["run"], runs["content_hash"], strict=True):
        if content_hash:
            by_hash.setdefault(content_hash, []).append(run)
    own = {} if plan is None else {each.content_hash: f"{RUNS}/{each.id}" for each in plan.runs}
    states = dict(zip(runs["run"], runs["state"], strict=True))
    for content_hash, folders in by_hash.items():
        used = chosen_folder(folders, states, own.get(content_hash))
        found += [(run, "duplicate", f"the same run as {used}, which is used") for run in folders if run != used]
        if plan is not None and content_hash not in own:
            found += [(run, "foreign", "this run is not in the plan and is not used") for run in folders]
    for content_hash, run in own.items():
        if content_hash not in by_hash and run not in runs.index:
            found.append((run, "missing", "planned, and no folder holds it"))
    return pd.DataFrame(sorted(set(found)), columns=["run", "kind", "detail"])
