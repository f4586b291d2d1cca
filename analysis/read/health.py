"""What is wrong with the folders of a sweep, in one table, and what the logged rows of a run say of its health."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    problems: list[tuple[str, str, str]] = []
    columns = (runs[name] for name in ("run", "problems", "contradictions", "rows_not_finite"))
    for run, sentences, contradictions, bad in zip(*columns, strict=True):
        against = set(contradictions)
        problems += [
            (run, "contradicts itself" if sentence in against else "damaged", sentence) for sentence in sentences
        ]
        problems += [(run, "contradicts itself", sentence) for sentence in contradictions]
        if bad:
            problems.append((run, "not finite", f"{int(bad)} logged step(s) have a loss that is not a finite number"))
    by_hash: dict[str, list[str]] = {}
    for run, content_hash in zip(runs["run"], runs["content_hash"], strict=True):
        if content_hash:
            by_hash.setdefault(content_hash, []).append(run)
    own = {} if plan is None else {planned.content_hash: f"{RUNS}/{planned.id}" for planned in plan.runs}
    states = dict(zip(runs["run"], runs["state"], strict=True))
    for content_hash, folders in by_hash.items():
        used = chosen_folder(folders, states, own.get(content_hash))
        problems += [(run, "duplicate", f"the same run as {used}, which is used") for run in folders if run != used]
        if plan is not None and content_hash not in own:
            problems += [(run, "foreign", "this run is not in the plan and is not used") for run in folders]
    for content_hash, run in own.items():
        if content_hash not in by_hash and run not in runs.index:
            problems.append((run, "missing", "planned, and no folder holds it"))
    return pd.DataFrame(sorted(set(problems)), columns=["run", "kind", "detail"])


def rows_not_finite(table: pa.Table, counts: dict[str, int]) -> dict[str, int]:
    """Rows of each run in which a loss that the run logs is null, NaN or infinite."""
    bad_N = np.zeros(table.num_rows, dtype=bool)
    for name in ("task_loss", "total_loss"):
        if name in table.column_names:
            bad_N |= ~np.asarray(pc.fill_null(pc.is_finite(table[name]), False))
    places = np.repeat(np.arange(len(counts)), list(counts.values()))
    return dict(zip(counts, np.bincount(places[bad_N], minlength=len(counts)).tolist(), strict=True))


@dataclass(frozen=True)
class LoggedSteps:
    """Which optimizer steps a run logged: the first, the last, and the largest and the usual distance between two.

    `usual` is None where too few were logged to say. A whole run logs its first step, every so many, and its last.
    """

    first: int
    last: int
    largest: int
    usual: int | None

    def gaps(self, step: int) -> list[str]:
        """Say in sentences what is missing of a run that finished at `step`."""
        sentences = []
        if self.first > 1:
            sentences.append(f"the logged steps begin at {self.first}, not at 1")
        if self.last + self.largest < step:
            sentences.append(f"the logged steps end at {self.last}, the run at {step}")
        if self.usual is not None and self.largest > self.usual:
            sentences.append(f"between two logged steps lie up to {self.largest}, else {self.usual}: some are lost")
        return [f"{sentence}: its training curve is left out" for sentence in sentences]


def logged_steps(table: pa.Table, counts: dict[str, int]) -> dict[str, LoggedSteps]:
    """Return, by run, which steps it logged; runs that logged none are not in it."""
    step_N = table["step"].to_numpy() if table.num_rows else np.array([], dtype=np.int64)
    by_run, start = {}, 0
    for run, count in counts.items():
        own_T = step_N[start : start + count]
        start += count
        if count:
            gap_T = np.diff(own_T)
            # The first distance is one short, and the last may be anything.
            usual = int(gap_T[1:-1].min()) if len(gap_T) > 2 else None
            by_run[run] = LoggedSteps(int(own_T[0]), int(own_T[-1]), int(gap_T.max()) if len(gap_T) else 0, usual)
    return by_run


def other_than_planned(runs: pd.DataFrame, plan: Plan) -> dict[str, list[str]]:
    """Return, by run, where its status says another arm, loss or seed than the plan has under its content hash."""
    planned = {run.content_hash: run for run in plan.runs}
    names = ("arm", "loss", "seed")
    by_run: dict[str, list[str]] = {}
    for run, content_hash, *own in zip(*(runs[name] for name in ("run", "content_hash", *names)), strict=True):
        wanted = planned.get(content_hash)
        if wanted is not None:
            triples = zip(names, own, (wanted.arm, wanted.loss, wanted.seed), strict=True)
            sentences = [f"its status is of {name} {a}, the plan of {name} {b}" for name, a, b in triples if a != b]
            if sentences:
                by_run[run] = sentences
    return by_run


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
