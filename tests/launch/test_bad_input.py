"""Every way to ask for something wrong: one sentence with key, value, and what is allowed; exit 2; nothing queued."""

import json
import shutil

import pytest
import yaml

from kv_align.config.targets import config_directory
from tests.launch.sweeps import CONF, launch

WRONG = [
    (["cluster=local"], "sweep is missing: choose a file of conf/sweep, such as sweep=expected_results."),
    (["sweep=tiny"], "cluster is missing: choose a file of conf/cluster, such as cluster=local."),
    (["sweep=tiny", "cluster=local", "seeds"], "seeds is not a setting: settings are written key=value"),
    (
        ["sweep=tyni", "cluster=local"],
        "sweep=tyni is not allowed: sweep must be one of aligner_lr, demo, expected_results",
    ),
    (["sweep=tiny", "cluster=pbs"], "cluster=pbs is not allowed: cluster must be one of debug, local, slurm"),
    (["sweep=tiny", "cluster=local", "seeds=0"], "seeds=0 is not allowed: set seeds to a count of at least 1"),
    (["sweep=tiny", "cluster=local", "seeds=1000000000000"], "set seeds to a count of at most 10000"),
    (
        ["sweep=tiny", "cluster=local", "trainer.lr=range(1,9000)", "trainer.weight_decay=range(1,9000)", "seeds=2"],
        "trainer.lr=range(1,9000) trainer.weight_decay=range(1,9000) is a sweep of",
    ),
    (["sweep=tiny", "cluster=local", "trainer.lr=range(1,1000000000000)"], "it names more than 10000 values"),
    (["sweep=tiny", "cluster=local", f"sweep.name={'n' * 300}"], "set sweep.name to a plain name of up to 100 letters"),
    (["sweep=tiny", "cluster=local", "output_dir="], "output_dir='' is not allowed: set output_dir to the name of a"),
    (["sweep=tiny", "cluster=local", "seeds=[1,1]"], "seeds=[1, 1] is not allowed"),
    (["sweep=tiny", "cluster=local", "seeds=few"], "seeds=few is not allowed"),
    (["sweep=tiny", "cluster=local", "losses=[]"], "losses=[] is not allowed: set losses to a list of at least one"),
    (
        ["sweep=tiny", "cluster=local", "losses=[kl]"],
        "loss=kl is not allowed: loss must be one of ce, hidden, kv, ",
    ),
    (["sweep=tiny", "cluster=local", "sweep.baseline=flat"], "baseline=flat is not allowed: set baseline to one of"),
    (["sweep=tiny", "cluster=local", "sweep.colour=red"], "sweep.colour is an unknown key"),
    (["sweep=tiny", "cluster=local", "sweep.criteria=loose"], "criteria=loose is not allowed: criteria must be one of"),
    (["sweep=tiny", "cluster=local", "seed=3"], "seed=3 is not allowed in a sweep: give seeds=COUNT"),
    (["sweep=tiny", "cluster=local", "run_name=x"], "run_name=x is not allowed in a sweep"),
    (["sweep=tiny", "cluster=local", "hydra/launcher=slurm"], "hydra/launcher=slurm is not allowed in a sweep"),
    (["sweep=tiny", "cluster=local", "trainer.lr=fast"], "trainer.lr=fast is not allowed: set trainer.lr to a number"),
    (["sweep=tiny", "cluster=local", "trainer.speed=1"], "trainer.speed is an unknown key"),
    (["sweep=tiny", "cluster=local", "model=huge"], "model=huge is not allowed: model must be one of"),
    (["sweep=tiny", "cluster=local", "trainer.lr=[[1"], "trainer.lr=[[1 is not an override"),
    (
        ["sweep=tiny", "cluster=local", "cluster.slots=0"],
        "cluster.slots=0 is not allowed: set cluster.slots to a number",
    ),
    (
        ["sweep=tiny", "cluster=slurm", "cluster.runs_per_gpu=4", "cluster.runs_per_job=2"],
        "cluster.runs_per_gpu=4 is not allowed: set cluster.runs_per_gpu to at most cluster.runs_per_job=2, the",
    ),
    (
        ["sweep=tiny", "cluster=slurm", "cluster.runs_per_gpu=2", "cluster.runs_per_job=2", "cluster.nodes=2"],
        "cluster.runs_per_gpu=2 is not allowed: set cluster.runs_per_gpu to 1 with cluster.nodes=2 and",
    ),
    (
        ["sweep=tiny", "cluster=local", "cluster.kind=slurm"],
        "cluster.kind=slurm is not allowed: cluster=NAME chooses what",
    ),
    (
        ["sweep=tiny", "cluster=local", "sweep.arms=5"],
        "sweep.arms=5 is not allowed: arms and controls stand in the sweep's",
    ),
    (
        ["sweep=tiny", "cluster=slurm", 'cluster.partition="a\\nb"'],
        r"cluster.partition=a\nb is not allowed: set cluster.partition to text on one line",
    ),
    (
        ["sweep=tiny", "cluster=slurm", 'cluster.additional_parameters.comment="a\\nb"'],
        r"cluster.additional_parameters.comment=a\nb is not allowed: set cluster.additional_parameters.comment to text",
    ),
    (["sweep=tiny", "cluster=local", "cluster.slots=two"], "cluster.slots=two is not allowed: set cluster.slots to a"),
    (["sweep=tiny", "cluster=local", "cluster.slot=2"], "cluster.slot is an unknown key"),
    (["sweep=tiny", "cluster=local", "cluster.retry.kiled=2"], "cluster.retry.kiled is an unknown key"),
    (["sweep=tiny", "cluster=local", "cluster.retry.killed=-1"], "cluster.retry.killed=-1 is not allowed"),
    (["sweep=tiny", "cluster=local", "cluster.setup=[a"], "cluster.setup=[a is not allowed: its value cannot be read"),
    (["sweep=demo", "cluster=local", "data=gsm8k", "data.path=/nowhere"], "data.path=/nowhere is not allowed"),
    (["sweep=tiny", "cluster=slurm", "cluster.time_min=long"], "cluster.time_min=long is not allowed"),
    (["sweep=tiny", "cluster=local", "output_dir=/proc/none"], "output_dir=/proc/none/sweeps/tiny"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_one_sentence_exit_2_and_nothing_written(words, sentence, tmp_path):
    where = [] if any(word.startswith("output_dir") for word in words) else [f"output_dir={tmp_path}"]
    told = launch("submit", *words, *where, "--config-dir", str(CONF))
    assert told.code == 2
    assert told.err.startswith("launch: ")
    assert sentence in told.err
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_a_submission_to_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    told = launch("submit", "sweep=tiny", "cluster=slurm", f"output_dir={tmp_path}", "--config-dir", str(CONF))
    assert told.code == 2
    assert "cluster=slurm is not allowed: no Slurm controller answers here" in told.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["status", "plan", "resume", "cancel"])
def test_a_folder_that_is_no_sweep(verb, tmp_path):
    told = launch(verb, str(tmp_path))
    assert (told.code, told.err) == (
        2,
        f"launch: {tmp_path} is not a sweep: name the folder that submit printed, or that of a Hydra multirun.\n",
    )


def test_runs_and_seeds_that_do_not_exist(done):
    sweep = done("seeds=1")
    assert "v9 is not a run of" in launch("logs", str(sweep.path), "v9").err
    assert "v9 is not a run of" in launch("cancel", str(sweep.path), "v9").err
    assert (
        "seeds=1 is not allowed: the plan has the seeds 0 already" in launch("extend", str(sweep.path), "seeds=1").err
    )
    assert "seeds=many is not allowed: set seeds to a count" in launch("extend", str(sweep.path), "seeds=many").err


def test_a_file_that_is_not_yaml_and_one_that_is_no_sweep(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "broken.yaml").write_text("arms: [")
    (tmp_path / "sweep" / "other.yaml").write_text("hydra: {}")
    (tmp_path / "sweep" / "latin.yaml").write_bytes(b"name: \xe9")
    arms = "arms:\n  one: {experiment: baseline, expect: 5}\n"
    (tmp_path / "sweep" / "unknown.yaml").write_text(
        f"name: unknown\nbaseline: one\ncriteria: default\nlosses: [kv]\nseeds: 2\n{arms}"
    )
    (tmp_path / "sweep" / "twice.yaml").write_text("name: twice\nseeds: 2\nseeds: 3\n")
    for name, sentence in (
        ("broken", "is not YAML"),
        ("latin", "latin.yaml is not YAML: 'utf-8' codec can't decode"),
        ("unknown", "arms.one.expect is an unknown key: arms.one has the keys expected_percent, experiment"),
        ("twice", "twice.yaml is not YAML: seeds stands twice; leave one of them out"),
        ("other", "sweep=other is not allowed: its file declares no arms"),
    ):
        told = launch("submit", f"sweep={name}", "cluster=local", "--config-dir", str(tmp_path), "--dry-run")
        assert told.code == 2
        assert sentence in told.err
    told = launch("submit", "sweep=demo", "cluster=local", "--config-dir", str(tmp_path / "none"), "--dry-run")
    assert "there is no such folder" in told.err


@pytest.mark.parametrize("verb", ["resume", "cancel"])
def test_a_frozen_setting_that_is_damaged_is_named(done, verb):
    sweep = done("seeds=1")
    (sweep.path / "launch" / "cluster.json").write_text("{}")
    told = launch(verb, str(sweep.path))
    assert told.code == 2
    assert "launch/cluster.json is damaged, it has no cluster: restore it" in told.err
    assert told.err.count("\n") == 1


def test_a_sweep_is_not_moved_to_another_cluster(done):
    sweep = done("seeds=1")
    words = [word for word in sweep.words if not word.startswith("cluster")]
    told = launch(*words, "cluster=local")
    assert told.code == 2
    assert "was submitted on cluster=debug" in told.err


def test_criteria_are_declared_before_the_runs(done, tmp_path):
    sweep = done("seeds=1")
    (tmp_path / "conf" / "criteria").mkdir(parents=True)
    (tmp_path / "conf" / "sweep").mkdir()
    (tmp_path / "conf" / "sweep" / "tiny.yaml").write_text((CONF / "sweep" / "tiny.yaml").read_text())
    default = yaml.safe_load((config_directory() / "criteria" / "default.yaml").read_text())
    (tmp_path / "conf" / "criteria" / "default.yaml").write_text(yaml.safe_dump({**default, "alpha": 0.5}))
    told = launch(*sweep.words[:-1], str(tmp_path / "conf"))
    assert told.code == 2
    assert "was frozen with other success criteria" in told.err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"alhpa": 0.1}, "alhpa is an unknown key: criteria=mine has the keys alpha,"),
        ({"alpha": 0}, "criteria=mine: alpha=0 is not allowed"),
        ({"alpha": float("nan")}, "criteria=mine: alpha=nan is not allowed"),
        ({"seeds": True}, "criteria=mine: seeds=true is not allowed"),
        ({"seeds": "010"}, "criteria=mine: seeds=010 is not allowed"),
        ({"training_window": [500, 1]}, "criteria=mine: training_window=[500, 1] is not allowed"),
    ],
    ids=str,
)
def test_criteria_of_ones_own_are_looked_at_before_a_sweep_is_frozen_with_them(tmp_path, change, sentence):
    default = yaml.safe_load((config_directory() / "criteria" / "default.yaml").read_text())
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "criteria").mkdir()
    (conf / "criteria" / "mine.yaml").write_text(yaml.safe_dump({**default, **change}))
    words = ("sweep=tiny", "sweep.criteria=mine", "cluster=debug", f"output_dir={tmp_path / 'out'}")
    told = launch("submit", *words, "--config-dir", str(conf))
    assert told.code == 2
    assert told.err.startswith(f"launch: {sentence}"), told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_loss_that_stands_twice_is_refused(tmp_path):
    words = ("sweep=tiny", "cluster=debug", "losses=[kv,kv]", f"output_dir={tmp_path}")
    told = launch("submit", *words, "--config-dir", str(CONF))
    assert (told.code, told.err) == (2, "launch: losses: kv stands twice; leave one of them out.\n")


