"""What a step dispatches above plain transformers, at a real model's depth: nothing that grows with layers, no waiting."""

import pytest
import torch

from tests.benchmarks.compare import compared
from tests.benchmarks.operators import ROWS, Found, make_wide_models, measure_operators

LAYERS = 28


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    """At a small vocabulary and length, of which no count depends but that of the chunks."""
    torch.manual_seed(0)
    measured = measure_operators(make_wide_models(LAYERS, vocabulary=512), length=16)
    return dict(zip((row.name for row in ROWS), measured, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_step_dispatches_few_operators_above_plain_transformers(row, found):
    assert -100 < found[row.name].above <= row.goal


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_step_never_makes_the_host_wait(row, found):
    # Beside what the library does: it looks whether the mask hides anything, of teacher and student each.
    assert found[row.name].waits <= 0


def test_numbers_of_two_benchmarks_are_laid_side_by_side():
    assert compared({"a": 1.0, "b": 2.0}, {"b": 3.0, "c": 4.0}) == [("a", 1.0, None), ("b", 2.0, 3.0), ("c", None, 4.0)]
