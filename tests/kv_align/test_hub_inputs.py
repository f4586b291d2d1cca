"""What is given by a name on the hub is known when it was read: it is in the provenance, and a change of it is refused."""

import json
from pathlib import Path

import pytest

from analysis.design.pairing import audit
from kv_align.config.compose import compose_config
from kv_align.config.identity import content_hash
from kv_align.experiment.start import start
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_json
from tests.short_runs import SHORT


def write_texts(folder: Path, words: str) -> None:
    rows = [json.dumps({"text": f"{words} {number}, and so on."}) for number in range(60)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")


def row_of(run: RunDirectory) -> dict[str, str]:
    """As the analysis reads it."""
    provenance = read_json(run.provenance_file) or {}
    hashes = {name: str(value) for name, value in provenance.items() if name.endswith("_sha256")}
    return hashes | {"inputs": json.dumps(provenance["inputs"])}


def test_a_data_set_of_the_hub_that_changed_is_neither_gone_on_with_nor_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"  # a folder is a name that `datasets` takes without a network
    hub.mkdir()
    settings = ("data=text", f"data.hub_name={hub}", "evaluation.exact_match_examples=0", "loss=ce", "aligner=none")
    config, _ = compose_config([*SHORT, *settings])
    assert config.inputs is not None
    assert "data" not in config.inputs
    runs = [RunDirectory(tmp_path / name) for name in ("before", "after")]
    for run, words in zip(runs, ("A text", "Another text"), strict=True):
        write_texts(hub, words)
        start(config, run, run.checkpoints)
    before, after = map(row_of, runs)
    known, now = json.loads(before["inputs"]), json.loads(after["inputs"])
    assert {name for name in known if known[name] != now[name]} == {"data"}
    assert known.keys() - config.inputs.keys() == {"data"}
    assert "the input data differs" in audit(before, after)
    assert audit(before, before) == ""
    assert content_hash(config) == content_hash(compose_config([*SHORT, *settings])[0])
    start(config, runs[1], runs[1].checkpoints)
    with pytest.raises(
        ConfigError, match=rf"^data\.hub_name={hub} has changed since {runs[0].path} was begun with it: "
    ):
        start(config, runs[0], runs[0].checkpoints)
