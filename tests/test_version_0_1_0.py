"""A sweep that version 0.1.0 left, of which one run was interrupted and one not begun, is read, gone on with and reported.

`version_0_1_0/` was written by that version (commit b82a153) with a pair of models of some thousand parameters: the plan, two
finished runs and one that was asked to leave at step 3 of 6. `undisturbed.json` is what the latter gave there when it was
left alone. Paths in it are absolute, as that version froze them, so the pair is put where it was.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.__main__ import main as analyse
from kv_align.config.config import Config
from kv_align.config.identity import content_hash
from kv_align.config.schema import validate
from kv_align.runs.run_dir import RunDirectory, read_rows
from kv_align.runs.sweep_dir import Plan, SweepDirectory
from launch.__main__ import main as launch

LEFT = Path(__file__).parent / "version_0_1_0"
PAIR = Path("/tmp/kv-align-0.1.0")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SweepDirectory]:
    shutil.copytree(LEFT / "pair", PAIR, dirs_exist_ok=True)
    path = tmp_path_factory.mktemp("sweeps") / "old"
    shutil.copytree(LEFT / "sweep", path)
    yield SweepDirectory(path)
    shutil.rmtree(PAIR)


def plan_of(sweep: SweepDirectory) -> Plan:
    plan = sweep.plan()
    assert plan is not None
    return plan


def test_its_runs_have_the_hashes_that_they_had(sweep: SweepDirectory) -> None:
    configs = [validate(Config, run.config) for run in plan_of(sweep).runs]
    assert [content_hash(config) for config in configs] == [run.content_hash for run in plan_of(sweep).runs]
    assert {config.aligner.target for config in configs} == {
        "kv_align.align.flat.FlatMap",
        "kv_align.align.structured.StructuredMap",
    }
    assert {config.loss.target for config in configs} == {"kv_align.losses.kv.KeyValue"}


def test_it_is_shown_resumed_and_reported(sweep: SweepDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {run.id.rpartition("-")[0]: sweep.run(run) for run in plan_of(sweep).runs}
    interrupted = runs["v4_0_2-kv-seed1"]
    finished = [runs["baseline-kv-seed0"], runs["v4_0_2-kv-seed0"]]
    before = [run.summary_file.read_bytes() for run in finished]
    assert launch(["status", str(sweep.path)]) in (0, 1)
    shown = capsys.readouterr().out
    assert "old: 2 done" in shown
    assert launch(["resume", str(sweep.path)]) == 0, capsys.readouterr().err
    assert {status_of(run) for run in runs.values()} == {"finished"}
    assert [run.summary_file.read_bytes() for run in finished] == before
    told = json.loads((LEFT / "undisturbed.json").read_text())
    rows = read_rows(interrupted.metrics_file)
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert [row["total_loss"] for row in rows] == pytest.approx(told["total_loss"], rel=1e-3)
    assert json.loads(interrupted.summary_file.read_text())["validation_loss"] == pytest.approx(
        told["validation_loss"], rel=1e-3
    )
    assert len(provenance_of(interrupted)["attempts"]) == 2
    assert provenance_of(interrupted)["criteria_sha256"] == plan_of(sweep).criteria_hash
    capsys.readouterr()
    assert analyse(["report", str(sweep.path)]) == 0, capsys.readouterr().err
    assert "perplexity than baseline" in capsys.readouterr().out
    assert (sweep.report / "report.md").is_file()


def status_of(run: RunDirectory) -> str:
    status = run.status()
    assert status is not None
    return status.state


def provenance_of(run: RunDirectory) -> dict[str, list[dict[str, dict[str, str]]]]:
    result = json.loads(run.provenance_file.read_text())
    assert isinstance(result, dict)
    return result
