"""Numbers as they are printed."""

import pytest

from analysis.words import p_number


@pytest.mark.parametrize(
    ("p", "printed"),
    [
        (0.0078125, "0.0078"),
        (0.047, "0.047"),
        (0.0497, "0.0497"),
        (0.04999, "0.04999"),
        (0.05, "0.050"),
        (0.0501, "0.0501"),
        (0.00999, "0.00999"),
        (0.0996, "0.0996"),
        (0.102, "0.102"),
        (0.25, "0.25"),
        (1.0, "1.00"),
        (0.00003, "< 0.0001"),
    ],
)
def test_a_p_value_is_not_rounded_to_a_level_that_it_is_not(p, printed):
    assert p_number(p) == printed
