"""README's examples of an aligner and a loss of one's own do what they say, together, in a run."""

import math
from pathlib import Path

from kv_align.config.compose import compose_config
from kv_align.experiment.experiment import run
from kv_align.runs.run_dir import RunDirectory, read_rows
from tests import readme
from tests.short_runs import SHORT


def test_a_run_with_the_aligner_and_the_loss_that_readme_shows(tmp_path: Path) -> None:
    overrides = [*SHORT, "aligner=mine", "aligner.rank=4", "loss=mine"]
    config, notes = compose_config(overrides, config_dir=str(readme.written() / "conf"))
    assert notes == ["init=uniform has no effect on aligner=mine: left out."]
    assert run(config, tmp_path) == "finished"
    rows = read_rows(RunDirectory(tmp_path).metrics_file)
    assert len(rows) == 6
    for row in rows:
        assert math.isclose(row["total_loss"], row["task_loss"] + 0.5 * row["values_loss"], rel_tol=1e-5)
        assert row["kv_grad_norm"] > 0
        assert row["aligner_grad_norm"] > 0
    assert rows[-1]["values_loss"] != rows[0]["values_loss"]