@pytest.mark.parametrize(
    ("file", "damage", "sentence"),
    [
        ("cluster.json", {"code": 7}, "cluster.json is damaged, its code is none"),
        ("cluster.json", {"resources": "x"}, "cluster.json is damaged, its resources is none"),
        ("cluster.json", {"cluster": {"kind": "nope"}}, "cluster.json is damaged: in its cluster name is missing"),
        ("journal.jsonl", {"event": "submitted"}, "journal.jsonl is damaged: a line of it lacks what belongs to it"),
    ],
)
def test_what_launch_wrote_and_was_damaged_is_one_sentence(done, file, damage, sentence):
    sweep = done("seeds=1")
    path = sweep.path / "launch" / file
    if file.endswith("l"):
        path.write_text(path.read_text() + json.dumps(damage) + "\n")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    for verb in ("status", "cancel"):
        told = launch(verb, str(sweep.path))
        assert (told.code, told.err.count("\n")) == (2, 1)
        assert sentence in told.err


@pytest.mark.parametrize("damage", [b"", b"[]", bytes(range(256)), None], ids=["empty", "list", "binary", "gone"])
def test_a_sweep_whose_setting_is_lost_was_submitted_all_the_same(done, damage):
    sweep = done("seeds=1")
    file = sweep.path / "launch" / "cluster.json"
    file.unlink()
    if damage is not None:
        file.write_bytes(damage)
    for verb in ("resume", "cancel"):
        told = launch(verb, str(sweep.path))
        assert (told.code, told.err) == (
            2,
            f"launch: {file} is damaged or gone, and jobs were queued with it: restore it, or submit the sweep elsewhere.\n",
        )
    told = launch("status", str(sweep.path))
    assert told.code == 0
    assert "cluster.json is damaged or gone" in " ".join((told.out + told.err).split())


