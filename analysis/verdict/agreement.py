"""Exact match: seeds decide, examples describe. The secondary outcome, tested only when the primary test passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.stats.checks import FloatArray
from analysis.stats.outcomes import CrossedMean, McNemarResult, crossed_mean, mcnemar
from analysis.verdict.comparison import ArmComparison


@dataclass(frozen=True, eq=False)
class Agreement:
    """Two arms on the same examples, over the seeds that they were paired by.

    Attributes
    ----------
    table
        (2, 2) counts of (seed, example): rows solved or not by the arm, columns by what it is compared with.
    num_seeds, num_examples
        What the counts are of.
    checkpoints
        McNemar over all of them: it speaks of these checkpoints only.
    method
        Seeds and examples both as drawn; None with fewer than two of either.
    """

    table: FloatArray
    num_seeds: int
    num_examples: int
    checkpoints: McNemarResult
    method: CrossedMean | None


def agreement(
    outcomes: pd.DataFrame, comparison: ArmComparison, runs: dict[tuple[str, str, int], str]
) -> Agreement | None:
    """Compare which examples two arms solve.

    Parameters
    ----------
    outcomes
        `run`, `split`, `id`, `correct`.
    comparison
        Its pairs say which seeds count.
    runs
        The run of each (arm, group, seed).

    Returns
    -------
    None where no example was answered by both.
    """
    answered = outcomes[outcomes["correct"].notna()]
    by_run = {
        run: pd.Series(
            answers["correct"].astype(bool).to_numpy(),
            index=pd.MultiIndex.from_frame(answers[["split", "id"]].astype(str)),
        )
        for run, answers in answered.groupby("run", observed=True)
    }
    ours, theirs = [], []
    for seed, finished in zip(comparison.pairs.seeds, comparison.pairs.finished, strict=True):
        a = by_run.get(runs.get((*comparison.arm, seed), ""))
        b = by_run.get(runs.get((*comparison.against, seed), ""))
        if finished and a is not None and b is not None:
            ours.append(a[~a.index.duplicated()])
            theirs.append(b[~b.index.duplicated()])
    if not ours:
        return None
    common = ours[0].index
    for answers in (*ours[1:], *theirs):
        common = common.intersection(answers.index)
    if len(common) == 0:
        return None
    ours_SI = np.stack([answers.loc[common].to_numpy() for answers in ours])
    theirs_SI = np.stack([answers.loc[common].to_numpy() for answers in theirs])
    table = np.array(
        [
            [(ours_SI & theirs_SI).sum(), (ours_SI & ~theirs_SI).sum()],
            [(~ours_SI & theirs_SI).sum(), (~ours_SI & ~theirs_SI).sum()],
        ],
        dtype=np.float64,
    )
    enough = min(ours_SI.shape) >= 2
    differences_SI = ours_SI.astype(np.float64) - theirs_SI.astype(np.float64)
    method = crossed_mean(differences_SI) if enough else None
    return Agreement(table, len(ours), len(common), mcnemar(table), method)
