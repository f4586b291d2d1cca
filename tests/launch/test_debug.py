"""The real trainer through the whole of launch, in this process."""

import json
import subprocess
import sys
import time

from tests.launch.sweeps import Sweep, launch


def test_a_sweep_in_process_by_the_real_trainer(tmp_path):
    sweep = Sweep("sweep=tiny", "cluster=debug", "seeds=1", "trainer.max_steps=2", f"output_dir={tmp_path}")
    told = sweep.submit()
    assert "run 3 of 3: none-ce-seed0" in told.out
    assert sweep.counts() == {"done": 3}
    assert sweep.state("v4_0_2").step == 2
    assert sweep.submit().err.endswith("nothing to queue\n")
    student = sweep.path / "runs" / sweep.id_of("v4_0_2") / "student"
    (student / "model.safetensors").unlink()
    assert sweep.counts() == {"done": 2, "failed": 1}
    assert launch("resume", str(sweep.path)).code == 0
    assert sweep.counts() == {"done": 3}


def test_who_waits_gets_the_report_and_an_exit_code_that_is_true(tmp_path, capfd):
    sweep = Sweep("sweep=tiny", "cluster=debug", "seeds=1", "trainer.max_steps=2", f"output_dir={tmp_path}")
    sweep.submit("--wait")
    page = sweep.path / "report" / "report.html"
    assert page.is_file()
    assert str(page) in capfd.readouterr().out
    unplanned = sweep.path / "runs" / sweep.id_of("none")
    (unplanned / "student" / "model.safetensors").unlink()
    told = launch(*sweep.words, "--wait")
    assert told.code == 1, "submitting again does not repeat what failed"
    assert "2 done, 1 failed" in told.out


def test_status_while_it_works_what_it_printed_and_an_exit_code_that_is_true(standin):
    behaviour = {"hang_at": {"v4_0_2": 3}, "raise_at": {"baseline": 3}}
    sweep = standin("cluster=debug", "seeds=1", behaviour=behaviour)
    command = [sys.executable, "-m", "launch", *sweep.words]
    submitter = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not sweep.directory.plan_file.exists():
        assert submitter.poll() is None, submitter.stdout.read()
        time.sleep(0.05)
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


def test_the_sizes_of_the_artefacts_are_on_record(tmp_path):
    sweep = Sweep("sweep=tiny", "cluster=debug", "seeds=1", "trainer.max_steps=2", f"output_dir={tmp_path}")
    sweep.submit()
    directory = sweep.directory.run(next(run for run in sweep.runs() if run.arm == "v4_0_2"))
    sizes = json.loads(directory.summary_file.read_text())["artefacts"]
    assert set(sizes) == {"aligner/aligner.safetensors", "outcomes.parquet", "student/model.safetensors"}
    assert all((directory.path / name).stat().st_size == size > 0 for name, size in sizes.items())
    assert directory.is_complete()
    with directory.outcomes_file.open("ab") as file:
        file.write(b"x")
    assert not directory.is_complete()
