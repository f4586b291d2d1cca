"""One battery that every loss passes, whatever it compares: a YAML in `conf/loss` is in it, and one entry for each variant.

A loss in `conf/loss` needs nothing more; other options of it are one entry of `VARIANTS`, and a plain reference of its
components one of `REFERENCES`.

Axes: B batch, L student layers, H heads, T tokens, D head width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kv_align.align.schedule import Phase
from kv_align.config.compose import compose_config
from kv_align.config.config import Config
from kv_align.config.schema import Choice
from kv_align.config.signals import TopLogits, composed_of, learns_projection, signals_of
from kv_align.config.targets import config_directory
from kv_align.data.batch import Batch
from kv_align.data.correspondence import Correspondence
from kv_align.experiment.choices import make_loss
from kv_align.losses.base import Loss, Pairing
from kv_align.losses.combined import Combined
from kv_align.losses.comparison import (
    AttentionComparison,
    Comparison,
    HiddenComparison,
    LogitComparison,
    SourceComparison,
    StateComparison,
    TopLogitComparison,
)
from kv_align.losses.functional import Masked
from kv_align.losses.predictions.linear_head import Predictions, row_losses
from kv_align.models.capture.attention import AttentionSpec
from kv_align.models.capture.prepare import Geometry
from kv_align.models.capture.states import States
from kv_align.teacher.teacher import TeacherStates
from kv_align.training.step import Counts, Distiller
from tests import readme
from tests.next_tokens import scored_tokens, top_predictions
from tests.tiny import make_llama

TEACHER, STUDENT = Geometry(4, 8, 4, 16, 16), Geometry(3, 8, 4, 8, 8)
WIDTHS, VOCABULARY, TEXTS, LENGTH = (9, 7), 23, 3, 6
Reference = Callable[[Comparison], dict[str, Tensor]]


@dataclass(frozen=True)
class Entry:
    """A loss in the battery.

    Attributes
    ----------
    loss
        The choice, `conf/loss/NAME.yaml`.
    options
        Overrides, such as `loss.top_k=5`.
    config_dir
        Where the choice is, if not in `conf/`.
    reference
        Sums of its components by name, written as plainly as can be; None: its gradient is checked by differences alone.
    """

    loss: str
    options: tuple[str, ...] = ()
    reference: Reference | None = None
    config_dir: str | None = None


def plain_kv(comparison: Comparison) -> dict[str, Tensor]:
    states = comparison.of(StateComparison)
    sums = dict.fromkeys(("key_loss", "value_loss"), torch.zeros(()))
    for text, token in comparison.aligned.nonzero().tolist():
        for name, ours, theirs, variance in (
            ("key_loss", states.student.k, states.target.k, states.key_variance),
            ("value_loss", states.student.v, states.target.v, states.value_variance),
        ):
            errors = (ours[text, :, :, token] - theirs[text, :, :, token]).square().mean(dim=(1, 2))
            sums[name] = sums[name] + (errors / variance).mean()
    return sums


def plain_kv_cosine(comparison: Comparison) -> dict[str, Tensor]:
    states = comparison.of(StateComparison)
    sums = dict.fromkeys(("key_loss", "value_loss"), torch.zeros(()))
    for text, token in comparison.aligned.nonzero().tolist():
        for name, ours, theirs in (
            ("key_loss", states.student.k, states.target.k),
            ("value_loss", states.student.v, states.target.v),
        ):
            a, b = ours[text, :, :, token], theirs[text, :, :, token]
            sums[name] = sums[name] + (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    return sums


def plain_logits(comparison: Comparison) -> dict[str, Tensor]:
    teacher, total = comparison.of(LogitComparison).teacher, torch.zeros(())
    for student_row, teacher_row in zip(comparison.predictions.states, teacher.states, strict=True):
        ours, theirs = student_row.softmax(-1), teacher_row.softmax(-1)
        total = total + (theirs * (theirs / ours).log()).sum()
    return {"logit_loss": total}


def plain_kv_logit(comparison: Comparison) -> dict[str, Tensor]:
    return plain_kv(comparison) | plain_logits(comparison)


def plain_values(comparison: Comparison) -> dict[str, Tensor]:
    """Of the loss that README shows."""
    return {"values_loss": plain_kv(comparison)["value_loss"]}


REFERENCES: dict[str, Reference] = {"kv": plain_kv, "logit_kd": plain_logits, "kv+logit": plain_kv_logit}
VARIANTS = [
    Entry("kv", ("loss.metric=cosine",), plain_kv_cosine),
    Entry("kv", ("loss.terms=keys",), plain_kv),
    Entry("kv", ("loss.terms=values",), plain_kv),
    Entry("logit_kd", ("loss.top_k=5", "loss.temperature=2.0")),
    Entry("kv+struct+logit", ("loss.parts.logit.top_k=5",)),
    Entry("relations", ("loss.layers=[0,2]", "loss.relation_heads=2")),
    Entry("hidden", ("loss.layers=[1]",)),
    Entry("mine", (), plain_values, str(readme.written() / "conf")),
]
CHOICES = sorted(file.stem for file in (config_directory() / "loss").glob("*.yaml"))
ENTRIES = [*(Entry(name, (), REFERENCES.get(name)) for name in CHOICES), *VARIANTS]
every_loss = pytest.mark.parametrize(
    "entry", ENTRIES, ids=[" ".join((each.loss, *(o.partition("loss.")[2] for o in each.options))) for each in ENTRIES]
)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairing() -> Pairing:
    variance, generator = torch.tensor([0.5, 1.0, 2.0]), torch.Generator().manual_seed(0)
    return Pairing(TEACHER, STUDENT, *WIDTHS, lambda: variance, generator, VOCABULARY)


@cache
def composed(*words: str, config_dir: str | None = None) -> Config:
    return compose_config(words, config_dir=config_dir)[0]


def config_of(entry: Entry) -> Config:
    return composed(f"loss={entry.loss}", *entry.options, config_dir=entry.config_dir)


def choice_of(entry: Entry) -> Choice:
    return config_of(entry).loss


def loss_of(entry: Entry) -> Loss:
    return make_loss(choice_of(entry), pairing)


def states_of(shape: Geometry, seed: int) -> States:
    kv, queries = shape.num_key_value_heads, shape.num_query_heads
    shapes = ((kv, shape.key_width), (kv, shape.value_width), (queries, shape.key_width))
    return States(*(draw(TEXTS, 3, heads, LENGTH, width, seed=seed + at) for at, (heads, width) in enumerate(shapes)))


ALIGNED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
SCORED = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()


def everything(loss: Loss, scored: Tensor = SCORED, aligned: Tensor = ALIGNED) -> Comparison:
    """All that a loss may ask to compare, drawn; texts of six, four and two tokens."""
    predicting = scored_tokens(scored).predicting
    student, target, source = states_of(STUDENT, 1), states_of(STUDENT, 11), states_of(TEACHER, 21)
    teacher_logits = 2 * draw(TEXTS, LENGTH, VOCABULARY, seed=31)
    variances = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 1.5, 3.0])
    parts: list[object] = [
        StateComparison(student, target, *variances),
        AttentionComparison(
            *(draw(TEXTS, 3, heads, LENGTH, 8, seed=40 + at) for at, heads in enumerate((8, 4, 8, 4))),
            forms=(AttentionSpec(scaling=8**-0.5),) * 3,
        ),
        SourceComparison(student, source),
        HiddenComparison(draw(TEXTS, 3, LENGTH, WIDTHS[1], seed=51), draw(TEXTS, 3, LENGTH, WIDTHS[0], seed=52)),
        LogitComparison(Predictions(teacher_logits.flatten(0, 1)).at(predicting)),
    ]
    top = next((signal for signal in loss.requests if isinstance(signal, TopLogits)), None)
    if top is not None:
        parts.append(TopLogitComparison(top_predictions(teacher_logits, top).at(predicting)))
    logits = draw(TEXTS, LENGTH, VOCABULARY, seed=61)
    return Comparison(Predictions(logits.flatten(0, 1)).at(predicting), aligned, tuple(parts))


def components_of(part: Loss, comparison: Comparison) -> dict[str, Masked]:
    """Its components and its losses of predictions, each as a sum over what it counts."""
    rows = {
        name: Masked(row_losses(comparison.predictions, [loss]).sum(), torch.tensor(len(comparison.predictions.states)))
        for each in part.parts
        for name, loss in each.row_losses(comparison).items()
    }
    return part.components(comparison) | rows


def changed(value: Any, change: Callable[[Tensor, bool], Tensor], *, student: bool = False) -> Any:
    """A copy of all that is compared with its floating tensors [B, ...] changed; told which are the student's."""
    if isinstance(value, Tensor):
        return change(value, student) if value.is_floating_point() and value.dim() > 1 else value
    if isinstance(value, tuple):
        inner = [changed(each, change, student=student) for each in value]
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    if not hasattr(value, "__dataclass_fields__") or isinstance(value, AttentionSpec):
        return value
    of_student = {each.name: student or each.name.startswith(("student", "predictions")) for each in fields(value)}
    return replace(
        value, **{name: changed(getattr(value, name), change, student=of) for name, of in of_student.items()}
    )