@pytest.mark.parametrize("damage", [bytes(range(256)), b"NaN\n", b"[1]\n{}\n"], ids=["binary", "no object", "objects"])
def test_a_journal_of_which_nothing_can_be_read_is_not_taken_for_an_empty_one(done, damage):
    """Taken for empty, all of its runs would be queued again beside the jobs that it knew."""
    sweep = done("seeds=1")
    file = sweep.path / "launch" / "journal.jsonl"
    file.write_bytes(damage)
    for verb in ("status", "resume", "cancel"):
        told = launch(verb, str(sweep.path))
        assert (told.code, told.err) == (
            2,
            f"launch: {file} is damaged: none of its lines can be read; restore it, or submit the sweep elsewhere.\n",
        )
    file.write_bytes(b'{"event": "submit')  # a first line that is being written, or was when its process died
    assert launch("status", str(sweep.path)).code == 0


def test_a_choice_that_is_a_folder_is_none(tmp_path):
    (tmp_path / "conf" / "sweep" / "mine.yaml").mkdir(parents=True)
    told = launch("submit", "sweep=mine", "cluster=local", "--config-dir", str(tmp_path / "conf"))
    assert told.code == 2
    assert "mine" not in told.err.partition("must be one of")[2]


@pytest.mark.parametrize(
    "change",
    [
        {"contrasts": {"same": {"arm": "v4_0_2", "against": "v4_0_2"}}},
        {
            "sequence": [
                {"arm": "v4_0_2", "against": "v4_0_2", "loss": "kv", "metric": "probe_r2", "direction": "higher"}
            ]
        },
    ],
    ids=["contrast", "sequence"],
)
def test_an_arm_against_itself_is_refused(tmp_path, change):
    criteria = yaml.safe_load((config_directory() / "criteria" / "default.yaml").read_text())
    criteria["contrasts"] |= change.get("contrasts", {})
    criteria["sequence"] += change.get("sequence", [])
    (tmp_path / "criteria").mkdir()
    (tmp_path / "criteria" / "mine.yaml").write_text(yaml.safe_dump(criteria))
    words = ("sweep=demo", "cluster=local", "sweep.criteria=mine", f"output_dir={tmp_path / 'out'}")
    told = launch("submit", *words, "--config-dir", str(tmp_path))
    assert told.code == 2
    assert "compares an arm with itself; name two arms" in told.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arms": {"": {"experiment": "baseline"}}}, "arms='' is not allowed: set arms to names of 1 to 100 letters"),
        ({"arms": {"a\nb": {"experiment": "baseline"}}}, r"arms='a\nb' is not allowed"),
        ({"arms": {"x" * 300: {"experiment": "baseline"}}}, "arms='xxxxxxxxxxxxxxxxxxxx...' is not allowed"),
        ({"arms": {"x": {"experiment": "baseline", "overrides": ["seed=3"]}}}, "seed=3 is not allowed in a sweep"),
        (
            {"controls": {"x": {"experiment": "none", "overrides": ["run_name=y"]}}},
            "run_name=y is not allowed in a sweep",
        ),
        ({"seeds": [0, 2**70]}, "a list of different whole numbers from 0 to 2^63 - 1"),
        ({"criteria": "../criteria/default"}, "criteria=../criteria/default is not allowed: criteria must be one of"),
    ],
    ids=["empty", "two lines", "long", "seed", "name", "seed too large", "elsewhere"],
)
def test_a_sweep_of_ones_own_that_cannot_be_is_one_sentence(tmp_path, change, sentence):
    sweep = yaml.safe_load((CONF / "sweep" / "tiny.yaml").read_text())
    for key, value in change.items():
        sweep[key] = {**sweep.get(key, {}), **value} if isinstance(value, dict) else value
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(yaml.safe_dump(sweep | {"name": "mine"}))
    told = launch(
        "submit", "sweep=mine", "cluster=debug", f"output_dir={tmp_path / 'out'}", "--config-dir", str(tmp_path)
    )
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert sentence in told.err
    assert not (tmp_path / "out").exists()
