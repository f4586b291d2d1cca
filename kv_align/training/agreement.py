"""How well student and projected teacher agree, and whether the agreement is worth anything.

Everything is a masked sum over tokens, so that it can be collected over micro-batches. Cosine is blind to magnitude and
seen through each arm's own aligner, so norm ratio and variances stand beside it: a variance under 1 % of its start is a
*collapse*, whatever the cosine says.

Axes: L student layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from kv_align.losses.comparison import Comparison, StateComparison
from kv_align.training.step import StepResult

COLLAPSE_BELOW = 0.01
"""A target's or student's variance under this share of its start is a collapse."""


@dataclass(frozen=True)
class KindAgreement:
    """Agreement of one kind (keys or values).

    Attributes
    ----------
    cosine
        [L, H], mean over tokens.
    norm_ratio
        [L, H], the student's mean norm over the target's.
    target_variance, student_variance
        [L], over tokens, mean over heads and head width.
    """

    cosine: Tensor
    norm_ratio: Tensor
    target_variance: Tensor
    student_variance: Tensor

    def row(self, kind: str) -> dict[str, object]:
        """Columns for the metrics file; `kind` is `key` or `value`."""
        return {
            f"cosine_{kind}": self.cosine.mean().item(),
            f"norm_ratio_{kind}": self.norm_ratio.mean().item(),
            f"cosine_{kind}_by_layer": self.cosine.mean(dim=1).tolist(),
            f"target_variance_{kind}": self.target_variance.tolist(),
            f"student_variance_{kind}": self.student_variance.tolist(),
        }


@dataclass
class _Sums:
    count: Tensor
    cosine: Tensor
    student_norm: Tensor
    target_norm: Tensor
    moments: dict[str, tuple[Tensor, Tensor]]


@dataclass
class Agreement:
    """Collects agreement over micro-batches."""

    _sums: dict[str, _Sums] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, comparison: Comparison) -> None:
        """Add one micro-batch; does nothing where nothing is aligned."""
        states = comparison.find(StateComparison)
        if states is None:
            return
        student, target = states.student, states.target
        for kind, ours, theirs in (("key", student.k, target.k), ("value", student.v, target.v)):
            new = _sums(ours.float(), theirs.float(), comparison.aligned)
            old = self._sums.get(kind)
            self._sums[kind] = new if old is None else _add(old, new)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Put sums over all processes in the place of this one's."""
        self._sums = {kind: _over_processes(sums, total) for kind, sums in self._sums.items()}

    def result(self) -> dict[str, KindAgreement]:
        """By kind; empty where nothing was added."""
        return {kind: _quality(sums) for kind, sums in self._sums.items()}


def variance(states: Float[Tensor, "b l h t d"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " l"]:
    """Variance over valid tokens of each number, averaged over heads and head width, per layer."""
    count = mask.sum().clamp(min=1)
    first, second = _moments(states.float(), mask)
    return (second / count - (first / count).square()).mean(dim=(1, 2))


def collapsed(start: dict[str, list[float]], now: dict[str, KindAgreement]) -> list[str]:
    """Name what collapsed.

    Parameters
    ----------
    start
        `target_variance_key`, ... by layer, at the run's first step.
    now
        The present quality.
    """
    collapses = []
    for kind, quality in now.items():
        for whose, values in (("target", quality.target_variance), ("student", quality.student_variance)):
            name = f"{whose}_variance_{kind}"
            for layer, (before, after) in enumerate(zip(start[name], values.tolist(), strict=True)):
                if after < COLLAPSE_BELOW * before:
                    collapses.append(f"{whose} {kind} variance of layer {layer} is {after / before:.1%} of its start")
    return collapses


def start_variances(quality: dict[str, KindAgreement]) -> dict[str, list[float]]:
    """What `collapsed` compares with later."""
    return {
        f"{whose}_variance_{kind}": values.tolist()
        for kind, each in quality.items()
        for whose, values in (("target", each.target_variance), ("student", each.student_variance))
    }


def _moments(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over valid tokens of the numbers and of their squares, [L, H, D]."""
    masked = torch.where(mask[:, None, None, :, None], states, 0.0).double()
    return masked.sum(dim=(0, 3)), masked.square().sum(dim=(0, 3))


def _sums(student: Tensor, target: Tensor, mask: Tensor) -> _Sums:
    def over_tokens(per_token_BLHT: Tensor) -> Tensor:
        return torch.where(mask[:, None, None, :], per_token_BLHT, 0.0).double().sum(dim=(0, 3))

    return _Sums(
        mask.sum(),
        over_tokens(F.cosine_similarity(student, target, dim=-1)),
        over_tokens(student.norm(dim=-1)),
        over_tokens(target.norm(dim=-1)),
        {"student": _moments(student, mask), "target": _moments(target, mask)},
    )


def _add(a: _Sums, b: _Sums) -> _Sums:
    moments = {
        whose: (a.moments[whose][0] + b.moments[whose][0], a.moments[whose][1] + b.moments[whose][1])
        for whose in a.moments
    }
    return _Sums(
        a.count + b.count,
        a.cosine + b.cosine,
        a.student_norm + b.student_norm,
        a.target_norm + b.target_norm,
        moments,
    )


def _over_processes(sums: _Sums, total: Callable[[Tensor], Tensor]) -> _Sums:
    moments = {whose: (total(first), total(second)) for whose, (first, second) in sums.moments.items()}
    return _Sums(total(sums.count), total(sums.cosine), total(sums.student_norm), total(sums.target_norm), moments)


def _quality(sums: _Sums) -> KindAgreement:
    count = sums.count.clamp(min=1)
    variances = {
        whose: (second / count - (first / count).square()).mean(dim=(1, 2)).clamp(min=0)
        for whose, (first, second) in sums.moments.items()
    }
    return KindAgreement(
        (sums.cosine / count).cpu(),
        (sums.student_norm / sums.target_norm.clamp(min=1e-12)).cpu(),
        variances["target"].cpu(),
        variances["student"].cpu(),
    )


class AlignmentGradNorm:
    """Gradient norm from the alignment loss alone into the student, over the micro-batches of a step."""

    def __init__(self, student: torch.nn.Module) -> None:
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    def add(self, result: StepResult) -> None:
        """Add the gradient of one micro-batch's alignment loss; the graph stays for the backward that follows."""
        if not result.alignment.requires_grad:
            return
        gradients = torch.autograd.grad(result.alignment, self._parameters, retain_graph=True, allow_unused=True)
        for place, gradient in enumerate(gradients):
            before = self._sums[place]
            if gradient is not None:
                self._sums[place] = gradient if before is None else before + gradient

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Put sums over all processes in the place of this one's; what reached one of them reached all."""
        self._sums = [None if gradient is None else total(gradient) for gradient in self._sums]

    def norm(self) -> float:
        """Return the Euclidean norm over all parameters; 0 where nothing reached the student."""
        squares = [gradient.float().square().sum() for gradient in self._sums if gradient is not None]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
