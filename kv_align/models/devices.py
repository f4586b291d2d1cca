"""Models that a `device_map` has spread over devices, memory and disk, as Accelerate's hooks run them.

A hook brings a module's weights to the device that runs it and takes them away again behind it; in between they are on
no device at all. A model without hooks is where its parameters are, and all of this leaves it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

_OUT_OF_MEMORY = (
    *("CUDA error: out of memory", "CUDA driver error: out of memory", "CUDA out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED"),
    "DefaultCPUAllocator: can't allocate memory",
)
"""What the libraries below torch say when they get no memory; cuBLAS has none for its handle then."""


def is_spread(model: nn.Module) -> bool:
    """Whether a model is on more than one device, or on the disk."""
    return hasattr(model, "_hf_hook")


def device_of(model: PreTrainedModel) -> torch.device:
    """Return where a model takes its inputs and gives its logits."""
    for hook in _hooks(model):
        return torch.device(hook.execution_device)
    device: torch.device = model.device
    return device


@contextmanager
def present(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have some modules' own weights where these run, for what uses them without calling the modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield


def stored(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a number of a model's state, read from where it is kept if it is on no device."""
    kept: Tensor = load_offloaded_parameter(model, name) if tensor.is_meta else tensor
    return kept


def put_back(model: nn.Module) -> None:
    """Take away the weights that a forward pass had brought to their device when an exception ended it."""
    if not is_spread(model):
        return
    for module in model.modules():
        for hook in _hooks(module):
            if hook.offload and not all(each.is_meta for each in module.parameters(recurse=False)):
                hook.post_forward(module, None)


def memory_gb(device: torch.device) -> tuple[float, float] | tuple[None, None]:
    """Return what this process has had of a GPU's memory at most, and what that has; of another device nothing is known."""
    if device.type != "cuda":
        return None, None
    whole = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_reserved(device) / 1e9, whole / 1e9


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was out: torch has an exception of its own for its allocator, and others for the libraries'."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
