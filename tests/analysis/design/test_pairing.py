"""Which runs may be paired: same data order, same student start, same inputs."""

import json

import pytest

from analysis.design.pairing import audit

HASHES = {"data_order_sha256": "o", "initial_weights_sha256": "w"}
INPUTS = {"data": "d" * 64, "teacher weights": "t" * 64, "student tokenizer": "k" * 64, "source aligner": "a" * 64}


def row(**inputs: str | None) -> dict[str, object]:
    return HASHES | {"inputs": json.dumps({**INPUTS, **inputs})}


def test_runs_that_read_the_same_are_paired():
    assert audit(row(), row()) == ""


@pytest.mark.parametrize("name", ["data", "teacher weights", "student tokenizer", "anything else"])
def test_runs_that_read_something_else_are_refused_and_what_differs_is_named(name):
    before, now = {name: "1" * 64}, {name: "2" * 64}
    assert audit(row(**before), row(**now)) == f"the input {name} differs (11111111 and 22222222)"


def test_an_input_that_only_one_run_has_is_named():
    assert audit(row(**{"student weights": "1" * 64}), row()) == "the input student weights differs (11111111 and none)"


def test_the_source_of_an_aligner_may_differ():
    assert audit(row(**{"source aligner": "1" * 64}), row(**{"source aligner": "2" * 64, "source loss": "3"})) == ""


def test_an_arm_without_a_teacher_is_paired_with_one_that_has_it():
    without = HASHES | {"inputs": json.dumps({name: each for name, each in INPUTS.items() if "teacher" not in name})}
    assert audit(row(), without) == ""


@pytest.mark.parametrize("unknown", ["", None])
def test_runs_of_the_first_version_recorded_no_inputs_and_are_paired(unknown):
    assert audit(row(), HASHES | {"inputs": unknown}) == ""
    assert audit(HASHES | {"inputs": unknown}, HASHES | {"inputs": unknown}) == ""
    assert audit(dict(HASHES), dict(HASHES)) == ""


def test_several_differences_are_all_named():
    other = row(data="1" * 64) | {"data_order_sha256": "x"}
    assert audit(row(), other) == "the data order differs (o and x); the input data differs (dddddddd and 11111111)"
