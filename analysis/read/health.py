"""What is wrong with the folders of a sweep, in one table, and what the logged rows of a run say of its health."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from analysis.read.rows import NUMBERS
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


def rows_not_finite(table: pa.Table, counts: dict[str, int]) -> dict[str, int]:
    """Rows of each run in which a loss that the run logs is null, NaN or infinite."""
    bad_N = np.zeros(table.num_rows, dtype=bool)
    for name in ("task_loss", "total_loss"):
        if name in table.column_names:
            bad_N |= ~np.asarray(pc.fill_null(pc.is_finite(table[name]), False))
    places = np.repeat(np.arange(len(counts)), list(counts.values()))
    return dict(zip(counts, np.bincount(places[bad_N], minlength=len(counts)).tolist(), strict=True))


def last_steps(table: pa.Table, counts: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return, by run, the last step that it logged and the largest distance between two that it logged."""
    step_N = table["step"].to_numpy() if table.num_rows else np.array([], dtype=np.int64)
    found, start = {}, 0
    for run, count in counts.items():
        own_T = step_N[start : start + count]
        if count:
            found[run] = (int(own_T[-1]), int(np.diff(own_T).max()) if count > 1 else 0)
        start += count
    return found


def smallest_variance_shares(table: pa.Table, counts: dict[str, int]) -> dict[str, float]:
    """Return, by run, the smallest variance over steps, layers and kinds as a share of its first logged value.

    Parameters
    ----------
    table, counts
        Rows of many runs, as `read_many` gives them.

    Returns
    -------
    dict
        Only runs that logged variances (`target_variance_*`, `student_variance_*`) are in it.
    """
    names = [name for name in table.column_names if "_variance_" in name and table[name].type == NUMBERS]
    shares: dict[str, float] = {}
    starts = dict(zip(counts, np.cumsum([0, *counts.values()]).tolist(), strict=False))
    for name in names:
        column = table[name].combine_chunks()
        for run, count in counts.items():
            rows = column.slice(starts[run], count).drop_null()
            if len(rows) and pc.all(pc.equal(pc.list_value_length(rows), len(rows[0]))).as_py():
                values_TL = np.asarray(rows.flatten(), dtype=np.float64).reshape(len(rows), -1)
                usable_L = values_TL[0] > 0
                if usable_L.any():
                    share = float(np.nanmin(values_TL[:, usable_L] / values_TL[0, usable_L]))
                    shares[run] = min(share, shares.get(run, np.inf))
    return shares
