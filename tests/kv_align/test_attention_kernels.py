"""The divergence by attention kernels against the chunked one; a GPU's operators are made of whole matrices here."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kv_align.losses import attention_kernels
from kv_align.losses.attention_divergence import attention_divergence
from kv_align.losses.attention_kernels import (
    Attended,
    AttentionKernel,
    Call,
    MemoryEfficient,
    divergence_by_kernel,
    kernel_for,
)
from kv_align.models.capture.attention import AttentionSpec
from tests.gpu_operators import efficient_attention_on_cpu

B, L, HQ, T, D = 2, 3, 4, 9, 5


class Counting(MemoryEfficient):
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, call: Call) -> Attended:
        self.calls += 1
        return super().forward(call)

    def backward(self, by_output: Tensor, call: Call, attended: Attended) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        return super().backward(by_output, call, attended)


class CpuFlash(AttentionKernel):
    """PyTorch's flash kernel for CPUs: no padding and no window."""

    def forward(self, call: Call) -> Attended:
        assert not call.bias.any()
        assert call.window is None
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return Attended(*attend(*(each.contiguous() for each in call[:3]), 0.0, True, scale=call.scaling))

    def backward(self, by_output: Tensor, call: Call, attended: Attended) -> tuple[Tensor, Tensor, Tensor]:
        pull_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        states = (each.contiguous() for each in (by_output, *call[:3]))
        gradients: tuple[Tensor, Tensor, Tensor] = pull_back(*states, *attended, 0.0, True, scale=call.scaling)
        return gradients


PLAIN = (AttentionSpec(0.35),) * L
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
FORMS = {
    "plain": PLAIN,
    "of several scalings": tuple(AttentionSpec(scaling) for scaling in (0.35, 0.6, 0.35)),
    "with windows": tuple(AttentionSpec(0.35, window=window) for window in (3, None, 3)),
    "with a window of one": (AttentionSpec(0.35, window=1),) * L,
    "with slopes": tuple(replace(form, slopes=SLOPES * (1 + place)) for place, form in enumerate(PLAIN)),
    "with slopes and windows": tuple(AttentionSpec(0.35, window=4, slopes=SLOPES) for _ in range(L)),
}
RIGHT = torch.tensor([[1] * 9, [1] * 6 + [0] * 3]).bool()
MASKS = {
    "nothing": torch.ones(B, T, dtype=torch.bool),
    "padding at the right": RIGHT,
    "padding at the left": RIGHT.flip(1),
    "holes": torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1, 1, 0]]).bool(),
    "all of a text": torch.tensor([[0] * 9, [1] * 9]).bool(),
}


def draw_states(key_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, L, heads, T, D, generator=generator, dtype=torch.float64).mul_(2).to(dtype).requires_grad_()
        for heads in (HQ, key_heads, HQ, key_heads)
    ]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """The GPU's kernel, which a CPU then has."""
    counting = Counting()
    monkeypatch.setitem(attention_kernels.KERNELS, "cpu", counting)
    with efficient_attention_on_cpu():
        yield counting


