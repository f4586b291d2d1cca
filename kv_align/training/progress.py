"""How far a run has come, as its checkpoints keep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What the loop carries from step to step; goes into every checkpoint.

    Attributes
    ----------
    step
        Optimizer steps done.
    tokens
        Student tokens seen.
    elapsed_s
        Time spent in steps, over all attempts.
    start
        Variances at the first step, by name and layer: what a collapse is measured against.
    collapses
        What has collapsed so far, each named once.
    evaluation_due
        Whether the evaluation of this step is still to be made: the run was asked to leave in the middle of it.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    start: dict[str, list[float]] = field(default_factory=dict)
    collapses: list[str] = field(default_factory=list)
    evaluation_due: bool = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the step."""
        return {
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "start": self.start,
            "collapses": self.collapses,
            "evaluation_due": self.evaluation_due,
        }
