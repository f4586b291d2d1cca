"""The optimizer and its learning rates, the same in every arm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from kv_align.config.config import TrainerConfig, warmup_of
from kv_align.training.step import Distiller


def make_optimizer(distiller: Distiller, trainer: TrainerConfig) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019); the aligner has its own rate; biases, norms, factors and rotations no decay."""
    groups: list[dict[str, Any]] = []
    for module, rate in ((distiller.student, trainer.lr), (distiller.trainable_projection, trainer.aligner_lr)):
        if module is None or rate is None:  # nothing is aligned, or the aligner is frozen
            continue
        named = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        # An aligner's biases are stacked over layers, so their names tell what their dimensions do not.
        vectors = [each for name, each in named if each.dim() <= 1 or any(part in name for part in _WITHOUT_DECAY)]
        matrices = [each for _, each in named if all(each is not vector for vector in vectors)]
        groups += [
            {"params": matrices, "lr": rate, "weight_decay": trainer.weight_decay},
            {"params": vectors, "lr": rate, "weight_decay": 0.0},
        ]
    filled = [group for group in groups if group["params"]]
    devices = {each.device.type for group in filled for each in group["params"]}
    return AdamW(filled, fused=devices <= _FUSED)


_WITHOUT_DECAY = ("bias", "elastic", "parametrizations")

# Where PyTorch updates all parameters in one kernel: a dozen for each of them elsewhere, and three times the time on a CPU.
_FUSED = {"cpu", "cuda"}


def make_schedule(optimizer: Optimizer, trainer: TrainerConfig, num_steps: int) -> LRScheduler:
    """Return the schedule of all rates: a linear warm-up from 0, then constant, or falling to 0 at the last step."""
    fall, warmup = _FALLS[trainer.lr_schedule], warmup_of(trainer.warmup_steps, num_steps)
    after = max(1, num_steps - warmup)

    def factor(step: int) -> float:
        return step / warmup if step < warmup else fall((step - warmup) / after, (num_steps - step) / after)

    return LambdaLR(optimizer, factor)


# By the shares of the steps after the warm-up that are done and left. They are those of `transformers.get_scheduler`,
# whose module imports PEFT and bitsandbytes wherever these are installed: longer than all the rest of a run's start.
_FALLS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda done, left: 1.0,
    "linear": lambda done, left: max(0.0, left),
    "cosine": lambda done, left: max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))),
}
