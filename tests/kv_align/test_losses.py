"""Each loss against a plain loop whose gradient is checked by finite differences; masks, shifts and schedules by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_align.losses.attention_divergence import attention_divergence
from kv_align.losses.base import Schedule
from kv_align.losses.functional import Masked, cosine_distance, scaled_mse
from kv_align.losses.predictions import linear_head
from kv_align.losses.predictions.linear_head import Budget
from kv_align.models.capture.attention import AttentionSpec
from tests.next_tokens import causal_cross_entropy, logit_divergence

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
LEFT = MASK.flip(1)
NOTHING = torch.zeros(2, 5, dtype=torch.bool)
VARIANCE = torch.tensor([0.5, 2.0])
FORMS = (AttentionSpec(0.35), AttentionSpec(0.6, window=3))
SETTINGS = {"forms": FORMS, "temperature": 1.7}
BEYOND = {
    "cap": 0.8,  # of scores near 1: bent much
    "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    "slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
}


def beyond(*names: str) -> tuple[AttentionSpec, ...]:
    """Two layers that both have more than scaled dot products."""
    return tuple(replace(form, **{name: BEYOND[name] for name in names}) for form in FORMS)


ATTENTIONS = {
    "attention": FORMS,
    "capped attention": beyond("cap"),
    "attention with sinks": beyond("sinks"),
    "attention with slopes": beyond("slopes"),
    "attention with all": beyond("cap", "sinks", "slopes"),
}


def draw(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(requires_grad)


def states(seed: int, heads: int = 2, layers: int = 2, tokens: int = 5, width: int = 3) -> Tensor:
    return draw(2, layers, heads, tokens, width, seed=seed, requires_grad=True)


def mse_loop(student: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Vector by vector: squares over the layer's variance."""
    total = torch.zeros((), dtype=torch.float64)
    for text, layer, head, token in product(*map(range, student.shape[:4])):
        if mask[text, token]:
            difference = student[text, layer, head, token] - target[text, layer, head, token]
            total = total + (difference @ difference) / VARIANCE[layer].double() / student[0, :, :, 0].numel()
    return total


