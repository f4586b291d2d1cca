"""What used to be a traceback, or a wrong guess, on an unlucky folder."""

import errno
import json
from types import SimpleNamespace

import pytest

from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory
from launch import preflight
from launch.planning.cost import estimate
from launch.status.judgement import select
from tests.launch.sweeps import CONF, launch


def test_a_folder_that_cannot_be_written_is_one_sentence(done):
    sweep = done("seeds=1")
    lock = sweep.path / "launch" / "lock"
    lock.unlink()
    lock.mkdir()  # for root, whom no permission stops
    for words in (("cancel",), ("extend", "seeds=2"), ("resume",)):
        told = launch(words[0], str(sweep.path), *words[1:])
        assert (told.code, told.err.count("\n")) == (2, 1)
        assert "cannot be changed: Is a directory" in told.err


def test_any_other_error_of_the_system_is_one_sentence(done, monkeypatch):
    sweep = done("seeds=1")

    def broken(path):
        raise OSError(errno.EIO, "Input/output error", "/some/file")

    monkeypatch.setattr("launch.status.lookup.open_sweep", broken)
    told = launch("status", str(sweep.path))
    assert (told.code, told.err) == (
        2,
        "launch: /some/file cannot be used: Input/output error; see to that and run this again.\n",
    )


def test_a_plan_directly_below_the_root_and_a_run_without_configuration(tmp_path, done, monkeypatch):
    sweep = done("seeds=1")
    plan = sweep.directory.plan()
    sweep.directory.run(plan.runs[0]).config_file.unlink()
    assert "CPU-hours" in estimate(plan.runs[1:2], tmp_path, 0)
    for damaged in ("- no mapping\n", "seed: 0\n"):  # of another version, or of somebody's editor
        sweep.directory.run(plan.runs[2]).config_file.write_text(damaged)
        assert "CPU-hours" in estimate(plan.runs[1:2], tmp_path, 0)
    assert launch(*sweep.words, "--dry-run").code == 0
    monkeypatch.setattr("launch.planning.cost._EARLIER", 0)
    moved = type("Sweep", (), {"plan": lambda self: plan, "path": type(tmp_path)("/sweep")})()
    monkeypatch.setattr("launch.status.lookup.open_sweep", lambda path: moved)
    assert launch("plan", "/sweep").code == 0


def test_a_file_system_without_locks_is_known_before_anything_is_written(tmp_path, monkeypatch):
    def no_flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("launch.preflight.fcntl.flock", no_flock)
    told = launch("submit", "sweep=demo", "cluster=local", f"output_dir={tmp_path}")
    assert told.code == 2
    assert "its file system has no locks (flock: Function not implemented)" in told.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["null", "12", "a/b", "../up", "''", "two words"])
def test_a_sweep_has_a_plain_name(name, tmp_path):
    words = ("submit", "sweep=tiny", "cluster=local", f"sweep.name={name}", f"output_dir={tmp_path}")
    told = launch(*words, "--config-dir", str(CONF))
    assert told.code == 2
    assert told.err.startswith("launch: sweep.name=")
    assert "set sweep.name to a plain name" in told.err


def test_the_start_of_an_id_is_whole_words_or_names_one_run():
    runs = [f"baseline-kv-seed{seed}-abc{seed}" for seed in (1, 10, 11)] + ["v4_0_1-kv-seed1-f"]

    def found(wanted):
        return select(runs, wanted)

    assert found("baseline-kv-seed1") == ["baseline-kv-seed1-abc1"]
    assert found("baseline-kv-seed1-abc1") == ["baseline-kv-seed1-abc1"]
    assert len(found("baseline-kv-")) == len(found("baseline")) == 3
    assert found("v4") == ["v4_0_1-kv-seed1-f"]
    assert found("base") == found("baseline-kv-seed") == []


def test_the_start_of_several_ids_cancels_none(standin):
    sweep = standin("seeds=12", "cluster.slots=1", behaviour={"step_s": 1.0})
    sweep.submit()
    told = launch("cancel", str(sweep.path), "baseline-kv-see")
    assert told.code == 2
    assert "baseline-kv-see is the start of 12 runs of" in told.err
    assert "1 runs cancelled" in launch("cancel", str(sweep.path), "baseline-kv-seed1").out
    assert [sweep.state(f"baseline-kv-seed{seed}-").state for seed in (1, 10)] == ["cancelled", "pending"]


def test_the_disk_check_reads_how_many_numbers_there_are_in_whatever_precision(tmp_path, monkeypatch):
    header = {"__metadata__": {}, "a": {"dtype": "BF16", "shape": [30, 10]}, "b": {"dtype": "F32", "shape": [7]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path))
    assert preflight._numbers("some/model") == preflight._numbers(str(tmp_path)) == 307
    assert preflight._numbers("embedded") == 324_864
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    assert preflight._numbers(str(tmp_path)) == 0


def test_the_disk_must_hold_what_runs_keep_and_the_checkpoints_of_those_at_once(standin, monkeypatch):
    """1e9 numbers: 4 GB a student that is kept, 12 a checkpoint, two of them while one is written; 5 MB beside each."""
    sweep = standin("seeds=2", "cluster.slots=2")
    monkeypatch.setattr(preflight, "_numbers", lambda student: 1_000_000_000)
    for free_gb, code in ((72.0, 2), (73.0, 0)):  # 6 x 4.005 + 2 x 2 x 12.005 = 72.05
        monkeypatch.setattr(
            "launch.preflight.shutil.disk_usage", lambda path, gb=free_gb: SimpleNamespace(free=int(gb * 1e9))
        )
        told = launch(*sweep.words)
        assert told.code == code
        if code:
            assert "the runs need about 72.0 GB and" in told.err or "72.1 GB and" in told.err


def test_a_model_on_the_hub_without_safetensors_is_refused_before_anything_is_queued(tmp_path, monkeypatch):
    # There is no hub here: this stands for what it would leave in the cache.
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path))
    both = {"teacher": "some/model", "student": "some/model"}

    def plan(**model):
        return SimpleNamespace(runs=[SimpleNamespace(config={"model": model, "data": {"path": "here"}})])

    with pytest.raises(ConfigError, match=r"^model some/model is not allowed: it has no safetensors weights"):
        preflight._download(plan(**both, student_start="scratch"))
    with pytest.raises(ConfigError, match="some/model"):
        preflight._download(plan(teacher="embedded", student="some/model", student_start="pretrained"))
    preflight._download(plan(teacher="embedded", student="some/model", student_start="scratch"))
    (tmp_path / "model.safetensors").touch()
    preflight._download(plan(**both, student_start="pretrained"))


def test_an_artefact_that_was_cut_is_not_there(done):
    sweep = done("seeds=1")
    directory: RunDirectory = sweep.directory.run(sweep.runs()[0])
    weights = directory.student / "model.safetensors"
    sizes = json.loads(directory.summary_file.read_text())["artefacts"]
    assert sizes == {"student/model.safetensors": weights.stat().st_size}
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not directory.is_complete()
    assert sweep.counts() == {"done": 2, "failed": 1}
