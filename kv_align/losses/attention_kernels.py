"""The divergence of two attentions by attention kernels alone: a GPU's way to what `attention_divergence` makes in chunks.

With scaled dot products s_t, s_s of the target and the student, biased and masked alike, c the scaling, P the weights and
lse the logsumexp of each query's scores,

    KL(P_t || P_s) = c q_t . (P_t k_t) - c q_s . (P_t k_s) - lse_t + lse_s,

so it is made of attention calls whose values are keys. Its gradients are too. A call's own backward, handed `c q_t` (and
`-c q_s` for the call with the values k_s) as gradients by its outputs, forms `P_t (d - sum P_t d)` with `d = s_t - s_s`:
the derivative of the divergence by s_t, whence its gradients by q_t and k_t. The student's are `c (P_s k_s - P_t k_s)` and
`c (P_s' q_s - P_t' q_s)`, and products with P' are gradients by values. No tensor of T x T is made here.

Axes: N layers and batch together (layers first), B batch, L layers, H query heads, K key heads, T tokens, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from kv_align.models.capture.attention import AttentionSpec

_NOT_SEEN = -1e30
_AT_ONCE_BYTES = 2**30
"""What layers that share a call may need together."""
_TENSORS = 14
"""Tensors of the queries' size that are held at once, at most."""


class Call(NamedTuple):
    """What a kernel is called with.

    Attributes
    ----------
    q, k, v
        [N, H, T, D], all of the same heads.
    bias
        [N, H or 1, 1, T], what each key adds to its scores.
    scaling, window
        As in `AttentionSpec`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    scaling: float
    window: int | None


class Attended(NamedTuple):
    """What a kernel's forward pass gives, and its backward pass wants back.

    Attributes
    ----------
    output
        [N, H, T, D].
    logsumexp
        [N, H, T] or longer: what stands behind T means nothing.
    """

    output: Tensor
    logsumexp: Tensor


class AttentionKernel(ABC):
    """Causal softmax attention, and the two passes of it as functions."""

    @abstractmethod
    def forward(self, call: Call) -> Attended:
        """Attend."""

    @abstractmethod
    def backward(self, by_output: Tensor, call: Call, attended: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients by q, k and v."""