def leaves_of(comparison: Comparison) -> tuple[Comparison, list[Tensor]]:
    """The comparison with the student's tensors as leaves."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor, student: bool) -> Tensor:
        if student:
            leaves.append(tensor.detach().clone().requires_grad_())
            return leaves[-1]
        return tensor

    return changed(comparison, leaf), leaves


def total_of(loss: Loss, comparison: Comparison) -> Tensor:
    """The weighted sum of all terms, each component as a plain sum."""
    sums = {name: each.total for name, each in components_of(loss, comparison).items()}
    weights, terms = loss.weights(1, 4), loss.terms(sums)
    return sum((weights[name] * term for name, term in terms.items()), start=torch.zeros(()))


def taught(loss: Loss, comparison: Comparison) -> tuple[float, list[Tensor]]:
    given, leaves = leaves_of(comparison)
    total = total_of(loss, given)
    if not total.requires_grad:
        assert not loss.requests
        return total.item(), []
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.item(), [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]


@every_loss
def test_what_its_class_says_is_what_it_does(entry):
    choice, loss = choice_of(entry), loss_of(entry)
    config = config_of(entry)
    assert [each.name for each in signals_of(choice)] == [each.name for each in loss.requests]
    assert [each.concerns for each in signals_of(choice)] == [each.concerns for each in loss.requests]
    assert learns_projection(config) == (loss.projection is not None)
    components = components_of(loss, everything(loss))
    terms = loss.terms({name: each.total for name, each in components.items()})
    assert set(loss.weights(0, 1)) == set(terms) == set(loss.schedules)
    # Every component is in a term, and a term has no other name than its loss's.
    leaves = {name: torch.zeros(()).requires_grad_() for name in components}
    for term in loss.terms(leaves).values():
        term.backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    assert set(composed_of(choice)) == (
        {"loss"} if len(loss.parts) == 1 else {f"loss.parts.{at}" for at in choice.parts}
    )


@every_loss
def test_components_are_sums_over_the_tokens_that_it_counts(entry):
    loss = loss_of(entry)
    comparison = everything(loss)
    for part in loss.parts:
        counted = SCORED if part.counted == "scored" else ALIGNED
        whole = components_of(part, comparison)
        by_text = [
            components_of(part, everything(loss, SCORED & only, ALIGNED & only))
            for only in torch.eye(TEXTS, dtype=torch.bool)[:, :, None]
        ]
        for name, each in whole.items():
            assert each.total.dtype == torch.float32
            assert each.tokens.item() == counted.sum()
            assert [text[name].tokens.item() for text in by_text] == counted.sum(dim=1).tolist()
            summed = sum(text[name].total.item() for text in by_text)
            assert each.total.item() == pytest.approx(summed, rel=1e-5)
            assert summed > 0.01


@every_loss
def test_its_gradient_is_that_of_a_small_step(entry):
    loss = loss_of(entry)
    given, leaves = leaves_of(everything(loss))
    _, gradients = taught(loss, everything(loss))
    for at, gradient in enumerate(gradients):
        direction = draw(*gradient.shape, seed=70 + at)
        direction = direction / direction.norm()
        with torch.no_grad():
            sums = []
            for step in (0.02, -0.02):
                leaves[at].add_(step * direction)
                sums.append(total_of(loss, given).item())
                leaves[at].sub_(step * direction)
        by_difference = (sums[0] - sums[1]) / 0.04
        assert (gradient * direction).sum().item() == pytest.approx(by_difference, rel=0.02, abs=2e-3)


@pytest.mark.parametrize("entry", [each for each in ENTRIES if each.reference is not None], ids=lambda each: each.loss)
def test_it_is_its_plain_reference_and_so_is_its_gradient(entry):
    loss = loss_of(entry)
    ours, our_leaves = leaves_of(everything(loss))
    theirs, their_leaves = leaves_of(everything(loss))
    found = {name: each.total for name, each in components_of(loss, ours).items()}
    expected = entry.reference(theirs)
    assert set(found) == set(expected)
    for name, sum_of in expected.items():
        torch.testing.assert_close(found[name], sum_of, rtol=1e-4, atol=1e-5)
    for total, leaves in ((sum(found.values()), our_leaves), (sum(expected.values()), their_leaves)):
        total.backward()
        assert any(leaf.grad is not None for leaf in leaves)
    for one, other in zip(our_leaves, their_leaves, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("junk", [1e4, math.inf, math.nan])
@every_loss
def test_what_stands_at_padding_changes_nothing(entry, junk):
    loss, real = loss_of(entry), ALIGNED
    # A token predicts the next one: the last of a text predicts nothing that is scored.

    def spoil(tensor: Tensor, student: bool) -> Tensor:
        if tensor.dim() == 2:  # predictions are those of scored tokens alone
            return tensor
        places = real[:, :, None] if tensor.dim() == 3 else real[:, None, :, None] if tensor.dim() == 4 else None
        return torch.where(real[:, None, None, :, None] if places is None else places, tensor, junk)

    clean = everything(loss)
    (value, gradients), (spoiled, after) = taught(loss, clean), taught(loss, changed(clean, spoil))
    assert spoiled == value
    for one, other in zip(gradients, after, strict=True):
        assert torch.equal(one, other)


@every_loss
def test_a_batch_without_any_token_that_counts_gives_0_attached_to_the_graph(entry):
    loss = loss_of(entry)
    nothing = torch.zeros_like(ALIGNED)
    given, leaves = leaves_of(everything(loss, nothing, nothing))
    for each in components_of(loss, given).values():
        assert (each.total.item(), each.tokens.item()) == (0, 0)
        assert each.total.requires_grad
        for gradient in torch.autograd.grad(each.total, leaves, allow_unused=True, retain_graph=True):
            assert gradient is None or (gradient == 0).all()


@every_loss
def test_half_precision_is_summed_in_single(entry):
    loss = loss_of(entry)
    exact = everything(loss)
    half = changed(exact, lambda tensor, _: tensor.bfloat16())
    if loss.projection is not None:
        loss.projection.bfloat16()
    for name, each in components_of(loss, half).items():
        assert each.total.dtype == torch.float32
        expected = components_of(loss_of(entry), exact)[name].total
        assert each.total.item() == pytest.approx(expected.item(), rel=0.05, abs=0.02)


# The step


def test_the_step_divides_each_part_of_a_sum_by_its_own_count():
    entry = Entry("kv+logit")
    loss, comparison = loss_of(entry), everything(loss_of(entry))
    ones = torch.ones(3)
    distiller = Distiller(make_llama(), None, loss, rotated=False, key_variance=ones, value_variance=ones)
    distiller.compare = lambda *given: comparison  # type: ignore[method-assign]
    counts, weights = Counts(scored=16, aligned=48), {"kv_loss": 0.25, "logit_loss": 2.0}
    tokens = scored_tokens(SCORED)
    batch = Batch(tokens, tokens, ALIGNED, Correspondence(tokens.segments, tokens.segments, True), (0, 1, 2))
    result = distiller(batch, TeacherStates(), counts, weights, Phase(True, True))
    sums = {name: each.total for name, each in components_of(loss, comparison).items()}
    kv, logit = (sums["key_loss"] + sums["value_loss"]) / 48, sums["logit_loss"] / 16
    assert result.losses["kv_loss"].item() == pytest.approx(kv.item(), rel=1e-6)
    assert result.losses["logit_loss"].item() == pytest.approx(logit.item(), rel=1e-6)
    # What reaches the student from states is measured apart from predictions.
    assert result.alignment.item() == pytest.approx(0.25 * kv.item(), rel=1e-6)
    task = result.losses["task_loss"].item()
    assert result.total.item() == pytest.approx(task + 0.25 * kv.item() + 2 * logit.item(), rel=1e-6)


@pytest.mark.parametrize(("terms", "teaches"), [("null", (1.0, 1.0)), ("keys", (1.0, 0.0)), ("values", (0.0, 1.0))])
def test_of_keys_and_values_the_chosen_ones_teach(terms, teaches):
    means = {name: torch.tensor(value, requires_grad=True) for name, value in (("key_loss", 2.0), ("value_loss", 3.0))}
    total = loss_of(Entry("kv", (f"loss.terms={terms}",))).terms(means)["kv_loss"]
    assert total.item() == 2.0 * teaches[0] + 3.0 * teaches[1]
    total.backward()
    # Of a term that does not teach the gradient is 0 and not missing, which processes that sum gradients would wait for.
    assert tuple(mean.grad.item() for mean in means.values()) == teaches


def test_parts_of_a_sum_have_weights_on_their_own_schedules():
    entry = Entry(
        "kv+logit",
        (
            "loss.parts.kv.lambda_kv_decay=linear",
            "loss.parts.logit.lambda_logit=2",
            "loss.parts.logit.lambda_logit_warmup_steps=4",
        ),
    )
    loss = loss_of(entry)
    assert [loss.weights(step, 5) for step in (0, 4)] == [
        {"kv_loss": 0.5, "logit_loss": 0.5},
        {"kv_loss": 0.0, "logit_loss": 2.0},
    ]


def test_two_parts_with_a_term_of_one_name_are_refused():
    kv = choice_of(Entry("kv"))
    with pytest.raises(ValueError, match=r"loss.parts=\['a', 'b'\] is not allowed: two of them give kv_loss"):
        Combined(pairing(), parts={"a": kv, "b": kv})


def test_a_user_combines_any_losses_in_yaml_alone(tmp_path: Path):
    folder = tmp_path / "loss"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "defaults:\n  - kv+struct@parts.kv\n  - hidden@parts.hidden\n  - relations@parts.relations\n  - _self_\n"
        "name: mine\n_target_: kv_align.losses.combined.Combined\n"
    )
    config, notes = compose_config(["loss=mine", "loss.parts.hidden.layers=[0]"], config_dir=str(tmp_path))
    loss = make_loss(config.loss, pairing)
    assert notes == []
    assert set(loss.weights(0, 1)) == {"kv_loss", "struct_loss", "hidden_loss", "relation_loss"}
    assert [signal.name for signal in loss.requests] == ["keys_values_queries", "hidden_states", "relations"]
    assert loss.projection is not None
