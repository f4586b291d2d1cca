"""How what learns is held by the processes of a run: here each holds all of it; `fsdp` is the other way.

Whatever is held, the numbers are those of one process with the whole batch, up to rounding, so the choice belongs to a run's
identity as little as the number of processes does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from kv_align.models.adapter import Adapter
from kv_align.training.agreement import AlignmentGradNorm
from kv_align.training.step import Distiller, StepResult


class Reach(Protocol):
    """Gradient norm from the alignment loss alone into the student, see `kv_align.training.agreement.AlignmentGradNorm`."""

    def add(self, result: StepResult) -> None:
        """Add the gradient of one micro-batch."""

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Put sums over all processes in the place of this one's."""

    def norm(self) -> float:
        """Return the Euclidean norm over all parameters."""


class Parallel(ABC):
    """Gives a distiller to the processes of a run, and gets it back.

    Attributes
    ----------
    accelerator
        Knows the processes.
    """

    accelerator: Accelerator

    @abstractmethod
    def for_evaluation(self, distiller: Distiller, adapter: Adapter | None) -> tuple[Distiller, Adapter | None]:
        """Return what is evaluated and written in the place of a distiller, which is not yet prepared, and its adapter."""

    @abstractmethod
    def full_weights(self) -> AbstractContextManager[None]:
        """Context in which what `for_evaluation` returned has the trained weights; all processes enter it together."""

    @abstractmethod
    def prepare(self, distiller: Distiller, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Return what is called in training in the place of a distiller, and the optimizer of its parameters."""

    @abstractmethod
    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Context of a micro-batch that is not the last of its step: gradients need not meet yet."""

    @abstractmethod
    def reach(self, student: nn.Module) -> Reach:
        """Return what measures how far the alignment loss reaches into the student in one step."""

    @abstractmethod
    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients of some parameters to a common norm of `limit` at most; returns the norm before that."""


class DDP(Parallel):
    """Every process holds all of it (DDP), or there is one process.

    Parameters
    ----------
    options
        Of the accelerator.
    """

    def __init__(self, **options: Any) -> None:
        self.accelerator = Accelerator(**options)

    def for_evaluation(self, distiller: Distiller, adapter: Adapter | None) -> tuple[Distiller, Adapter | None]:
        """Return the two themselves."""
        return distiller, adapter

    def full_weights(self) -> AbstractContextManager[None]:
        """Context that does nothing."""
        return nullcontext()

    def prepare(self, distiller: Distiller, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Wrap the distiller."""
        wrapped, prepared = self.accelerator.prepare(distiller, optimizer)
        return wrapped, prepared

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Context in which each process adds to its own gradients."""
        context: AbstractContextManager[None] = self.accelerator.no_sync(wrapped)
        return context

    def reach(self, student: nn.Module) -> Reach:
        """Return a measure that differentiates with respect to the student's parameters."""
        return AlignmentGradNorm(student)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients that are the same in all processes."""
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
        return norm
