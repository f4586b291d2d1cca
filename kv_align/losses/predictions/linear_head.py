"""Losses of next-token predictions from the hidden states before a model's head: logits are made some rows at a time.

Logits are the largest tensor of a step, and all that is wanted of them is a softmax. A `RowLoss` knows its gradient by
logits in closed form, so nothing of their size is kept but, where there is room, the products of hidden states and head
themselves; where there is not, these are made anew in the backward pass.

Axes: N rows (places that predict a scored token), H hidden width, V vocabulary, K losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.utils import ModelOutput

from kv_align.models.head import Bend, Head


@dataclass(frozen=True)
class Budget:
    """How much of the logits a device holds.

    Attributes
    ----------
    at_once
        Logits whose softmax is held at once: on a CPU what stays in its cache, on a GPU what hides a kernel's price.
    kept_bytes
        Of products of hidden states and head that wait for the backward pass; beyond, all of them are made twice.
    """

    at_once: int
    kept_bytes: int


BUDGETS = {"cpu": Budget(2**21, 2**30), "cuda": Budget(2**26, 2**31)}
"""By the type of the device. They do not depend on what is free, so that a run is rounded alike at every attempt."""


def budget_of(device: torch.device) -> Budget:
    """Return what a device has room for; an accelerator that is not listed is taken for a GPU."""
    return BUDGETS.get(device.type, BUDGETS["cuda"])


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at some places.

    Attributes
    ----------
    states
        [N, H], hidden states; or [N, V], logits, of a model that makes them itself.
    head
        Makes logits of hidden states; None where they are logits.
    """

    states: Float[Tensor, "n w"]
    head: Head | None = None

    def at(self, places: Int[Tensor, " m"]) -> Predictions:
        """Return those at some of the places."""
        return Predictions(self.states.index_select(0, places), self.head)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are logits of."""
        return self.states.shape[1] if self.head is None else self.head.linear.out_features

    @property
    def precision(self) -> torch.dtype:
        """What the head computes in: as autocast has it here, or as its inputs come."""
        kind = self.states.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.states.dtype

    @property
    def can_be_kept(self) -> bool:
        """Whether the device has room for all logits until the backward pass."""
        needed = self.states.shape[0] * self.vocabulary * self.precision.itemsize
        return needed <= budget_of(self.states.device).kept_bytes

    @torch.no_grad()
    def logits_by_rows(self) -> Callable[[slice], Float[Tensor, "n v"]]:
        """Return what gives the logits of some rows, at least in float32, without gradient; wherever it is called later."""
        if self.head is None:
            return lambda rows: _wide(self.states[rows])
        # An accelerator's autocast ends before the backward pass, which makes these logits again.
        bend, linear = self.head.bend, self.head.linear
        if self.can_be_kept:
            products = F.linear(self.states, linear.weight, linear.bias)
            return lambda rows: bend.logits(_wide(products[rows]))
        made = _products([_cast(each, self.precision) for each in (self.states, linear.weight, linear.bias)])
        return lambda rows: bend.logits(_wide(made(rows)))


def predictions_of(output: ModelOutput, head: Head | None) -> Predictions:
    """Return what a model's output predicts at all its tokens in a row: of its base model's output, by the head."""
    return Predictions(output["logits" if head is None else "last_hidden_state"].flatten(0, 1), head)


def slices(predictions: Predictions) -> list[slice]:
    """Cut rows into as many at a time as the budget has room for."""
    count = predictions.states.shape[0]
    at_once = max(1, budget_of(predictions.states.device).at_once // predictions.vocabulary)
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]


class RowLoss(ABC):
    """A loss of each row of logits."""

    @abstractmethod
    def values(self, logits: Float[Tensor, "n v"], rows: slice) -> Float[Tensor, " n"]:
        """Return the losses of some rows, given their logits."""

    @abstractmethod
    def gradient(
        self, logits: Float[Tensor, "n v"], rows: slice, upstream: Float[Tensor, "n 1"]
    ) -> Float[Tensor, "n v"]:
        """Return the gradient by these logits, given that by the losses; a tensor that may be changed."""


def row_losses(predictions: Predictions, losses: Sequence[RowLoss]) -> Float[Tensor, "k n"]:
    """Return losses of each row, at least in float32, with gradients by hidden states, weight and bias (or by logits).

    Parameters
    ----------
    predictions
        Of the model that learns.
    losses
        All that is made of them: together they cost the logits once.
    """
    states, head = predictions.states, predictions.head
    passed = (losses, slices(predictions))
    if head is None:
        values = cast(Any, _OfProducts).apply(states, Bend(), *passed)
    elif torch.is_grad_enabled() and predictions.can_be_kept:
        products = F.linear(states, head.linear.weight, head.linear.bias)
        values = cast(Any, _OfProducts).apply(products, head.bend, *passed)
    else:
        linear = head.linear
        values = cast(Any, _OfStates).apply(
            states, linear.weight, linear.bias, predictions.precision, head.bend, *passed
        )
    return cast(Tensor, values)


class _OfProducts(torch.autograd.Function):
    """Losses of the head's products, which are there and stay."""

    @staticmethod
    def forward(
        ctx: Any, products_NV: Tensor, bend: Bend, losses: Sequence[RowLoss], rows: list[slice]
    ) -> Float[Tensor, "k n"]:
        ctx.save_for_backward(products_NV)
        ctx.losses = _LossesByRows(products_NV.shape[0], rows, bend, losses)
        values: Tensor = ctx.losses.values(products_NV.__getitem__, products_NV)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_KN: Tensor) -> tuple[Tensor | None, ...]:
        (products_NV,) = ctx.saved_tensors
        gradient_NV = torch.empty_like(products_NV)
        for rows, by_products in ctx.losses.gradients(products_NV.__getitem__, upstream_KN):
            gradient_NV[rows] = by_products
        return gradient_NV, None, None, None


