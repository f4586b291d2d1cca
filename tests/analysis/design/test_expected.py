"""What two configurations differ in, in a reader's words."""

import pytest

from analysis.design.expected import differing_choices

ONE = {
    "arm": "v4_0_2",
    "seed": 0,
    "output_dir": "a",
    "aligner": {"name": "structured", "share_dim_proj": True},
    "loss": {"name": "kv", "lambda_kv": 0.5, "terms": ["keys", "values"]},
    "align": {"fit": "joint"},
    "keys": {"name": "unrotated"},
    "trainer": {"name": "quick", "aligner_lr": 1e-5},
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, ()),
        ({"arm": "other", "seed": 7, "output_dir": "b"}, ()),
        ({"loss": {"name": "kv", "lambda_kv": 6, "terms": ["values"]}}, ("loss.lambda_kv", "loss.terms")),
        ({"loss": {"name": "logit_kd", "lambda_logit": 2}}, ("loss",)),
        ({"aligner": None, "align": None, "keys": None}, ("align", "aligner", "keys")),
        ({"align": {"fit": "frozen"}}, ("align.fit",)),
        ({"trainer": {"name": "quick", "aligner_lr": None}}, ("trainer.aligner_lr",)),
        ({"aligner": {"name": "structured"}}, ("aligner.share_dim_proj",)),
    ],
)
def test_choices_are_named_alone_and_options_with_their_group(change, named):
    assert differing_choices(ONE, {**ONE, **change}) == named
    assert differing_choices({**ONE, **change}, ONE) == named


def test_of_what_could_not_be_read_nothing_is_said():
    assert differing_choices(ONE, {}) == differing_choices({}, ONE) == ()