def both_ways(
    states: list[Tensor], mask: Tensor, forms: tuple[AttentionSpec, ...], temperature: float
) -> list[list[Tensor]]:
    results = []
    for chunk in (None, 4):
        divergence = attention_divergence(*states, mask, forms=forms, temperature=temperature, chunk=chunk)
        results.append([divergence.total, *torch.autograd.grad(3 * divergence.total, states)])
    return results


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("form", sorted(FORMS))
def test_value_and_gradients_are_those_of_the_chunks(kernel: Counting, form: str, mask: str, key_heads: int) -> None:
    states = draw_states(key_heads)
    for one, other in zip(*both_ways(states, MASKS[mask], FORMS[form], 1.7), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert kernel.calls > 0


def test_all_layers_are_one_call(kernel: Counting) -> None:
    states = draw_states()
    attention_divergence(*states, RIGHT, forms=PLAIN, temperature=1.0)
    assert kernel.calls == 6  # three forward and three backward


def test_layers_that_need_more_than_the_budget_have_calls_of_their_own(
    kernel: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "_AT_ONCE_BYTES", 1)
    for one, other in zip(*both_ways(draw_states(), RIGHT, PLAIN, 1.0), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert kernel.calls == 6 * L


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_gradients_that_nobody_asks_for_are_not_made(kernel: Counting, wanted: tuple[bool, bool]) -> None:
    states = draw_states()
    for place, each in enumerate(states):
        each.requires_grad_(wanted[place // 2])
    asking = [each for each in states if each.requires_grad]
    total = attention_divergence(*states, RIGHT, forms=PLAIN, temperature=1.0).total
    expected = attention_divergence(*states, RIGHT, forms=PLAIN, temperature=1.0, chunk=4).total
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    assert total.requires_grad == any(wanted)
    if asking:
        for one, other in zip(*(torch.autograd.grad(each, asking) for each in (total, expected)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    # The target's gradient takes two backward calls, the student's one and one of the target's.
    assert kernel.calls == 3 + {(True, False): 2, (False, True): 2, (False, False): 0}[wanted]


def test_each_query_may_have_a_weight_of_its_own(kernel: Counting) -> None:
    states, weight = draw_states(), torch.linspace(0.5, 2, B * T, dtype=torch.float64).view(B, T)
    total, gradients = divergence_by_kernel(kernel, states, RIGHT, PLAIN, (True, True), weight)
    alone = []
    for text in range(B):
        for token in range(T):
            # A query's own share: of the sum over queries to it less that to the one before.
            sums = []
            for end in (token, token + 1):
                cut = [each[text : text + 1, :, :, :end] for each in states]
                sums.append(
                    attention_divergence(
                        *cut, RIGHT[text : text + 1, :end], forms=PLAIN, temperature=1.0, chunk=4
                    ).total
                )
            alone.append((sums[1] - sums[0]) * weight[text, token])
    expected = torch.stack(alone).sum() * L  # a mean over layers there
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    for one, other in zip(gradients, torch.autograd.grad(expected, states), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_what_stands_at_padding_is_not_looked_at(kernel: Counting) -> None:
    states, spoiled = draw_states(), draw_states()
    with torch.no_grad():
        for each in spoiled:
            each.masked_fill_(~MASKS["holes"][:, None, None, :, None], torch.inf)
    totals = [
        attention_divergence(*each, MASKS["holes"], forms=PLAIN, temperature=1.0).total for each in (states, spoiled)
    ]
    assert torch.equal(*totals)
    for one, other in zip(torch.autograd.grad(totals[0], states), torch.autograd.grad(totals[1], spoiled), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_a_real_kernel_in_float32_is_exact_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_kernels.KERNELS, "cpu", CpuFlash())
    exact = both_ways(draw_states(), MASKS["nothing"], PLAIN, 1.0)[1]
    rounded = both_ways(draw_states(dtype=torch.float32), MASKS["nothing"], PLAIN, 1.0)[0]
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cap", "sinks"])
def test_soft_caps_and_sinks_are_left_to_the_chunks(kernel: Counting, name: str) -> None:
    beyond = {"cap": 0.8, "sinks": torch.zeros(HQ)}
    form = replace(PLAIN[0], **{name: beyond[name]})
    device = torch.device("cpu")
    assert kernel_for(device, [PLAIN[0]]) is kernel
    assert kernel_for(device, [PLAIN[0], form]) is None
    attention_divergence(*draw_states(), RIGHT, forms=(PLAIN[0], form, form), temperature=1.0)
    assert kernel.calls == 0


def test_a_cpu_has_no_kernel_and_a_gpu_the_one_that_takes_float32() -> None:
    assert kernel_for(torch.device("cpu"), PLAIN) is None
    assert isinstance(kernel_for(torch.device("cuda"), PLAIN), MemoryEfficient)
