"""The benchmark of a GPU runs from end to end where there is none, at tiny sizes, and writes what it found."""

import json

import pytest
import torch

from tests.benchmarks.bench_gpu import main


@pytest.mark.slow
def test_every_part_runs_and_is_in_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "numbers.json"
    main(["--pair", "tiny", "--at-once", "2", "--steps", "2", "--json", str(file)])
    numbers = json.loads(file.read_text())["numbers"]
    for step in (
        "plain transformers",
        "floor",
        "structured kv",
        "flat kv",
        "structured kv+struct",
        "logit distillation",
    ):
        assert numbers[f"tiny, ms: {step}"] > 0
    assert numbers["tiny: filling a cache / the teacher alone"] > 0
    assert [numbers[f"small runs that failed, {number} at once"] for number in (1, 2)] == [0, 0]
    assert numbers["small runs an hour, 2 at once / one at a time"] > 0


def test_a_pair_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--pair", "huge"])
    assert left.value.code == 2
    assert "huge" in capsys.readouterr().err
