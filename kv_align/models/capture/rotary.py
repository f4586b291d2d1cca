"""The rotary embedding of a layer: applied, undone, and found out by asking the layer what it does to labelled angles.

A rotary embedding turns pairs of a head's numbers: with angles' cosines c and sines s, the pair (x, y) becomes
(x c - y s, y c + x s). Families differ in which numbers are pairs (halves of the head or neighbours), in how many are
turned, and in where a pair's c and s stand in what the layer is handed; `RotaryForm` is all of that, by number.

Axes: B batch, H heads, T tokens, D head width, R turned numbers, P probes or positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding that a layer applied at some positions.

    Attributes
    ----------
    cos, sin
        Of the angles, [B or 1, T, R]: those of the pairs' first numbers, then those of their second ones.
    order
        [D], the head's numbers in the order firsts, seconds, not turned; None where they stand so, in halves.
    """

    cos: Tensor
    sin: Tensor
    order: Int[Tensor, " d"] | None = None

    def is_same(self, other: object) -> bool:
        """Whether it is of the very same tensors; what is in them is not looked at."""
        return isinstance(other, Rotation) and (
            self.cos is other.cos and self.sin is other.sin and self.order is other.order
        )

    def rotate(self, states: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Rotate states of one layer."""
        return self._apply(states, self.cos, self.sin)

    def unrotate(self, states: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Undo `rotate`, also where cosines and sines carry a scale (YaRN's attention scaling)."""
        cos, sin = self.cos.float(), self.sin.float()
        square = cos.square() + sin.square()
        return self._apply(states, cos / square, -sin / square)

    def _apply(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.order is not None:
            states = states[..., self.order]
        width = cos.shape[-1]
        turned, rest = states[..., :width], states[..., width:]
        # At least in float32: a rotation mixes large numbers into small ones, which bf16 would round away.
        turned = turned.to(torch.promote_types(turned.dtype, torch.float32))
        first, second = turned.chunk(2, dim=-1)
        (cos_first, cos_second), (sin_first, sin_second) = (each[:, None].chunk(2, dim=-1) for each in (cos, sin))
        halves = (
            torch.addcmul(first * cos_first, second, sin_first, value=-1),
            torch.addcmul(second * cos_second, first, sin_second),
        )
        result = torch.cat(halves, dim=-1).to(states.dtype)
        if rest.shape[-1]:
            result = torch.cat((result, rest), dim=-1)
        return result if self.order is None else result[..., self.order.argsort()]


@dataclass(frozen=True)
class UnknownRotation:
    """Stands where a layer makes keys of positions in a way that is not known how to undo.

    Attributes
    ----------
    reason
        Why.
    """

    reason: str

    def rotate(self, states: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Refuse to."""
        raise ValueError(self.reason)

    def unrotate(self, states: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Refuse to."""
        raise ValueError(self.reason)


@dataclass(frozen=True)
class RotaryForm:
    """How a layer uses the cosines and sines that it is handed.

    Attributes
    ----------
    order
        As in `Rotation`.
    cos_at, sin_at
        [R], where in what is handed over the cosine and the sine of each turned number stand; None: in its own place.
    sin_first
        Whether sines are handed over before cosines (GPT-J's in transformers 5.24).
    """

    order: Int[Tensor, " d"] | None
    cos_at: Int[Tensor, " r"] | None
    sin_at: Int[Tensor, " r"] | None
    sin_first: bool = False

    def at(self, *handed: Tensor) -> Rotation:
        """Return the rotation by angles as the layer is handed them."""
        cos, sin = reversed(handed) if self.sin_first else handed
        cos = cos if self.cos_at is None else cos[..., self.cos_at]
        sin = sin if self.sin_at is None else sin[..., self.sin_at]
        return Rotation(cos, sin, self.order)


@dataclass(frozen=True)
class RotaryTable:
    """The rotary embedding of a layer that makes cosines and sines itself, at each position.

    Attributes
    ----------
    cos, sin
        [P, R], of each position; as in `Rotation`.
    order
        As in `Rotation`.
    """

    cos: Float[Tensor, "p r"]
    sin: Float[Tensor, "p r"]
    order: Int[Tensor, " d"] | None

    def at(self, positions: Int[Tensor, "b t"]) -> Rotation:
        """Return the rotation at some positions."""
        return Rotation(self.cos[positions], self.sin[positions], self.order)


def rotary_form(keys_under: Callable[[Tensor, Tensor], Tensor], handed: Float[Tensor, "b t r"]) -> RotaryForm | None:
    """Find out what a layer does with cosines and sines.

    It is handed zeros, ones and the bits of their own places instead of angles. What it makes of them is exact in any
    precision: a key's number is then itself, another one or its negative, or zero.

    Parameters
    ----------
    keys_under
        The layer's keys [P, H, T, D] of one input, under P cosines and sines [P, T, R].
    handed
        Real cosines, for their shape.

    Returns
    -------
    None where the layer turns nothing.

    Raises
    ------
    ValueError
        If it does anything but turn pairs of numbers.
    """
    width = handed.shape[-1]
    ones, zeros = torch.ones_like(handed[:1]), torch.zeros_like(handed[:1])
    places = torch.arange(width, device=handed.device)
    bits = [ones * (places >> bit & 1) for bit in range(max(1, (width - 1).bit_length()))]
    none = [zeros] * len(bits)
    keys = keys_under(torch.cat([ones, zeros, zeros, *bits, *none]), torch.cat([zeros, zeros, ones, *none, *bits]))
    plain, nothing, swapped, *labelled = keys.movedim(-1, 1).flatten(2)  # [D, H T] of each probe
    turned = (nothing != plain).any(dim=1).nonzero().flatten()
    if not len(turned):
        return None
    same = (swapped[turned, None] == plain).all(dim=2)
    negated = (swapped[turned, None] == -plain).all(dim=2)
    if nothing[turned].any() or not ((same ^ negated).sum(dim=1) == 1).all():
        raise ValueError("it does more than turn pairs of numbers")
    partner = (same | negated).int().argmax(dim=1)
    first = turned[negated.any(dim=1)]
    second = partner[negated.any(dim=1)]
    order = torch.cat((first, second))
    if not torch.equal(order.sort().values, turned) or not torch.equal(
        partner[torch.searchsorted(turned, second)], first
    ):
        raise ValueError("it does more than turn pairs of numbers")
    cos_at, sin_at = (
        sum((probe[order] == whole[order]).all(dim=1).long() << bit for bit, probe in enumerate(probes))
        for probes, whole in ((labelled[: len(bits)], plain), (labelled[len(bits) :], swapped))
    )
    rest = (nothing == plain).all(dim=1).nonzero().flatten()
    return RotaryForm(
        _unless_in_place(torch.cat((order, rest)), plain.shape[0]),
        _unless_in_place(cos_at, width),
        _unless_in_place(sin_at, width),
    )


def rotary_table(keys: Float[Tensor, "n h p d"]) -> RotaryTable:
    """Measure the rotary embedding of a layer that makes its cosines and sines itself.

    Parameters
    ----------
    keys
        The layer's keys, each of N tokens at every position from 0, where nothing is turned.

    Raises
    ------
    ValueError
        If it does anything but turn pairs of numbers.
    """
    keys_PND = keys.movedim(2, 0).flatten(1, 2).double()
    still_ND, allowed = keys_PND[0], 16 * torch.finfo(keys.dtype).eps * keys_PND.abs().max()
    turned = ((keys_PND - still_ND).abs().amax(dim=(0, 1)) > allowed).nonzero().flatten()
    # A turned pair keeps its length: what the square of one number gains, that of the other loses.
    gained = (keys_PND.square() - still_ND.square())[..., turned].flatten(0, 1)
    products = gained.T @ gained
    own = products.diagonal()
    together = own[:, None] + own + 2 * products
    partner = together.fill_diagonal_(torch.inf).argmin(dim=1)
    places = torch.arange(len(turned), device=keys.device)
    if not len(turned) or not torch.equal(partner[partner], places):
        raise ValueError("it does more than turn pairs of numbers")
    first, second = turned[places < partner], turned[partner[places < partner]]
    x, y, x_0, y_0 = keys_PND[..., first], keys_PND[..., second], still_ND[:, first], still_ND[:, second]
    square = (x_0.square() + y_0.square()).sum(dim=0)
    cos = (x * x_0 + y * y_0).sum(dim=1) / square
    sin = (y * x_0 - x * y_0).sum(dim=1) / square
    everything = torch.arange(keys.shape[-1], device=keys.device)
    order = torch.cat((first, second, everything[~torch.isin(everything, turned)]))
    cos, sin = (each.float().repeat(1, 2) for each in (cos, sin))
    return RotaryTable(cos, sin, _unless_in_place(order, keys.shape[-1]))


def _unless_in_place(places: Tensor, count: int) -> Tensor | None:
    return None if torch.equal(places, torch.arange(count, device=places.device)) else places
