"""The real trainer through the whole of launch, in this process."""

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
