"""The real trainer through the whole of launch, in this process."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from kv_align.runs.run_dir import RunDirectory
from tests.launch.sweeps import Sweep, launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sweep of three runs by the real trainer, waited for; and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    sweep = Sweep("sweep=tiny", "cluster=debug", "seeds=1", "trainer.max_steps=2", f"output_dir={folder}")
    return sweep, sweep.submit("--wait")


def test_a_sweep_in_process_by_the_real_trainer_ends_with_its_report(trained):
    sweep, told = trained
    assert "run 3 of 3: none-ce-seed0" in told.out
    assert sweep.counts() == {"done": 3}
    assert sweep.state("v4_0_2").step == 2
    assert (sweep.path / "report" / "report.html").is_file()
    assert sweep.submit().err.endswith("nothing to queue\n")


def test_the_sizes_of_the_artefacts_are_on_record(trained, tmp_path):
    sweep, _ = trained
    run = next(run for run in sweep.runs() if run.arm == "v4_0_2")
    directory = RunDirectory(shutil.copytree(sweep.directory.run(run).path, tmp_path / "copy"))
    sizes = json.loads(directory.summary_file.read_text())["artefacts"]
    assert set(sizes) == {"aligner/aligner.safetensors", "outcomes.parquet", "student/model.safetensors"}
    assert all((directory.path / name).stat().st_size == size > 0 for name, size in sizes.items())
    assert directory.is_complete()
    with directory.outcomes_file.open("ab") as file:
        file.write(b"x")
    assert not directory.is_complete()


def test_a_lost_artefact_fails_the_run_for_who_waits_until_it_is_resumed(done, monkeypatch):
    sweep = done("seeds=1")
    (sweep.path / "runs" / sweep.id_of("none") / "student" / "model.safetensors").unlink()
    reports = []
    monkeypatch.setattr("launch.__main__.write_report", lambda path: reports.append(path) or 0)
    told = launch(*sweep.words, "--wait")
    assert (told.code, reports) == (1, [sweep.path]), "submitting again does not repeat what failed"
    assert "2 done, 1 failed" in told.out
    assert launch("resume", str(sweep.path)).code == 0
    assert sweep.counts() == {"done": 3}


def submitting(sweep):
    """A process that submits the sweep, and has frozen its plan."""
    command = [sys.executable, "-m", "launch", *sweep.words]
    submitter = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not sweep.directory.plan_file.exists():
        assert submitter.poll() is None, submitter.stdout.read()
        time.sleep(0.05)
    return submitter


def test_status_while_it_works_what_it_printed_and_an_exit_code_that_is_true(standin):
    behaviour = {"hang_at": {"v4_0_2": 3}, "raise_at": {"baseline": 3}}
    sweep = standin("cluster=debug", "seeds=1", behaviour=behaviour)
    submitter = submitting(sweep)
    sweep.wait_step("v4_0_2", 2)
    assert sweep.counts() == {"running": 1, "pending": 1, "failed": 1}
    sweep.behave({})
    submitter.terminate()
    printed, _ = submitter.communicate(timeout=60)
    assert submitter.returncode == 1
    assert sweep.state("baseline").reason == "RuntimeError: made to fail at step 3"
    assert "baseline" in (sweep.path / "logs" / f"{sweep.id_of('baseline')}.log").read_text()
    assert f"{sweep.id_of('v4_0_2')} from step 0" in printed
    assert sweep.counts() == {"failed": 2, "lost": 1}, "it was asked to leave, and nobody does the third one any more"
    again = [sys.executable, "-m", "launch", "resume", str(sweep.path)]
    assert subprocess.run(again, stdout=subprocess.DEVNULL, check=False, timeout=120).returncode == 0
    assert sweep.counts() == {"done": 3}


def test_a_cancel_is_honoured_while_it_works(standin):
    sweep = standin("cluster=debug", "seeds=2", behaviour={"hang_at": {"baseline-kv-seed0": 3}})
    submitter = submitting(sweep)
    sweep.wait_step("baseline-kv-seed0", 2)
    assert launch("cancel", str(sweep.path), "baseline").out == "2 runs cancelled\n"
    printed, _ = submitter.communicate(timeout=60)
    assert submitter.returncode == 1, printed
    assert sweep.counts() == {"done": 4, "cancelled": 2}, "the others were done"
    assert sweep.directory.run(sweep.runs()[0]).status().state == "interrupted", "with a checkpoint"
    assert not sweep.directory.run(sweep.runs()[1]).path.exists()
    sweep.behave({})
    again = [sys.executable, "-m", "launch", "resume", str(sweep.path)]
    assert subprocess.run(again, capture_output=True, check=False, timeout=120).returncode == 0
    assert sweep.counts() == {"done": 6}