def cosine_loop(student: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Vector by vector."""
    total = torch.zeros((), dtype=torch.float64)
    for text, layer, head, token in product(*map(range, student.shape[:4])):
        if mask[text, token]:
            ours, theirs = student[text, layer, head, token], target[text, layer, head, token]
            cosine = (ours @ theirs) / ((ours @ ours) * (theirs @ theirs)).sqrt()
            total = total + (1 - cosine) / (student.shape[1] * student.shape[2])
    return total


def attention_loop(
    student_q: Tensor,
    student_k: Tensor,
    target_q: Tensor,
    target_k: Tensor,
    mask: Tensor,
    *,
    forms: tuple[AttentionSpec, ...],
    temperature: float,
) -> Tensor:
    """Query by query: the two distributions over the keys that it sees (and a sink), as softmax is written, and their KL."""
    total = torch.zeros((), dtype=torch.float64)
    layers, heads, tokens = student_q.shape[1:4]
    groups = heads // student_k.shape[2]
    for text, layer, head, token in product(*map(range, student_q.shape[:4])):
        if not mask[text, token]:
            continue
        form = forms[layer]
        back = tokens if form.window is None else form.window
        seen = [key for key in range(token + 1) if mask[text, key] and token - key < back]
        rows = []
        for q, k in ((student_q, student_k), (target_q, target_k)):
            dots = torch.stack([q[text, layer, head, token] @ k[text, layer, head // groups, key] for key in seen])
            scores = dots * form.scaling
            if form.cap is not None:
                scores = form.cap * (scores / form.cap).tanh()
            if form.slopes is not None:
                scores = scores - form.slopes[head].double() * torch.tensor([float(token - key) for key in seen])
            if form.sinks is not None:
                scores = torch.cat((scores, form.sinks[head].double()[None]))
            powers = (scores / temperature).exp()
            rows.append(powers / powers.sum())
        student, target = rows
        total = total + (target * (target / student).log()).sum() * temperature**2 / (layers * heads)
    return total


def cross_entropy_loop(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Each scored token's negative log probability under the logits of the token before it."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(logits.shape[0]):
        for t in range(1, logits.shape[1]):
            if scored[b, t]:
                powers = logits[b, t - 1].exp()
                total = total - (powers[ids[b, t]] / powers.sum()).log()
    return total


def logit_loop(student: Tensor, teacher: Tensor, scored: Tensor, temperature: float) -> Tensor:
    """Over the common part of two vocabularies."""
    total = torch.zeros((), dtype=torch.float64)
    common = min(student.shape[-1], teacher.shape[-1])
    for b in range(student.shape[0]):
        for t in range(1, student.shape[1]):
            if scored[b, t]:
                ours, theirs = (
                    (logits[b, t - 1, :common] / temperature).exp()
                    / (logits[b, t - 1, :common] / temperature).exp().sum()
                    for logits in (student, teacher)
                )
                total = total + (theirs * (theirs / ours).log()).sum() * temperature**2
    return total


def attention_of_settings(loss: Callable[..., Masked | Tensor], forms: tuple[AttentionSpec, ...], *args: Tensor) -> Any:
    """A loss on attention, with the settings of all tests."""
    return loss(*args, forms=forms, temperature=SETTINGS["temperature"])


IDS = torch.tensor([[1, 0, 5, 2, 3], [6, 6, 1, 0, 0]])
SCORED = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
TEACHER = draw(2, 5, 7, seed=2)
LOSSES = {
    "mse": (
        lambda s, t, mask: scaled_mse(s, t, mask, VARIANCE),
        mse_loop,
        lambda: [states(1), states(2)],
    ),
    "cosine": (cosine_distance, cosine_loop, lambda: [states(1), states(2)]),
    **{
        name: (
            partial(attention_of_settings, attention_divergence, forms),
            partial(attention_of_settings, attention_loop, forms),
            lambda: [states(1, heads=4), states(2), states(3, heads=4), states(4)],
        )
        for name, forms in ATTENTIONS.items()
    },
    "cross-entropy": (
        lambda logits, mask: causal_cross_entropy(logits, IDS, mask),
        lambda logits, mask: cross_entropy_loop(logits, IDS, mask),
        lambda: [draw(2, 5, 7, seed=1, requires_grad=True)],
    ),
    "logits": (
        lambda s, mask: logit_divergence(s, TEACHER.to(s), mask, 1.7),
        lambda s, mask: logit_loop(s, TEACHER, mask, 1.7),
        lambda: [draw(2, 5, 9, seed=1, requires_grad=True)],
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
STATE_LOSSES = ("mse", "cosine", *ATTENTIONS)


def masks(name: str) -> list[Tensor]:
    """Of the tokens that count, with padding right and left where that makes a difference."""
    return [MASK, LEFT] if name in STATE_LOSSES else [SCORED]


def value_and_gradients(loss: Callable[..., Masked | Tensor], parts: list[Tensor], mask: Tensor) -> tuple[float, list]:
    result = loss(*parts, mask)
    total = result.total if isinstance(result, Masked) else result
    return total.item(), torch.autograd.grad(total, parts)


@every_loss
def test_a_loss_and_its_gradient_are_those_of_a_plain_loop(name):
    fast, loop, make = LOSSES[name]
    for mask in masks(name):
        expected, expected_gradients = value_and_gradients(loop, make(), mask)
        single = [part.detach().float().requires_grad_() for part in make()]
        found, gradients = value_and_gradients(fast, single, mask)
        assert abs(expected) > 0.1
        assert found == pytest.approx(expected, rel=1e-5)
        assert fast(*single, mask).tokens.item() == mask.sum()
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-4)


@every_loss
def test_the_plain_loops_gradient_is_that_of_finite_differences(name):
    _, loop, make = LOSSES[name]
    for mask in masks(name):
        torch.autograd.gradcheck(
            lambda *parts, mask=mask: loop(*parts, mask), make(), atol=1e-6, rtol=1e-5, fast_mode=True
        )


@pytest.mark.parametrize(
    ("name", "junk"),
    # The cross-entropy's logits are not masked before their softmax: they must be finite.
    [*product(LOSSES, [1e4]), *product([name for name in LOSSES if name != "cross-entropy"], [math.inf, math.nan])],
)
def test_what_stands_at_padding_changes_nothing(name, junk):
    fast, _, make = LOSSES[name]
    for mask in masks(name):
        clean = [part.detach().float().requires_grad_() for part in make()]
        if name in STATE_LOSSES:
            unused = ~mask[:, None, None, :, None]
        else:  # the logits that predict no scored token
            unused = ~torch.cat((mask[:, 1:], torch.zeros(2, 1, dtype=torch.bool)), dim=1)[:, :, None]
        dirty = [torch.where(unused, junk, part.detach()).requires_grad_() for part in clean]
        expected, expected_gradients = value_and_gradients(fast, clean, mask)
        found, gradients = value_and_gradients(fast, dirty, mask)
        assert found == expected
        for ours, theirs, part in zip(gradients, expected_gradients, clean, strict=True):
            assert torch.equal(ours, theirs)
            assert (ours[unused.expand_as(part)] == 0).all()


@every_loss
def test_a_batch_without_a_valid_token_gives_0_attached_to_the_graph(name):
    fast, _, make = LOSSES[name]
    parts = [part.detach().float().requires_grad_() for part in make()]
    result = fast(*parts, NOTHING)
    assert result.total.item() == 0
    assert result.tokens.item() == 0
    for gradient in torch.autograd.grad(result.total, parts):
        assert (gradient == 0).all()


@every_loss
def test_texts_add_up(name):
    fast, _, make = LOSSES[name]
    parts, mask = [part.detach().float() for part in make()], masks(name)[0]
    whole = fast(*parts, mask)
    if name == "cross-entropy":
        pieces = [causal_cross_entropy(parts[0][[row]], IDS[[row]], mask[[row]]) for row in (0, 1)]
    elif name == "logits":
        pieces = [logit_divergence(parts[0][[row]], TEACHER[[row]], mask[[row]], 1.7) for row in (0, 1)]
    else:
        pieces = [fast(*(part[[row]] for part in parts), mask[[row]]) for row in (0, 1)]
    assert sum(piece.total for piece in pieces).item() == pytest.approx(whole.total.item(), rel=1e-5)
    assert sum(piece.tokens for piece in pieces).item() == whole.tokens.item()


@pytest.mark.parametrize("name", STATE_LOSSES)
def test_a_loss_does_not_grow_with_depth(name):
    parts = [part.detach().float() for part in LOSSES[name][2]()]
    deep = [part.repeat(1, 4, 1, 1, 1) for part in parts]
    if name == "mse":
        shallow, deeper = scaled_mse(*parts, MASK, VARIANCE), scaled_mse(*deep, MASK, VARIANCE.repeat(4))
    elif name == "cosine":
        shallow, deeper = cosine_distance(*parts, MASK), cosine_distance(*deep, MASK)
    else:
        shallow, deeper = (
            attention_of_settings(attention_divergence, ATTENTIONS[name] * times, *each, MASK)
            for times, each in ((1, parts), (4, deep))
        )
    assert deeper.total.item() == pytest.approx(shallow.total.item(), rel=1e-5)
    assert deeper.tokens.item() == shallow.tokens.item() == 6


@pytest.mark.parametrize("name", STATE_LOSSES)
def test_a_loss_between_equals_is_0(name):
    fast, _, make = LOSSES[name]
    parts = [part.detach().float() for part in make()]
    half = len(parts) // 2
    same = [*parts[:half], *parts[:half]]
    assert fast(*same, MASK).total.item() == pytest.approx(0, abs=1e-5)


def test_logit_divergence_between_equals_is_0():
    logits = draw(2, 5, 7).float()
    assert logit_divergence(logits, logits + 3, SCORED, 1.0).total.item() == pytest.approx(0, abs=1e-5)


def test_mse_by_hand():
    # One token, one layer, two heads of width 2: differences 1, 2, 3, 4, mean square 7.5, variance 5.
    student = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 1, 2)
    result = scaled_mse(student, torch.zeros_like(student), torch.ones(1, 1, dtype=torch.bool), torch.tensor([5.0]))
    assert result.total.item() == pytest.approx(1.5)


def test_cosine_by_hand_and_blind_to_magnitude():
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0]]).reshape(1, 1, 2, 1, 2)
    target = torch.tensor([[1.0, 0.0], [-2.0, 0.0]]).reshape(1, 1, 2, 1, 2)
    mask = torch.ones(1, 1, dtype=torch.bool)
    # Cosines 0.6 and -1.
    assert cosine_distance(student, target, mask).total.item() == pytest.approx(1.2)
    assert cosine_distance(student, 1000 * target, mask).total.item() == pytest.approx(1.2)


def test_a_target_of_zeros_is_orthogonal_to_everything():
    # What the time warp gives where the teacher lacks a segment, were it not masked.
    parts = [torch.ones(1, 1, 1, 1, 2, requires_grad=True), torch.zeros(1, 1, 1, 1, 2, requires_grad=True)]
    result = cosine_distance(*parts, torch.ones(1, 1, dtype=torch.bool))
    assert result.total.item() == 1
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(result.total, parts))


every_attention = pytest.mark.parametrize("forms", ATTENTIONS.values(), ids=ATTENTIONS)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 128])
@every_attention
def test_attention_in_chunks_is_attention(forms, chunk):
    parts = [part.detach().float().requires_grad_() for part in LOSSES["attention"][2]()]
    (whole, gradients), (found, in_chunks) = (
        value_and_gradients(
            lambda *args, size=size: attention_divergence(*args, forms=forms, temperature=1.7, chunk=size), parts, MASK
        )
        for size in (5, chunk)
    )
    assert found == pytest.approx(whole, rel=1e-5)
    for ours, theirs in zip(in_chunks, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 14, 10**6])
def test_cross_entropy_some_rows_at_a_time_is_the_cross_entropy(at_once, monkeypatch):
    monkeypatch.setitem(linear_head.BUDGETS, "cpu", Budget(at_once, 0))
    fast, loop, make = LOSSES["cross-entropy"]
    expected, expected_gradients = value_and_gradients(loop, make(), SCORED)
    found, gradients = value_and_gradients(fast, [part.detach().float().requires_grad_() for part in make()], SCORED)
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradients[0], expected_gradients[0].float(), atol=1e-6, rtol=1e-5)


FORMLESS = AttentionSpec(1.0)


def two_tokens(student_score: float, target_score: float, temperature: float, form: AttentionSpec = FORMLESS) -> float:
    """Attention of the second of two tokens: the scores of the first key, that of the second being 0."""
    q = torch.zeros(1, 1, 1, 2, 1)
    q[..., 1, 0] = 1
    student_k, target_k = (torch.tensor([score, 0.0]).reshape(1, 1, 1, 2, 1) for score in (student_score, target_score))
    result = attention_divergence(
        q, student_k, q, target_k, torch.ones(1, 2, dtype=torch.bool), forms=(form,), temperature=temperature
    )  # fmt: skip
    assert result.tokens.item() == 2
    return result.total.item()


def test_attention_by_hand():
    # Target (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2). The first token sees itself alone: 0.
    assert two_tokens(0.0, math.log(3), 1.0) == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), abs=1e-6)
    # The other way round it is another number: 1/2 ln(2/3) + 1/2 ln 2.
    assert two_tokens(math.log(3), 0.0, 1.0) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)
    # tau 2 makes ln 9 what ln 3 was, times tau² = 4.
    assert two_tokens(0.0, math.log(9), 2.0) == pytest.approx(3 * math.log(1.5) - math.log(2), abs=1e-6)


def test_capped_attention_by_hand():
    # 2 atanh(1/2) = ln 3 is bent to 2 tanh(ln(3) / 2) = 1: the target is (e, 1) / (e + 1), the student (1/2, 1/2).
    capped = AttentionSpec(1.0, cap=2.0)
    e = math.e / (math.e + 1)
    by_hand = e * math.log(2 * e) + (1 - e) * math.log(2 * (1 - e))
    assert two_tokens(0.0, math.log(3), 1.0, capped) == pytest.approx(by_hand, abs=1e-6)
    # A temperature divides what was bent: 4 tanh(ln(3) / 2) / 2 = 1.
    assert two_tokens(0.0, 2 * math.log(3), 2.0, AttentionSpec(1.0, cap=4.0)) == pytest.approx(4 * by_hand, abs=1e-6)


def test_attention_with_a_sink_by_hand():
    # The sink has the weight of the second key. First token, itself and the sink: (1/2, 1/2) in both, or, where its own
    # score is ln 3, still 0, since a token's query is 0. Second: target (3, 1, 1) / 5, student (1, 1, 1) / 3.
    by_hand = 0.6 * math.log(1.8) + 0.4 * math.log(0.6)
    sink = AttentionSpec(1.0, sinks=torch.zeros(1))
    assert two_tokens(0.0, math.log(3), 1.0, sink) == pytest.approx(by_hand, abs=1e-6)
    low = AttentionSpec(1.0, sinks=torch.full((1,), -100.0))
    assert two_tokens(0.0, math.log(3), 1.0, low) == pytest.approx(two_tokens(0.0, math.log(3), 1.0), abs=1e-6)


def test_attention_with_a_slope_by_hand():
    # One place back costs ln 3, which the target's score makes up: target (1/2, 1/2), student (1/4, 3/4).
    slope = AttentionSpec(1.0, slopes=torch.full((1,), math.log(3)))
    by_hand = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert two_tokens(0.0, math.log(3), 1.0, slope) == pytest.approx(by_hand, abs=1e-6)


def test_a_cap_costs_nothing_where_there_is_none(monkeypatch):
    calls = []
    tanh = torch.Tensor.tanh_
    monkeypatch.setattr(torch.Tensor, "tanh_", lambda scores: calls.append(scores.shape) or tanh(scores))
    parts = [part.detach().float() for part in LOSSES["attention"][2]()]
    attention_divergence(*parts, MASK, **SETTINGS)
    assert calls == []
    attention_divergence(*parts, MASK, forms=beyond("cap"), temperature=1.0)
    assert calls == [(2, 2, 2, 5, 5)] * 4  # once for each layer's student and target, text by key head by group


def test_a_sliding_window_hides_what_is_further_back():
    parts = [part.detach().float() for part in LOSSES["attention"][2]()]
    everything = torch.ones(2, 5, dtype=torch.bool)

    def within(*windows: int | None) -> float:
        forms = tuple(replace(form, window=window) for form, window in zip(FORMS, windows, strict=True))
        return attention_divergence(*parts, everything, forms=forms, temperature=1.0).total.item()

    no_window = within(None, None)
    assert within(5, 5) == no_window
    assert within(4, None) != no_window
    # A token that sees itself alone attends as any other model does.
    assert within(1, 1) == 0


def test_attention_is_causal():
    parts = [part.detach().float() for part in LOSSES["attention"][2]()]
    first_three = torch.tensor([[1, 1, 1, 0, 0]] * 2).bool()
    changed = [part.clone() for part in parts]
    for part in changed:
        part[..., 3:, :] = 9.0
    # Were the first three tokens to look ahead, the last two would matter to them although they are not counted.
    ours, theirs = (attention_divergence(*each, first_three, **SETTINGS).total.item() for each in (parts, changed))
    assert ours == theirs
    short = attention_divergence(*(part[..., :3, :] for part in parts), first_three[:, :3], **SETTINGS).total.item()
    assert ours == pytest.approx(short, rel=1e-6)


def test_grouped_queries_share_their_key():
    student_q, student_k, target_q, target_k = (part.detach().float() for part in LOSSES["attention"][2]())
    grouped = attention_divergence(student_q, student_k, target_q, target_k, MASK, **SETTINGS)
    repeated = [k.repeat_interleave(2, dim=2) for k in (student_k, target_k)]
    whole = attention_divergence(student_q, repeated[0], target_q, repeated[1], MASK, **SETTINGS)
    assert grouped.total.item() == pytest.approx(whole.total.item(), rel=1e-6)


def test_attention_in_bfloat16_is_compared_in_float32():
    parts = [part.detach().bfloat16() for part in LOSSES["attention"][2]()]
    rough = attention_divergence(*parts, MASK, **SETTINGS)
    exact = attention_divergence(*(part.float() for part in parts), MASK, **SETTINGS)
    assert rough.total.dtype == torch.float32
    assert rough.total.item() == exact.total.item()


def test_mixed_precision_does_not_round_attention():
    # Of nearly equal attentions, whose difference scores in bfloat16 would drown.
    student_q, student_k, *_ = (part.detach().float().requires_grad_() for part in LOSSES["attention"][2]())
    target_q, target_k = (part.detach() + 0.01 * draw(*part.shape, seed=9).float() for part in (student_q, student_k))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = attention_divergence(student_q, student_k, target_q, target_k, MASK, **SETTINGS).total
        found.append((total.item(), *torch.autograd.grad(total, (student_q, student_k))))
    exact, mixed = found
    assert mixed[0] == exact[0] > 1e-5
    for ours, theirs in zip(mixed[1:], exact[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mask", [MASK, LEFT, NOTHING], ids=["right", "left", "nothing"])
@pytest.mark.parametrize("chunk", [2, 128])
@every_attention
def test_the_attentions_own_gradient_is_that_of_finite_differences(forms, mask, chunk):
    # It is written by hand, and keeps double precision.
    parts = LOSSES["attention"][2]()

    def total(*states: Tensor) -> Tensor:
        return attention_divergence(*states, mask, forms=forms, temperature=1.7, chunk=chunk).total

    assert total(*parts).dtype == torch.float64
    torch.autograd.gradcheck(total, parts, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("learns", ["student", "target"])
def test_attention_gives_a_gradient_to_whoever_asks_for_one(learns):
    asking = slice(0, 2) if learns == "student" else slice(2, 4)
    parts = [part.detach().float().requires_grad_() for part in LOSSES["attention"][2]()]
    both = torch.autograd.grad(attention_divergence(*parts, MASK, **SETTINGS).total, parts)
    alone = [part.detach().requires_grad_(number in range(4)[asking]) for number, part in enumerate(parts)]
    gradients = torch.autograd.grad(3 * attention_divergence(*alone, MASK, **SETTINGS).total, alone[asking])
    for ours, theirs in zip(gradients, both[asking], strict=True):
        torch.testing.assert_close(ours, 3 * theirs)
    silent = attention_divergence(*(part.detach() for part in parts), MASK, **SETTINGS).total
    assert not silent.requires_grad


@pytest.mark.parametrize(("student_width", "teacher_width"), [(7, 10), (10, 7), (7, 7)])
def test_vocabularies_padded_differently_are_compared_where_they_agree(student_width, teacher_width):
    student, teacher = draw(2, 5, 7, seed=1).float(), draw(2, 5, 7, seed=2).float()
    common = logit_divergence(student, teacher, SCORED, 2.0)
    # What stands at ids beyond the common part cannot count, however large.
    padding = torch.full((2, 5, 3), 50.0)
    student, teacher = (torch.cat((logits, padding), dim=2) for logits in (student, teacher))
    found = logit_divergence(student[..., :student_width], teacher[..., :teacher_width], SCORED, 2.0)
    assert found.total.item() == common.total.item() > 0.1
    assert found.tokens.item() == 3


def test_logit_divergence_by_hand():
    # Two words; teacher (3/4, 1/4), student (1/2, 1/2), at the token before the one that is scored.
    student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[math.log(3), 0.0], [70.0, -70.0]]])
    scored = torch.tensor([[False, True]])
    expected = 0.75 * math.log(1.5) - 0.25 * math.log(2)
    assert logit_divergence(student, teacher, scored, 1.0).total.item() == pytest.approx(expected, abs=1e-6)
    teacher[0, 0, 0] = math.log(9)
    assert logit_divergence(student, teacher, scored, 2.0).total.item() == pytest.approx(4 * expected, abs=1e-6)


def test_the_causal_shift_by_hand():
    # Logits in powers of e, so that probabilities are 1/2, 1/4, 1/4 with the half at the word that is named.
    def prefer(word: int) -> list[float]:
        return [math.log(2) if each == word else 0.0 for each in range(3)]

    logits = torch.tensor([[prefer(2), prefer(0), prefer(1), prefer(1)]])
    ids = torch.tensor([[1, 2, 2, 1]])
    # Token 1 (a 2) was preferred by token 0; token 2 (a 2) was not by token 1; token 3 (a 1) was by token 2.
    for scored, expected in (
        ([0, 1, 0, 0], math.log(2)),
        ([0, 0, 1, 0], math.log(4)),
        ([0, 0, 0, 1], math.log(2)),
        ([0, 1, 1, 1], math.log(16)),
    ):
        result = causal_cross_entropy(logits, ids, torch.tensor([scored]).bool())
        assert result.total.item() == pytest.approx(expected, abs=1e-6)
        assert result.tokens.item() == sum(scored)


def test_a_logit_that_is_not_finite_and_predicts_nothing_leaves_loss_and_gradient_alone():
    logits = torch.zeros(1, 4, 5)
    logits[0, [0, 3]] = torch.tensor([[math.inf], [math.nan]])
    logits.requires_grad_()
    result = causal_cross_entropy(logits, torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, True, True]]))
    result.total.backward()
    assert result.total.item() == pytest.approx(2 * math.log(5), abs=1e-6)
    assert logits.grad[0, [0, 3]].abs().max() == 0
    assert logits.grad[0, 1].tolist() == pytest.approx([0.2, 0.2, 0.2, -0.8, 0.2])


def test_the_end_of_text_is_scored_also_where_it_is_the_pad_id():
    # Id 0 is both; only the mask tells the end, which counts, from the padding, which does not.
    logits = torch.zeros(1, 4, 5)
    ids = torch.tensor([[3, 0, 0, 0]])
    result = causal_cross_entropy(logits, ids, torch.tensor([[False, True, False, False]]))
    assert result.total.item() == pytest.approx(math.log(5), abs=1e-6)
    assert result.tokens.item() == 1


@pytest.mark.parametrize(
    ("decay", "warmup_steps", "num_steps", "expected"),
    [
        ("constant", 0, 4, [0.5, 0.5, 0.5, 0.5]),
        ("constant", 2, 4, [0.25, 0.5, 0.5, 0.5]),
        ("linear", 0, 5, [0.5, 0.375, 0.25, 0.125, 0.0]),
        ("linear", 2, 5, [0.25, 0.5, 0.5, 0.25, 0.0]),
        ("cosine", 0, 5, [0.5, 0.25 + 0.25 * math.sqrt(0.5), 0.25, 0.25 - 0.25 * math.sqrt(0.5), 0.0]),
        ("cosine", 2, 5, [0.25, 0.5, 0.5, 0.25, 0.0]),
        ("linear", 0, 1, [0.5]),
        ("linear", 4, 2, [0.125, 0.25]),
    ],
)
def test_schedules_by_hand(decay, warmup_steps, num_steps, expected):
    found = [Schedule(0.5, decay, warmup_steps).at(step, num_steps) for step in range(num_steps)]
    assert found == pytest.approx(expected, abs=1e-12)


@PROPERTY
@given(st.floats(0, 10), st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 20), st.integers(1, 30))
def test_a_schedule_rises_to_its_weight_and_never_passes_it(value, decay, warmup_steps, num_steps):
    weights = [Schedule(value, decay, warmup_steps).at(step, num_steps) for step in range(num_steps)]
    assert all(-1e-12 <= weight <= value + 1e-12 for weight in weights)
    rise, fall = weights[:warmup_steps], weights[warmup_steps:]
    assert all(before <= after for before, after in pairwise(rise))
    assert all(before >= after - 1e-12 for before, after in pairwise(fall))
    assert fall[:1] in ([], [pytest.approx(value)])
    if decay != "constant" and len(fall) > 1:
        assert fall[-1] == pytest.approx(0, abs=1e-12)
