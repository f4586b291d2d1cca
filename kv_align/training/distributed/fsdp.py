"""Every process holds a part of what learns: parameters, gradients and optimizer state (FSDP2, through Accelerate).

The student's blocks are gathered one at a time, forward and backward, and what is in none of them (embeddings, head,
aligner) once a step; the frozen teacher stays whole in every process, since reading it ends in the middle of a forward pass
(`kv_align.models.capture.recorder.record`). Weights are gathered in float32 and rounded where autocast does it in one
process, so bfloat16 means the same here as there; copies in bfloat16 then wait for the backward pass, unless
model.gradient_checkpointing makes them again.

Evaluation, generation and writing use a plain copy of the student and the aligner that is filled for their duration: a whole
student and aligner in float32 more in every process, 4 bytes a parameter, and none while training. So nothing of theirs
knows of shards, and no process waits for another in the middle of an answer. Loading takes as much: a model is whole until
it is shared out.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kv_align.models.adapter import Adapter
from kv_align.training.distributed.ddp import Parallel, Reach
from kv_align.training.step import Distiller, StepResult


class FSDP(Parallel):
    """Shards over all processes of the run, of which there are several.

    Parameters
    ----------
    kwargs_handlers, options
        Of the accelerator.
    """

    def __init__(self, *, kwargs_handlers: list[Any], **options: Any) -> None:
        self._plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            mixed_precision_policy=MixedPrecisionPolicy(),  # none: autocast does it
            state_dict_type="SHARDED_STATE_DICT",
            # Or all processes but the first would load models without their weights.
            cpu_ram_efficient_loading=False,
        )
        # Kept for reuse, every block's rounded weights would stay until the end of the forward pass.
        handlers = [*kwargs_handlers, AutocastKwargs(cache_enabled=False)]
        self.accelerator = Accelerator(fsdp_plugin=self._plugin, kwargs_handlers=handlers, **options)
        # It is told to later accelerators and to transformers by the environment; a later run may want none of it.
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU:  # where Accelerate takes no plugin, but torch shards
            state.fsdp_plugin = self._plugin
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self._copy: Distiller | None = None
        self._parameters: list[nn.Parameter] = []

    def for_evaluation(self, distiller: Distiller, adapter: Adapter | None) -> tuple[Distiller, Adapter | None]:
        """Return a copy whose parameters take no memory, with an adapter of the copy."""
        empty = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            for parameter in distiller.parameters()
        }
        self._copy, adapter = copy.deepcopy((distiller, adapter), empty)
        return self._copy, adapter

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Context in which the copy holds the whole weights."""
        assert self._copy is not None
        copies = list(self._copy.parameters())
        whole = [nn.Parameter(_whole(each.detach()), each.requires_grad) for each in self._parameters]
        _swap(copies, whole)
        try:
            yield
        finally:
            _swap(copies, whole)

    def prepare(self, distiller: Distiller, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Shard the distiller, block by block of the student."""
        classes = {type(module).__name__ for module in distiller.student.modules()}
        self._plugin.transformer_cls_names_to_wrap = sorted(
            classes.intersection(distiller.student._no_split_modules or ())
        )
        wrapped, prepared = self.accelerator.prepare(distiller, optimizer)
        self._parameters = list(wrapped.parameters())
        return wrapped, prepared

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Context that does nothing: kept apart, gradients would be whole in every process, so they meet every time."""
        return nullcontext()

    def reach(self, student: nn.Module) -> Reach:
        """Return a measure on shards."""
        return ShardedReach(student, self._parameters, self.accelerator.num_processes)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale shards by the norm of the whole."""
        return _whole(self.accelerator.clip_grad_norm_(parameters, limit))


class ShardedReach:
    """Gradient norm from the alignment loss alone into a sharded student, over the micro-batches of a step.

    Parameters
    ----------
    student
        The module whose parameters are meant.
    parameters
        All that learn, sharded.
    number
        Of processes.
    """

    def __init__(self, student: nn.Module, parameters: list[nn.Parameter], number: int) -> None:
        self._all, self._number = parameters, number
        self._student = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._sums: list[Tensor | None] = [None] * len(self._student)

    def add(self, result: StepResult) -> None:
        """Add the gradient of one micro-batch; what was added up for the step before stays as it was.

        A backward pass through shards gathers a block when a gradient reaches the block's output. The alignment loss takes
        keys and values from inside the last block, so a gradient of zero is sent in at the top, which reaches all outputs.
        """
        if not result.alignment.requires_grad:
            return
        before = [parameter.grad for parameter in self._all]
        for parameter in self._all:
            parameter.grad = None
        alignment = result.alignment * self._number + 0.0 * result.comparison.predictions.states.sum()
        alignment.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        for place, parameter in enumerate(self._student):
            earlier, gradient = self._sums[place], parameter.grad
            if gradient is not None:
                self._sums[place] = gradient if earlier is None else earlier + gradient
        for parameter, gradient in zip(self._all, before, strict=True):
            parameter.grad = gradient

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Do nothing: gradients met in the backward pass."""

    def norm(self) -> float:
        """Return the Euclidean norm over all parameters; 0 where nothing reached the student."""
        gradients = [gradient for gradient in self._sums if gradient is not None]
        return float(_whole(nn.utils.get_total_norm(gradients))) if gradients else 0.0


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _swap(some: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    """Exchange parameters in place: whatever refers to one of them, as tied ones do twice, then has the other."""
    for one, other in zip(some, others, strict=True):
        torch.utils.swap_tensors(one, other)  # type: ignore[no-untyped-call]