class _OfStates(torch.autograd.Function):
    """Losses of products that are made of hidden states, some rows at a time, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        states_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        precision: torch.dtype,
        bend: Bend,
        losses: Sequence[RowLoss],
        rows: list[slice],
    ) -> Float[Tensor, "k n"]:
        given = (states_NH, weight_VH, bias_V)
        ctx.dtypes = [None if each is None else each.dtype for each in given]
        ctx.losses = _LossesByRows(states_NH.shape[0], rows, bend, losses)
        head = [_cast(each, precision) for each in given]
        ctx.save_for_backward(*head)
        values: Tensor = ctx.losses.values(_products(head), states_NH)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_KN: Tensor) -> tuple[Tensor | None, ...]:
        states_NH, weight_VH, bias_V = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # What chunks add to is float32 also where the products are not.
        by_states = torch.empty_like(states_NH) if wants_states else None
        by_weight = torch.zeros_like(weight_VH, dtype=upstream_KN.dtype) if wants_weight else None
        by_bias = torch.zeros_like(bias_V, dtype=upstream_KN.dtype) if wants_bias else None
        for rows, by_products in ctx.losses.gradients(_products(ctx.saved_tensors), upstream_KN):
            rounded = by_products.to(states_NH.dtype)
            if by_states is not None:
                torch.mm(rounded, weight_VH, out=by_states[rows])
            if by_weight is not None and by_weight.dtype == rounded.dtype:
                by_weight.addmm_(rounded.T, states_NH[rows])
            elif by_weight is not None:
                by_weight.add_(torch.mm(rounded.T, states_NH[rows]))
            if by_bias is not None:
                by_bias.add_(by_products.sum(dim=0))
        gradients = zip((by_states, by_weight, by_bias), ctx.dtypes, strict=True)
        return *(None if each is None else each.to(dtype) for each, dtype in gradients), None, None, None, None


class _LossesByRows:
    """Losses of some rows at a time, and their gradients by the head's products."""

    def __init__(self, count: int, slices: list[slice], bend: Bend, losses: Sequence[RowLoss]) -> None:
        self._count, self._slices, self._bend, self._losses = count, slices, bend, losses

    def values(self, products: Callable[[slice], Tensor], like: Tensor) -> Float[Tensor, "k n"]:
        values_KN = _wide(like.new_empty(len(self._losses), self._count))
        for rows in self._slices:
            logits = self._bend.logits(_wide(products(rows)))
            for place, loss in enumerate(self._losses):
                values_KN[place, rows] = loss.values(logits, rows)
        return values_KN

    def gradients(
        self, products: Callable[[slice], Tensor], upstream_KN: Tensor
    ) -> Iterator[tuple[slice, Float[Tensor, "n v"]]]:
        for rows in self._slices:
            logits = self._bend.logits(_wide(products(rows)))
            total, *others = (
                loss.gradient(logits, rows, upstream[rows, None])
                for loss, upstream in zip(self._losses, upstream_KN, strict=True)
            )
            for other in others:
                total.add_(other)
            yield rows, self._bend.pull_back(total, logits)


def _products(head: Sequence[Tensor | None]) -> Callable[[slice], Tensor]:
    """Return what makes the head's products of some rows: in the precision that states, weight and bias have."""
    states, weight, bias = head
    assert states is not None
    assert weight is not None

    def of_rows(rows: slice) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states[rows], weight, bias)

    return of_rows


def _cast(tensor: Tensor | None, precision: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(precision)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
