"""Losses from hidden states against the plain path: all logits at once, and autograd."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kv_align.losses.predictions import linear_head
from kv_align.losses.predictions.linear_head import Budget, Predictions, RowLoss, row_losses
from kv_align.losses.predictions.next_token import CrossEntropy, Divergence
from kv_align.models.head import Bend, Head, find_head
from tests.benchmarks.measure import peak_bytes
from tests.families import FAMILIES

ROWS, WIDTH, VOCABULARY = 13, 6, 29
BENDS = {"plain": Bend(), "scaled": Bend(scale=0.25), "capped": Bend(cap=2.0), "both": Bend(scale=3.0, cap=2.0)}
# Rows at a time: several, of which the last are fewer; kept until backward, or made twice.
BUDGETS = {"kept": Budget(5 * VOCABULARY, 2**20), "made twice": Budget(5 * VOCABULARY, 0)}


@pytest.fixture(params=sorted(BUDGETS))
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setitem(linear_head.BUDGETS, "cpu", BUDGETS[name])
    return name


@dataclass
class Case:
    """A student and a teacher at the same places."""

    states: Tensor
    linear: nn.Linear
    labels: Tensor
    teacher: Predictions
    bend: Bend = field(default_factory=Bend)

    @classmethod
    def make(
        cls, dtype: torch.dtype, *, bias: bool = True, bend: Bend | None = None, teacher_vocabulary: int = 29
    ) -> "Case":
        torch.manual_seed(0)
        theirs = nn.Linear(4, teacher_vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        return cls(
            (2 * torch.randn(ROWS, WIDTH, dtype=dtype)).requires_grad_(),
            nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype),
            torch.randint(VOCABULARY, (ROWS,)),
            Predictions(3 * torch.randn(ROWS, 4, dtype=dtype), Head(theirs, Bend(cap=5.0))),
            bend or Bend(),
        )

    def losses(self, temperature: float) -> list[RowLoss]:
        return [CrossEntropy(self.labels), Divergence(self.teacher, temperature)]

    def by_rows(self, temperature: float = 1.0) -> Tensor:
        return row_losses(Predictions(self.states, Head(self.linear, self.bend)), self.losses(temperature))

    def plain(self, temperature: float = 1.0) -> Tensor:
        logits = plain_logits(self.linear(self.states), self.bend)
        assert self.teacher.head is not None
        theirs = plain_logits(self.teacher.head.linear(self.teacher.states), self.teacher.head.bend)
        common = min(logits.shape[1], theirs.shape[1])
        logs = [F.log_softmax(each[:, :common] / temperature, dim=1) for each in (logits, theirs)]
        divergence = F.kl_div(*logs, reduction="none", log_target=True).sum(dim=1) * temperature**2
        return torch.stack((F.cross_entropy(logits, self.labels, reduction="none"), divergence))

    def gradients(self, values: Tensor) -> list[Tensor]:
        # A weight of its own for each row and loss, as no mean would have.
        weights = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values)
        return list(torch.autograd.grad((weights * values).sum(), [self.states, *self.linear.parameters()]))


def plain_logits(products: Tensor, bend: Bend) -> Tensor:
    scaled = products * bend.scale
    return scaled if bend.cap is None else bend.cap * torch.tanh(scaled / bend.cap)


def assert_same(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("bend", sorted(BENDS))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradients_are_those_of_the_plain_path(
    budget: str, bend: str, bias: bool, temperature: float
) -> None:
    case = Case.make(torch.float64, bias=bias, bend=BENDS[bend])
    found, expected = case.by_rows(temperature), case.plain(temperature)
    assert_same([found, *case.gradients(found)], [expected, *case.gradients(expected)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("teacher_vocabulary", [VOCABULARY - 3, VOCABULARY + 3])
def test_of_vocabularies_that_are_padded_apart_the_common_part_is_compared(
    budget: str, teacher_vocabulary: int
) -> None:
    case = Case.make(torch.float64, teacher_vocabulary=teacher_vocabulary)
    found, expected = case.by_rows(2.0), case.plain(2.0)
    assert_same([found, *case.gradients(found)], [expected, *case.gradients(expected)], rtol=0, atol=1e-9)


def test_in_float32_they_are_so_up_to_rounding(budget: str) -> None:
    case = Case.make(torch.float32, bend=BENDS["both"])
    found, expected = case.by_rows(), case.plain()
    assert_same([found, *case.gradients(found)], [expected, *case.gradients(expected)], rtol=1e-5, atol=2e-6)


def test_under_autocast_they_are_as_near_to_float32_as_the_plain_path_is(budget: str) -> None:
    case = Case.make(torch.float32)
    exact = case.plain()
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = case.by_rows(), case.plain()
    assert found.dtype == torch.float32
    for one, other, truth in zip(
        [found, *case.gradients(found)],
        [rounded.float(), *case.gradients(rounded)],
        [exact, *case.gradients(exact)],
        strict=True,
    ):
        assert one.dtype == truth.dtype
        assert (one - truth).norm() <= 1.2 * (other - truth).norm() + 1e-6


def test_of_a_bfloat16_model_gradients_are_bfloat16(budget: str) -> None:
    case = Case.make(torch.bfloat16)
    found = case.by_rows()
    assert found.dtype == torch.float32
    assert [each.dtype for each in case.gradients(found)] == [torch.bfloat16] * 3


def test_logits_that_a_model_makes_itself_are_taken_as_they_are(budget: str) -> None:
    case = Case.make(torch.float64)
    logits = case.linear(case.states).detach().requires_grad_()
    found = row_losses(Predictions(logits), case.losses(2.0))
    expected = case.plain(2.0)
    (by_logits,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        by_logits @ case.linear.weight, torch.autograd.grad(expected.sum(), case.states)[0], rtol=0, atol=1e-9
    )


def test_a_second_backward_gives_the_same(budget: str) -> None:
    case = Case.make(torch.float64)
    found = case.by_rows()
    first, second = (torch.autograd.grad(found.sum(), case.states, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


def test_of_a_frozen_head_only_the_states_have_a_gradient(budget: str) -> None:
    case = Case.make(torch.float64)
    expected = torch.autograd.grad(case.plain().sum(), case.states)
    case.linear.requires_grad_(False)
    case.by_rows().sum().backward()
    torch.testing.assert_close(case.states.grad, expected[0], rtol=0, atol=1e-9)
    assert case.linear.weight.grad is None


def test_without_a_row_the_losses_are_empty_and_attached(budget: str) -> None:
    case = Case.make(torch.float32)
    empty = Predictions(case.states[:0], Head(case.linear))
    found = row_losses(empty, [CrossEntropy(case.labels[:0])])
    assert found.shape == (1, 0)
    found.sum().backward()
    assert case.linear.weight.grad is not None
    assert not case.linear.weight.grad.any()


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.split("::")[1] in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


def test_two_losses_cost_the_logits_once(budget: str) -> None:
    case = Case.make(torch.float32)
    counts = []
    for chosen in (case.losses(1.0)[:1], case.losses(1.0)[:1] * 2):
        with Products() as products:
            row_losses(Predictions(case.states, Head(case.linear)), chosen).sum().backward()
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


@contextmanager
def large_head(vocabulary: int) -> Iterator[tuple[Predictions, Tensor]]:
    torch.manual_seed(0)
    states = torch.randn(256, 16, requires_grad=True)
    yield Predictions(states, Head(nn.Linear(16, vocabulary, bias=False))), torch.randint(vocabulary, (256,))


@pytest.mark.parametrize("learns", [True, False])
def test_beyond_the_budget_no_more_than_it_is_held(monkeypatch: pytest.MonkeyPatch, learns: bool) -> None:
    vocabulary, rows = 4096, 16
    monkeypatch.setitem(linear_head.BUDGETS, "cpu", Budget(rows * vocabulary, 0))

    def step() -> None:
        with torch.set_grad_enabled(learns), large_head(vocabulary) as (predictions, labels):
            teacher = Predictions(predictions.states.detach(), predictions.head)
            loss = row_losses(predictions, [CrossEntropy(labels), Divergence(teacher, 2.0)]).sum()
            if learns:
                loss.backward()

    step()
    one_chunk, whole, weight = (4 * each for each in (rows * vocabulary, 256 * vocabulary, 16 * vocabulary))
    # At most seven tensors of a chunk's size at a time, and the weight, its gradient and their like.
    peak = peak_bytes(step, torch.device("cpu"))
    assert peak < 7 * one_chunk + 5 * weight
    assert peak < whole


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_the_losses_and_gradients_of_its_own_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_head.BUDGETS, "cpu", Budget(64 * 3, 0))
    model = FAMILIES[family].make()  # in float32: some know nothing else
    head = find_head(model)
    assert head is not None
    ids = torch.arange(3, 17).view(2, 7)
    labels = ids[:, 1:].flatten()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    found = row_losses(Predictions(hidden[:, :-1].flatten(0, 1), head), [CrossEntropy(labels)]).mean()
    expected = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    learned = [each for each in model.parameters() if each.requires_grad]
    gradients = [torch.autograd.grad(each, learned, allow_unused=True) for each in (found, expected)]
    overall = torch.nn.utils.get_total_norm([each for each in gradients[1] if each is not None])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7 * overall
