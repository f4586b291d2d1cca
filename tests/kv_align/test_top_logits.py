"""The divergence of coarse-grained predictions: against plain loops, the whole divergence, and finite differences."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_align.config.identity import content_hash
from kv_align.config.signals import TopLogits
from kv_align.experiment.experiment import run as do_run
from kv_align.losses.base import Pairing
from kv_align.losses.functional import Masked
from kv_align.losses.logit_kd import LogitDistillation
from kv_align.losses.predictions import linear_head
from kv_align.losses.predictions.linear_head import Budget
from kv_align.losses.predictions.top_k import TopPredictions
from kv_align.models.capture.prepare import Geometry
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_rows
from tests.next_tokens import logit_divergence, top_divergence, top_predictions
from tests.short_runs import short_config

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
SCORED = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
UNUSED = ~torch.cat((SCORED[:, 1:], torch.zeros(2, 1, dtype=torch.bool)), dim=1)[:, :, None]
VOCABULARY = 7


def draw(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def between(student: Tensor, teacher: Tensor, wanted: TopLogits, scored: Tensor = SCORED) -> Masked:
    """What a run compares: of the teacher's logits no more than was asked for."""
    return top_divergence(student, top_predictions(teacher, wanted), scored, wanted)


def top_loop(student: Tensor, teacher: Tensor, wanted: TopLogits, scored: Tensor = SCORED) -> Tensor:
    """Token by token: softmax as it is written, the teacher's k likeliest, and one more outcome that has the rest."""
    total = torch.zeros((), dtype=torch.float64)
    for row, token in (scored[:, 1:]).nonzero().tolist():
        powers = [(each[row, token, : wanted.vocabulary] / wanted.temperature).exp() for each in (student, teacher)]
        ours, theirs = (each / each.sum() for each in powers)
        likeliest = sorted(range(wanted.vocabulary), key=lambda word: -theirs[word].item())[: wanted.k]
        others = [word for word in range(wanted.vocabulary) if word not in likeliest]
        outcomes = [(theirs[word], ours[word]) for word in likeliest]
        outcomes += [(theirs[others].sum(), ours[others].sum())] if others else []
        total = total + sum(q * (q / p).log() for q, p in outcomes) * wanted.temperature**2
    return total


@pytest.mark.parametrize("k", range(1, VOCABULARY + 1))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_and_its_gradient_are_those_of_a_plain_loop(k: int, temperature: float) -> None:
    wanted = TopLogits(k=k, temperature=temperature, vocabulary=VOCABULARY)
    student, teacher = draw(2, 5, 7, seed=1).requires_grad_(), draw(2, 5, 7, seed=2)
    expected = top_loop(student, teacher, wanted)
    assert expected.item() > 0.1
    single = student.detach().float().requires_grad_()
    found = between(single, teacher.float(), wanted)
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.tokens.item() == 3
    (ours,) = torch.autograd.grad(found.total, single)
    (theirs,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=1e-4)
    assert (ours[UNUSED.expand_as(ours)] == 0).all()
    torch.autograd.gradcheck(lambda logits: top_loop(logits, teacher, wanted), student.detach().requires_grad_())


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_its_gradient_is_that_of_finite_differences(k: int) -> None:
    wanted = TopLogits(k=k, temperature=1.7, vocabulary=VOCABULARY)
    student, teacher = draw(2, 5, 7, seed=3).float(), draw(2, 5, 7, seed=4).float()
    asked = student.clone().requires_grad_()
    between(asked, teacher, wanted).total.backward()
    direction = draw(2, 5, 7, seed=5, scale=1.0).float()
    step = 1e-2
    ahead, behind = (between(student + sign * step * direction, teacher, wanted).total.item() for sign in (1, -1))
    assert asked.grad is not None
    assert (asked.grad * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=2e-3)


LOGITS = st.lists(st.floats(-60, 60, width=32), min_size=6, max_size=6)


