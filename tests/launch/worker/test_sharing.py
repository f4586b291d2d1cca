"""Which runs share a GPU: pure decisions, and pretended GPUs on which real processes run out of memory."""

import json

import pytest

from kv_align.runs.run_dir import Status
from kv_align.runs.sweep_dir import SweepDirectory
from launch.executors.registry import load_cluster
from launch.journal.attempts import end_attempt
from launch.journal.journal import Journal
from launch.worker.sharing import Sharing, is_put_back, shared_out
from tests.launch.sweeps import undisturbed


def trained(step, peak_gb=None, gpu_gb=None, state="running"):
    return Status(state, "", "a", "kv", 0, "h", step, 6, 1, 0.0, 0.0, "host", 1, "", peak_gb, gpu_gb)


def test_the_first_run_is_measured_before_another_joins_it():
    sharing = Sharing(4)
    assert sharing.admits("a", [], set())
    assert not sharing.admits("b", ["a"], set())
    sharing.observe("a", None)
    sharing.observe("a", trained(1, 10.0, 80.0))  # the optimizer's state and the next activations are still to come
    assert not sharing.admits("b", ["a"], set())
    sharing.observe("a", trained(5, 10.0, 80.0, "failed"))  # of an earlier attempt, or about to end
    assert not sharing.admits("b", ["a"], set())
    sharing.observe("a", trained(2, 10.0, 80.0))
    assert sharing.admits("b", ["a"], set())


@pytest.mark.parametrize(("peak_gb", "fit"), [(10.0, 7), (12.0, 6), (37.0, 2), (38.0, 1), (79.0, 1)])
def test_as_many_fit_as_the_measured_peak_leaves_room_for(peak_gb, fit):
    """95 % of 80 GB for tensors and .6 GB of context each: 7 x 10.6 = 74.2 fit into 76, 8 do not."""
    sharing, running = Sharing(20), ["0"]
    sharing.observe("0", trained(2, peak_gb, 80.0))
    while sharing.admits("next", running, set()):
        running.append(str(len(running)))
    assert len(running) == fit


def test_a_run_that_is_not_measured_is_expected_to_take_what_the_largest_takes():
    sharing = Sharing(20)
    sharing.observe("small", trained(2, 5.0, 80.0))
    sharing.observe("large", trained(6, 60.0, 80.0, "finished"), ended=True)
    assert not sharing.admits("new", ["small"] * 3, set())
    assert sharing.admits("small", ["small"], set())


def test_no_more_than_were_asked_for_and_nobody_beside_one_that_is_alone():
    sharing = Sharing(2)
    sharing.observe("a", trained(2, 1.0, 80.0))
    assert not sharing.admits("c", ["a", "b"], set())
    assert not sharing.admits("b", ["a"], {"b"})
    assert not sharing.admits("b", ["a"], {"a"})
    assert sharing.admits("b", [], {"b"})


def test_what_did_not_fit_is_not_tried_again():
    sharing = Sharing(8)
    sharing.observe("a", trained(2, 1.0, 80.0))
    sharing.did_not_fit(3)
    assert sharing.admits("d", ["a", "b", "c"], set()), "one run may be larger than the others"
    sharing.did_not_fit(3)
    assert sharing.admits("b", ["a"], set())
    assert not sharing.admits("c", ["a", "b"], set())
    sharing.did_not_fit(1)
    assert sharing.most == 1


@pytest.mark.parametrize(
    ("cores", "at_once", "most", "threads", "workers"),
    [(16, 4, 8, "4", "4"), (16, 4, 2, "2", "4"), (2, 8, 1, "1", "1"), (7, 2, 7, "3", "3")],
)
def test_cores_are_shared_out(cores, at_once, most, threads, workers):
    assert shared_out(cores, at_once, most) == {"OMP_NUM_THREADS": threads, "KV_ALIGN_DATA_WORKERS": workers}


def test_out_of_memory_beside_others_is_no_attempt_of_the_run_and_alone_it_is(tmp_path):
    sweep, policy = SweepDirectory(tmp_path), load_cluster("local", {}).retry
    journal = Journal(sweep)

    def ends(cause, **how):
        again = end_attempt(sweep, journal, "run", "u", cause, policy, 1, **how)
        return again, is_put_back(journal.attempts("run"))

    assert ends("out_of_memory", shared=True) == (True, True)
    assert ends("out_of_memory") == (False, False)
    assert ends("code_error", shared=True) == (False, False)


def packed(sweep, gpu):
    """(run, how many were on the GPU when it took its memory), in the order in which they did."""
    lines = (sweep.path / f"gpu-{gpu}" / "at_once.txt").read_text().split()
    return list(zip(lines[::2], map(int, lines[1::2]), strict=True))


def test_runs_share_gpus_by_the_memory_of_the_first(standin, monkeypatch, tmp_path):
    """Two pretended GPUs of 10 GB, runs of 2.5: 3 x 3.1 fit into 9.5, and 4 do not, though 8 may share one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "11,12")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    behaviour = {"gpu_gb": 10.0, "peak_gb": {"": 2.5}, "step_s": 0.2, "threads": True}
    # Long enough for three to meet where starting one takes seconds.
    words = ("seeds=4", "cluster.slots=null", "cluster.runs_per_gpu=8", "trainer.max_steps=30")
    sweep = standin(*words, behaviour=behaviour)
    sweep.submit()
    sweep.wait_done(120)
    at_once = [number for gpu in (11, 12) for _, number in packed(sweep, gpu)]
    assert len(at_once) == 12
    assert max(at_once) == 3
    assert all(sweep.starts(run.id) == 1 for run in sweep.runs())
    assert {(sweep.directory.run(run).path / "threads.txt").read_text() for run in sweep.runs()} == {"1"}


def test_a_run_that_is_out_of_memory_beside_others_is_put_back_and_done_alone(standin, monkeypatch, tmp_path):
    """The first run takes 3 of 10 GB, so a second is let in; that takes 8, which nobody could know."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "13")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    behaviour = {"gpu_gb": 10.0, "peak_gb": {"": 3.0, "v4_0_2": 8.0}, "step_s": 0.2}
    words = ("seeds=1", "cluster.slots=null", "cluster.runs_per_gpu=2", "trainer.max_steps=24")
    sweep = standin(*words, behaviour=behaviour)
    sweep.submit()
    sweep.wait_done(120)
    assert sweep.weights() == {run.id: undisturbed(run) for run in sweep.runs()}
    heavy = sweep.id_of("v4_0_2")
    assert {run.id: sweep.starts(run.id) for run in sweep.runs()} == {
        run.id: 1 + (run.id == heavy) for run in sweep.runs()
    }
    end = attempts(sweep, heavy, "end")[0]
    assert (end["cause"], end["retry"], end["shared"]) == ("out_of_memory", True, True)
    assert [number for name, number in packed(sweep, 13) if name == heavy] == [2, 1], "the second time it is alone"


def attempts(sweep, name, event):
    file = sweep.path / "launch" / "attempts" / f"{name}.jsonl"
    return [row for row in map(json.loads, file.read_text().splitlines()) if row["event"] == event]
