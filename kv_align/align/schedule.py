"""Who learns from the alignment loss at which step: `align.fit`.

The student learns from the cross-entropy at every step in every arm; this concerns the other terms alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kv_align.config.config import AlignConfig


class Phase(NamedTuple):
    """Whether the alignment loss moves the student, and whether it moves the aligner, at one step."""

    student_learns: bool
    aligner_learns: bool


def joint(step: int, align: AlignConfig) -> Phase:
    """Both, always. The aligner can chase the student: watch the target variance."""
    return Phase(True, True)


def fit_then_freeze(step: int, align: AlignConfig) -> Phase:
    """The aligner alone for `fit_steps` steps, then the student alone."""
    assert align.fit_steps is not None
    fitting = step < align.fit_steps
    return Phase(not fitting, fitting)


def alternate(step: int, align: AlignConfig) -> Phase:
    """The aligner for `period` steps, the student for `period` steps, and so on."""
    assert align.period is not None
    fitting = (step // align.period) % 2 == 0
    return Phase(not fitting, fitting)


def frozen(step: int, align: AlignConfig) -> Phase:
    """Control: the aligner stays as it starts."""
    return Phase(True, False)


FITS: dict[str, Callable[[int, AlignConfig], Phase]] = {
    each.__name__: each for each in (joint, fit_then_freeze, alternate, frozen)
}


def phase_at(step: int, align: AlignConfig | None) -> Phase:
    """Return the phase of a step (from 0); where nothing is aligned it does not matter."""
    return Phase(True, True) if align is None else FITS[align.fit](step, align)