class MemoryEfficient(AttentionKernel):
    """PyTorch's memory-efficient kernel, which is the one that takes float32."""

    def forward(self, call: Call) -> Attended:
        """Attend."""
        output, logsumexp, *_ = torch.ops.aten._efficient_attention_forward(
            *(_tokens_first(each) for each in call[:3]),
            _of_all_queries(call),
            *(None, None, None, None),  # of packed sequences
            0.0,  # dropped
            _CAUSAL,
            True,  # with logsumexp
            scale=call.scaling,
            window_size=call.window,
        )
        return Attended(_tokens_first(output), logsumexp)

    def backward(self, by_output: Tensor, call: Call, attended: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients by q, k and v."""
        length, no_draws = call.q.shape[2], torch.empty((), dtype=torch.int64, device=call.q.device)
        by_q, by_k, by_v, _ = torch.ops.aten._efficient_attention_backward(
            *(_tokens_first(each) for each in (by_output, *call[:3])),
            _of_all_queries(call),
            _tokens_first(attended.output),
            *(None, None),  # of packed sequences
            *(length, length),
            attended.logsumexp,
            0.0,  # dropped
            *(no_draws, no_draws),
            _CAUSAL,
            False,  # no gradient by the bias
            scale=call.scaling,
            window_size=call.window,
        )
        return _tokens_first(by_q), _tokens_first(by_k), _tokens_first(by_v)


_CAUSAL = 1  # from the top left
_ALIGNED = 16  # to what the kernel wants rows of a bias to be


def _tokens_first(states: Tensor) -> Tensor:
    return states.transpose(1, 2)


def _of_all_queries(call: Call) -> Tensor:
    """View one row of biases as all of them, with strides as the kernel wants them."""
    length = call.q.shape[2]
    padded = F.pad(call.bias, (0, -length % _ALIGNED))[..., :length]
    return padded.expand(*call.q.shape[:3], length)


KERNELS: dict[str, AttentionKernel] = {"cuda": MemoryEfficient()}
"""By the type of the device. A CPU has none: there chunks, which stay in its cache, are faster."""


def kernel_for(device: torch.device, forms: Sequence[AttentionSpec]) -> AttentionKernel | None:
    """Return the kernel that computes a divergence of such attentions; None where chunks have to."""
    plain = all(form.cap is None and form.sinks is None for form in forms)
    return KERNELS.get(device.type) if plain else None


def divergence_by_kernel(
    kernel: AttentionKernel,
    states: Sequence[Float[Tensor, "b l _ t d"]],
    mask: Bool[Tensor, "b t"],
    forms: Sequence[AttentionSpec],
    wanted: tuple[bool, bool],
    weight: Float[Tensor, "b t"] | None = None,
) -> tuple[Float[Tensor, ""], list[Tensor | None]]:
    """Return the sum over layers and queries of the mean over heads of KL(target || student), and its gradients.

    Parameters
    ----------
    kernel
        What attends.
    states
        The student's queries and keys, the target's queries and keys.
    mask
        True at tokens that count, as query and as key.
    forms
        How each layer weighs keys.
    wanted
        Whether gradients by the student's states are asked for, and by the target's.
    weight
        Of each query token in the sum; None: 1.

    Returns
    -------
    The sum, and gradients by the four states (None where not asked for), both at least in float32.
    """
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    asked = (wanted[0], wanted[0], wanted[1], wanted[1])
    gradients = [torch.empty_like(each, dtype=dtype) if ask else None for each, ask in zip(states, asked, strict=True)]
    total = torch.zeros((), dtype=dtype, device=states[0].device)
    for layers in _shared_calls(states[0], forms):
        # What stands at padding may be infinite, and what it is multiplied with would then not be 0.
        folded = [_folded(each, layers, states[1].shape[2], ~mask, dtype) for each in states]
        bias = _bias([forms[layer] for layer in layers], mask, states, dtype)
        weights = _folded_weights(mask if weight is None else weight, mask, len(layers), states, dtype)
        pair = _Pair(kernel, folded, bias, weights, forms[layers[0]])
        total += pair.divergence()
        for place, new in pair.gradients(wanted).items():
            gradient = gradients[place]
            assert gradient is not None
            shape = gradient.shape[0], len(layers), *gradient.shape[2:]
            if len(layers) == gradient.shape[1]:
                gradients[place] = new.reshape(shape)
            else:
                gradient[:, layers] = new.reshape(shape)
    return total, gradients


def _shared_calls(q: Tensor, forms: Sequence[AttentionSpec]) -> Iterator[list[int]]:
    """Yield layers that can share a call: of one scaling and window, as many as the budget has room for."""
    layer_bytes = _TENSORS * q[:, 0].numel() * torch.promote_types(q.dtype, torch.float32).itemsize
    at_once = max(1, _AT_ONCE_BYTES // max(1, layer_bytes))
    alike: dict[tuple[float, int | None, bool], list[int]] = {}
    for layer, form in enumerate(forms):
        alike.setdefault((form.scaling, form.window, form.slopes is None), []).append(layer)
    for layers in alike.values():
        for start in range(0, len(layers), at_once):
            yield layers[start : start + at_once]


def _folded(
    states: Float[Tensor, "b l h t d"], layers: list[int], key_heads: int, hidden: Tensor, dtype: torch.dtype
) -> Float[Tensor, "n g t d"]:
    """Batch, layers and key heads as one axis, so that the query heads of a key head are all of a call's heads."""
    chosen = states if len(layers) == states.shape[1] else states[:, layers]
    known = chosen.to(dtype).masked_fill(hidden[:, None, None, :, None], 0.0)
    return rearrange(known, "b l (k g) t d -> (b l k) g t d", k=key_heads)


def _bias(
    forms: list[AttentionSpec], mask_BT: Tensor, states: Sequence[Tensor], dtype: torch.dtype
) -> Float[Tensor, "n g 1 t"]:
    """Hide keys that do not count, and let scores fall with the distance of keys where a form says so.

    What a query's scores have in common changes nothing, so a key's place does for its distance.
    """
    heads, key_heads = states[0].shape[2], states[1].shape[2]
    hidden = torch.zeros_like(mask_BT, dtype=dtype).masked_fill(~mask_BT, _NOT_SEEN)
    if forms[0].slopes is None:
        return repeat(hidden, "b t -> (b l k) 1 1 t", l=len(forms), k=key_heads)
    slopes_LH = torch.stack([form.slopes.to(hidden) for form in forms if form.slopes is not None])
    places = torch.arange(mask_BT.shape[1], device=mask_BT.device, dtype=dtype)
    falling = slopes_LH.view(1, len(forms), heads, 1) * (places - places.mean())
    return rearrange(falling + hidden[:, None, None], "b l (k g) t -> (b l k) g 1 t", k=key_heads)


def _folded_weights(
    weight_BT: Tensor, mask_BT: Tensor, num_layers: int, states: Sequence[Tensor], dtype: torch.dtype
) -> Float[Tensor, "n 1 t 1"]:
    counted = weight_BT.to(dtype).masked_fill(~mask_BT, 0.0) / states[0].shape[2]
    return repeat(counted, "b t -> (b l k) 1 t 1", l=num_layers, k=states[1].shape[2])


class _Pair:
    """Student's and target's attention of some layers: three calls, of the target's weights twice."""

    def __init__(
        self, kernel: AttentionKernel, states: Sequence[Tensor], bias: Tensor, weight: Tensor, form: AttentionSpec
    ) -> None:
        student_q, student_k, target_q, target_k = (each.expand_as(states[0]) for each in states)
        beside = bias, form.scaling, form.window
        self._kernel, self._weight, self._scaling = kernel, weight, form.scaling
        self._target = Call(target_q, target_k, target_k, *beside)
        self._crossed = Call(target_q, target_k, student_k, *beside)
        self._student = Call(student_q, student_k, student_k, *beside)
        self._of_target, self._of_crossed, self._of_student = (
            kernel.forward(call) for call in (self._target, self._crossed, self._student)
        )

    def divergence(self) -> Float[Tensor, ""]:
        """Return the weighted sum."""
        length = self._weight.shape[2]
        own = (self._target.q * self._of_target.output).sum(dim=-1)
        other = (self._student.q * self._of_crossed.output).sum(dim=-1)
        normalizers = self._of_student.logsumexp[..., :length] - self._of_target.logsumexp[..., :length]
        per_query = (own - other) * self._scaling + normalizers
        return (per_query * self._weight.squeeze(-1)).sum()

    def gradients(self, wanted: tuple[bool, bool]) -> dict[int, Tensor]:
        """Return gradients by the student's queries and keys (0 and 1), and by the target's (2 and 3)."""
        if not any(wanted):
            return {}
        scaled, gradients = self._weight * self._scaling, dict[int, Tensor]()
        student_q = self._student.q * scaled
        by_q, by_k, by_value = self._kernel.backward(student_q, self._crossed, self._of_crossed)
        if wanted[1]:
            target_q = self._target.q * scaled
            more_by_q, more_by_k, _ = self._kernel.backward(target_q, self._target, self._of_target)
            gradients[2] = more_by_q.sub_(by_q)
            gradients[3] = more_by_k.sub_(by_k).sum(dim=1)
        if wanted[0]:
            *_, more_by_value = self._kernel.backward(student_q, self._student, self._of_student)
            gradients[0] = (self._of_student.output - self._of_crossed.output).mul_(scaled)
            gradients[1] = more_by_value.sub_(by_value).sum(dim=1)
        return gradients