@PROPERTY
@given(LOGITS, LOGITS, st.integers(1, 6), st.sampled_from([0.5, 1.0, 4.0]))
def test_it_is_never_above_the_whole_divergence_and_grows_with_what_is_told_apart(
    student: list[float], teacher: list[float], k: int, temperature: float
) -> None:
    ours, theirs = (torch.tensor([[each, [0.0] * 6]]) for each in (student, teacher))
    scored = torch.tensor([[False, True]])
    values = [
        between(ours, theirs, TopLogits(k=each, temperature=temperature, vocabulary=6), scored).total.item()
        for each in (k, min(6, k + 1))
    ]
    whole = logit_divergence(ours, theirs, scored, temperature).total.item()
    rounding = 1e-5 * (1 + whole)
    assert -rounding <= values[0] <= values[1] + rounding
    assert values[1] <= whole + rounding
    # All but one token told apart tells that one apart too.
    for all_told in (5, 6):
        found = between(ours, theirs, TopLogits(k=all_told, temperature=temperature, vocabulary=6), scored).total.item()
        assert found == pytest.approx(whole, rel=1e-5, abs=1e-5 * temperature**2)


@PROPERTY
@given(LOGITS, st.integers(1, 6), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_teachers_part_is_a_distribution_of_its_likeliest_tokens(
    logits: list[float], k: int, temperature: float
) -> None:
    wanted = TopLogits(k=k, temperature=temperature, vocabulary=6)
    found = top_predictions(torch.tensor([[logits]]), wanted)
    assert found.log_probabilities.shape == (1, 1, k + 1)
    assert found.log_probabilities.exp().sum().item() == pytest.approx(1, abs=1e-5)
    probabilities = (torch.tensor(logits) / temperature).softmax(0)
    assert found.indices[0, 0].unique().numel() == k
    assert probabilities[found.indices[0, 0]].tolist() == probabilities.sort(descending=True).values[:k].tolist()
    assert torch.allclose(probabilities[found.indices[0, 0]].log(), found.log_probabilities[0, 0, :k], atol=1e-4) or (
        probabilities.min() < 1e-30
    )
    assert (found.log_probabilities[0, 0, k].item() == -math.inf) is (k == 6)


def test_what_is_improbable_together_is_not_lost_to_rounding() -> None:
    # One less the likeliest token's probability is 0 in float32 here; the logarithm of it is not -inf.
    teacher = torch.tensor([[[40.0, 0.0, 0.0, 0.0], [0.0] * 4]])
    student = torch.tensor([[[0.0, 20.0, 20.0, 20.0], [0.0] * 4]])
    found = top_predictions(teacher, TopLogits(k=1, temperature=1.0, vocabulary=4))
    assert found.log_probabilities[0, 0].tolist() == pytest.approx([0.0, math.log(3) - 40])
    loss = between(student, teacher, TopLogits(k=1, temperature=1.0, vocabulary=4), torch.tensor([[False, True]]))
    assert loss.total.item() == pytest.approx(20 + math.log(3), rel=1e-5)


def test_between_equals_it_is_0_and_rounded_logarithms_are_normalised() -> None:
    logits, wanted = draw(2, 5, 7, seed=1).float(), TopLogits(k=3, temperature=1.0, vocabulary=7)
    assert between(logits, logits + 3, wanted).total.item() == pytest.approx(0, abs=1e-5)
    exact = top_predictions(logits, wanted)
    off = TopPredictions(exact.log_probabilities + 0.5, exact.indices)
    asked = logits.clone().requires_grad_()
    top_divergence(asked, off, SCORED, wanted).total.backward()
    assert asked.grad is not None
    assert asked.grad.abs().max().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("junk", [1e4, math.inf, math.nan])
@pytest.mark.parametrize("k", [2, 7])
def test_what_predicts_nothing_that_is_scored_changes_nothing(junk: float, k: int) -> None:
    wanted = TopLogits(k=k, temperature=1.3, vocabulary=7)
    student, teacher = draw(2, 5, 7, seed=1).float(), draw(2, 5, 7, seed=2).float()
    found = []
    for each in ((student, teacher), (student.masked_fill(UNUSED, junk), teacher.masked_fill(UNUSED, junk))):
        asked = each[0].requires_grad_()
        loss = between(asked, each[1], wanted).total
        found.append((loss.item(), torch.autograd.grad(loss, asked)[0]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("student_width", "teacher_width"), [(7, 10), (10, 7), (10, 9)])
def test_what_stands_beyond_the_vocabulary_does_not_count(student_width: int, teacher_width: int) -> None:
    student, teacher = draw(2, 5, 7, seed=1).float(), draw(2, 5, 7, seed=2).float()
    wanted = TopLogits(k=3, temperature=2.0, vocabulary=7)
    expected = between(student, teacher, wanted).total.item()
    padding = torch.full((2, 5, 3), 50.0)
    wide = [torch.cat((logits, padding), dim=2) for logits in (student, teacher)]
    asked = wide[0][..., :student_width].clone().requires_grad_()
    loss = between(asked, wide[1][..., :teacher_width], wanted).total
    assert loss.item() == expected > 0.1
    assert (torch.autograd.grad(loss, asked)[0][..., 7:] == 0).all()


@pytest.mark.parametrize("at_once", [1, 14, 21])
def test_some_rows_at_a_time_are_all_of_them(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = draw(2, 5, 7, seed=1).float(), draw(2, 5, 7, seed=2).float()

    def value_and_gradient() -> tuple[float, Tensor]:
        asked = student.clone().requires_grad_()
        loss = between(asked, teacher, TopLogits(k=3, temperature=1.7, vocabulary=7)).total
        return loss.item(), torch.autograd.grad(3 * loss, asked)[0]

    whole = value_and_gradient()
    monkeypatch.setitem(linear_head.BUDGETS, "cpu", Budget(at_once, 0))
    found = value_and_gradient()
    assert found[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(found[1], whole[1], atol=1e-6, rtol=1e-5)


def test_a_batch_without_a_scored_token_gives_0_attached_to_the_graph() -> None:
    asked = draw(2, 5, 7, seed=1).float().requires_grad_()
    loss = between(
        asked, draw(2, 5, 7, seed=2).float(), TopLogits(k=3, temperature=1.0, vocabulary=7), torch.zeros_like(SCORED)
    )
    assert (loss.total.item(), loss.tokens.item()) == (0, 0)
    assert (torch.autograd.grad(loss.total, asked)[0] == 0).all()


def test_a_student_in_half_precision_is_compared_in_float32() -> None:
    student, teacher, wanted = (
        draw(2, 5, 7, seed=1).bfloat16(),
        draw(2, 5, 7, seed=2).bfloat16(),
        TopLogits(k=3, temperature=1.0, vocabulary=7),
    )
    found = between(student.requires_grad_(), teacher, wanted)
    assert found.total.dtype == torch.float32
    assert found.total.item() == between(student.detach().float(), teacher.float(), wanted).total.item()
    assert torch.autograd.grad(found.total, student)[0].dtype == torch.bfloat16


# In a run


def test_more_tokens_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        short_config("loss=logit_kd", "loss.top_k=498")
    assert str(caught.value) == (
        "loss.top_k=498 is not allowed: set loss.top_k to at most 497, the tokens of the two models, or null."
    )
    assert short_config("loss=logit_kd", "loss.top_k=497").loss.options["top_k"] == 497


def test_they_are_refused_also_where_only_the_loaded_models_tell() -> None:
    shape = Geometry(1, 1, 1, 4, 4)
    given = Pairing(shape, shape, 8, 8, lambda: torch.ones(1), torch.Generator(), 40)
    with pytest.raises(ValueError, match=r"loss\.top_k=41 is not allowed: the two models have 40 tokens"):
        LogitDistillation(given, lambda_logit=0.5, temperature=1.0, top_k=41)


def test_a_run_without_it_is_the_run_that_it_was() -> None:
    plain = short_config("loss=logit_kd")
    assert plain == short_config("loss=logit_kd", "loss.top_k=null")
    assert "top_k" not in plain.loss.options
    assert content_hash(plain) != content_hash(short_config("loss=logit_kd", "loss.top_k=497"))


def test_with_all_tokens_told_apart_a_run_is_that_of_the_whole_vocabulary(tmp_path: Path) -> None:
    rows = {}
    for kind, overrides in {"whole": (), "top": ("loss.top_k=497",), "few": ("loss.top_k=4",)}.items():
        run = RunDirectory(tmp_path / kind)
        assert do_run(short_config("experiment=logit_kd", "loss.temperature=2.0", *overrides), run.path) == "finished"
        rows[kind] = [row["logit_loss"] for row in read_rows(run.metrics_file)]
    assert rows["top"] == pytest.approx(rows["whole"], rel=1e-4)
    assert all(0 < few < whole for few, whole in zip(rows["few"], rows["whole"], strict=True))
