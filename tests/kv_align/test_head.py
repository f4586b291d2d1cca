"""Heads that are found, and models that make their logits otherwise."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kv_align.models.head import Bend, find_head
from tests.families import FAMILIES, SHAPE, Family

CAPPED = Family("Gemma2", SHAPE | {"head_dim": 8, "final_logit_softcapping": 3.0})
SCALED = Family("Granite", SHAPE | {"logits_scaling": 8.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "bend"),
    [
        (FAMILIES["llama"], Bend()),
        (FAMILIES["phi"], Bend()),
        (CAPPED, Bend(cap=3.0)),
        (SCALED, Bend(scale=0.125)),
        (FAMILIES["cohere"], Bend(scale=0.0625)),
    ],
)
def test_caps_and_scales_are_found(family: Family, bend: Bend, dtype: torch.dtype) -> None:
    model = family.make(dtype=dtype)
    head = find_head(model)
    assert head is not None
    assert head.bend == bend
    assert head.linear is model.get_output_embeddings()
    assert (head.linear.bias is not None) == (family is FAMILIES["phi"])


def test_looking_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["llama"].make().train()
    find_head(model)
    assert model.training
    assert all(each.grad is None for each in model.parameters())


def test_a_model_that_does_more_than_its_configuration_says_makes_its_logits_itself() -> None:
    model = FAMILIES["llama"].make()
    forward = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = forward(self, *args, **kwargs)
            output.logits = output.logits + 0.01 * output.logits.roll(1, dims=-1)
            return output

    model.__class__ = Shifted
    assert find_head(model) is None


def test_a_head_that_is_no_plain_linear_layer_is_left_alone() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrized, wrapped = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    parametrize.register_parametrization(parametrized.lm_head, "weight", Double())
    assert find_head(parametrized) is None
    wrapped.lm_head.forward = wrapped.lm_head.forward  # as Accelerate does where a model is spread over devices
    assert find_head(wrapped) is None


def test_logits_that_are_all_zero_tell_nothing() -> None:
    model = FAMILIES["llama"].make()
    nn.init.zeros_(model.lm_head.weight)
    assert find_head(model) is None
