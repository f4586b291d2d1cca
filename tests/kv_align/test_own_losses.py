"""A loss of the user's own that is not what a loss must be is one sentence, and the README's is right."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_align.config.schema import Choice
from kv_align.experiment.choices import make_loss
from kv_align.runs.errors import ConfigError

MINE = """
from kv_align.losses.base import Loss, Schedule


class Mine(Loss):
    signals = ("keys_values",)
    counted = "aligned"

    def __init__(self, *, weight: float) -> None:
        self.schedules = {"mine_loss": Schedule(weight)}

    def components(self, comparison):
        return {}
"""
Made = Callable[[str], Any]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Makes the loss of a source."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str) -> Any:
        (tmp_path / "my_loss.py").write_text(source)
        sys.modules.pop("my_loss", None)
        choice = Choice.model_validate({"name": "mine", "_target_": "my_loss.Mine", "weight": 0.5})
        return make_loss(choice, lambda: pytest.fail("it asks for no pairing"))

    yield make
    sys.modules.pop("my_loss", None)


def test_what_a_loss_must_be(made: Made) -> None:
    assert made(MINE).weights(0, 1) == {"mine_loss": 0.5}


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        ('    counted = "aligned"\n', "", "loss=mine is not allowed: Mine.counted is None and must be 'scored' or"),
        (
            '"aligned"',
            '"tokens"',
            "loss=mine is not allowed: Mine.counted is 'tokens' and must be 'scored' or 'aligned'",
        ),
        (
            "def components",
            "def parts_of",
            "_target_=my_loss.Mine is not allowed: Can't instantiate abstract class Mine",
        ),
        ("from kv_align", "import nothing_here\nfrom kv_align", "_target_=my_loss.Mine is not allowed: .*nothing_here"),
        ("self.schedules", "raise ValueError('weight is odd')\n        self.schedules", "mine: weight is odd."),
    ],
)
def test_what_it_must_not_be_is_one_sentence(made: Made, right: str, wrong: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        made(MINE.replace(right, wrong, 1))
    assert "\n" not in str(refused.value)


def test_a_term_without_a_component_is_named(made: Made) -> None:
    with pytest.raises(ConfigError, match=r"Mine has the terms mine_loss in its schedules .*: give mine_loss in"):
        made(MINE).terms({"other": torch.zeros(())})
