"""`python -m kv_align.train` as a user types it, in processes of their own.

Where a command must not get as far as training, a trap stands in the way of torch and its like: a package of that name,
found first, that ends the process. So what these tests see happens without torch, or they see the trap.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from kv_align.config.compose import compose_config, compose_raw
from kv_align.config.identity import content_hash
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, Status, read_json
from tests.conftest import ROOT
from tests.short_runs import SHORT

HEAVY = ("torch", "transformers", "pandas", "datasets", "accelerate")


@pytest.fixture
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trap")
    for name in HEAVY:
        (folder / f"{name}.py").write_text(f"raise SystemExit('trap: {name} was imported')\n")
    return folder


def train(
    *arguments: str, folder: Path, first: tuple[Path, ...] = (), timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, with packages in the folders `first` found before the installed ones."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*first, ROOT))), "HYDRA_FULL_ERROR": ""}
    return subprocess.run(
        [sys.executable, "-m", "kv_align.train", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# Bad input: by topic, each with what its sentence must say beside the key and the value.
BAD_INPUT: dict[str, list[tuple[str, list[str]]]] = {
    "choices": [
        ("aligner=flatt", ["aligner=flatt is not allowed", "one of flat, none, orthogonal, structured"]),
        (
            "loss=kv_struct",
            [
                "loss=kv_struct is not allowed",
                "one of ce, hidden, kv, kv+logit, kv+struct, kv+struct+logit, logit_kd, relations",
            ],
        ),
        ("init=zeros", ["init=zeros is not allowed", "one of cka_hungarian, identity, least_squares, orthogonal"]),
        ("experiment=v5", ["experiment=v5 is not allowed", "v4_0_1, v4_0_2, v4_0_3"]),
        ("aligner.name=foo", ["aligner.name=foo is not allowed", "aligner=NAME chooses what has it"]),
        ("layer_map=null", ["layer_map=null is not allowed", "one of cka, last, learned, list, proportional, random"]),
        ("alinger=flat", ["alinger is an unknown key", "did you mean aligner"]),
        ("loss", ["loss is not an override", "key=value"]),
    ],
    "keys": [
        ("aligner=flat aligner.share_dim_proj=true", ["aligner.share_dim_proj is an unknown key", "mlp_ratio"]),
        ("trainer.learning_rate=1", ["trainer.learning_rate is an unknown key", "aligner_lr, batch_size", "lr"]),
        ("+trainer.momentum=0.9", ["trainer.momentum is an unknown key", "weight_decay", "remove it"]),
        ("loss=kv loss.temperature=2", ["loss.temperature is an unknown key", "lambda_kv", "metric"]),
        ("layer_map=list", ["layer_map.layers is missing", "layer_map.layers=VALUE"]),
        ("model=pair model.teacher=embedded", ["model.student is missing", "model.student=VALUE"]),
    ],
    "values": [
        ("seed=-1", ["seed=-1 is not allowed", "at least 0"]),
        ("seed=0,1", ["seed=0,1", "--multirun"]),
        ("trainer=[1]", ["trainer=[1] is not allowed", "trainer must be one of full, quick"]),
        ("data.max_length=1", ["data.max_length=1 is not allowed", "at least 2"]),
        ("teacher_cache=", ["teacher_cache='' is not allowed", "auto, off, or the name of a folder"]),
        ("trainer.batch_size=many", ["trainer.batch_size=many is not allowed", "a whole number"]),
        ("trainer.lr=0", ["trainer.lr=0 is not allowed", "above 0"]),
        ("loss.lambda_kv=-0.5", ["loss.lambda_kv=-0.5 is not allowed", "at least 0"]),
        ("loss.lambda_kv=inf", ["loss.lambda_kv=inf is not allowed", "a finite number"]),
        ("trainer.batch_size=${nope}", ["trainer.batch_size cannot be resolved", "nope"]),
    ],
    "sizes": [
        ("data.train_examples=1000000000000000000000000", ["data.train_examples=1000000", "at most 1e+07"]),
        ("trainer.batch_size=1000000000", ["trainer.batch_size=1000000000 is above data.train_examples=", "lower it"]),
        ("trainer.max_steps=null trainer.epochs=1e300", ["trainer.epochs=1e+300 is not allowed", "at most 1e+06"]),
        ("trainer.max_steps=10000000000000000000", ["trainer.max_steps=100000", "at most 9.22"]),
        ("--multirun seed=range(0,1000000000000)", ["seed=range(0,1000000000000) is not allowed", "more than 10000"]),
        ("--multirun seed=range(0,10,0)", ["seed=range(0,10,0) is not allowed: range() arg 3 must not be zero"]),
        (
            "--multirun seed=range(0,200) data.train_examples=range(1,200)",
            ["are 39800 runs, and at most 10000 are allowed"],
        ),
    ],
    "combinations": [
        ("loss=kv+struct aligner=none", ["loss=kv+struct is not allowed with aligner=none", "use aligner=flat"]),
        ("layer_map=list layer_map.layers=[0,1]", ["layer_map=list is not allowed", "2 entries for 3 student layers"]),
        ("trainer.micro_batch_size=3", ["trainer.micro_batch_size=3 is not allowed", "a divisor of", "batch_size=16"]),
        ("loss=ce data.shuffle_teacher=true", ["data.shuffle_teacher=true is not allowed", "loss=ce"]),
        (
            "data=text data.path=README.md data.rationale=short",
            ["data.rationale=short is not allowed", "full with data=text, whose texts have no steps"],
        ),
        ("loss=logit_kd data.rationale=none", ["data.rationale=none is not allowed", "full with loss=logit_kd"]),
    ],
    "files": [
        ("model.teacher=/no/such/model", ["model.teacher=/no/such/model is not allowed", "no config.json"]),
        ("data=gsm8k data.path=/no/such/data", ["data.path=/no/such/data is not allowed", "correct the path"]),
        ("data=gsm8k data.path=.", ["data=gsm8k is not allowed", "holds no train.jsonl"]),
        ("--config-dir=/no/such/conf", ["--config-dir=/no/such/conf is not allowed", "no such folder"]),
        (f"output_dir={__file__}/x", [f"output_dir={__file__}/x is not allowed", "is a file; name a folder"]),
        ("--multirun seed=x,0", ["seed=x is not allowed", "a whole number"]),
        ("output_dir=", ["output_dir='' is not allowed", "the name of a folder"]),
        ("output_dir='a\nb'", [r"output_dir='a\nb' is not allowed", "the name of a folder"]),
        (
            f"output_dir={'z' * 300}",
            [f"output_dir={'z' * 40}... is not allowed: File name too long; name another folder"],
        ),
        (f"teacher_cache={__file__}/x", [f"teacher_cache={__file__}/x is not allowed", "is a file; name a folder"]),
        ("output_dir=/proc/x", ["output_dir=/proc/x/structured", "/proc/x cannot be made", "can be written to"]),
        ("--multirun seed=0,1 output_dir=/proc/x", ["output_dir=/proc/x is not allowed", "/proc/x cannot be made"]),
        ("run_name=..", ["run_name='..' is not allowed", "a plain name without slashes"]),
        ("run_name=''", ["run_name='' is not allowed", "or null"]),
        ("run_name=a/b", ["run_name='a/b' is not allowed", "a plain name without slashes"]),
        ("arm=../x", ["arm='../x' is not allowed", "a plain name without slashes"]),
        ("data=gsm8k data.path='a\nb'", [r"data.path=a\nb is not allowed"]),
        (f"run_name={'n' * 400}", ["run_name=nnnnnnnnnnnnnnnnnnnn... is not allowed", "at most 150 bytes"]),
        ("+inputs={data:abc}", ["have changed since this was frozen"]),
    ],
    "hydra": [
        ("--config-name=nix", ["--config-name=nix is not allowed", "this command's own is train"]),
        ("--config-name=nix --multirun seed=0,1", ["--config-name=nix is not allowed"]),
        ("--config-name=pretrain", ["--config-name=pretrain is not allowed"]),
        ("--help --config-dir=/no/such/conf", ["--config-dir=/no/such/conf is not allowed"]),
        ("--cfg job trainer.nope=1", ["trainer.nope is an unknown key"]),
        ("--resolve", ["--resolve is not allowed: add --cfg job"]),
        ("--shell-completion", ["--shell-completion is not allowed: use kv-align completion"]),
        ("--experimental-rerun x", ["--experimental-rerun=x is not allowed", "the same command again"]),
        ("--config-path=/tmp", ["--config-path=/tmp is not allowed", "--config-dir"]),
        ("--multirun seed=interval(0,3)", ["seed=interval(0,3) is not allowed", "range(0,3)"]),
        (
            "--multirun aligner=glob(zz*)",
            ["aligner=glob(zz*) is not allowed", "which are flat, none, orthogonal, structured"],
        ),
        ("run_name=it's", ["run_name=it's is not an override", """'run_name="a b"'"""]),
        ("hydra.run.dir=/proc/x", ["hydra.run.dir=/proc/x is not allowed", "cannot be made"]),
        ("--multirun seed=0,1 hydra.sweep.dir=/proc/x", ["hydra.sweep.dir=/proc/x is not allowed", "cannot be made"]),
        ("hydra.output_subdir=../../x", ["hydra.output_subdir='../../x' is not allowed", "the plain name of a folder"]),
        ("hydra.callbacks=5", ["hydra.callbacks cannot have that value", "correct that override"]),
        ("hydra.verbose=9", ["hydra.verbose=9 is not allowed", "true, false, the name of a logger"]),
        ("=5", ["=5 is not an override: it has no key"]),
        ("seed=1 --multirun aligner=bent,flat loss=kv", ["aligner=bent is not allowed"]),
        ("hydra.run.dir=", ["hydra.run.dir='' is not allowed"]),
        ("hydra/launcher=nix", ["hydra/launcher=nix is not allowed", "submitit_slurm"]),
        ("hydra.nix=1", ["hydra.nix is an unknown key"]),
        ("aligner=structured,flat", ["names several values and this is one run", "--multirun"]),
        ("data._target_=code.interact", ["data._target_=code.interact is not allowed", "DataSource"]),
    ],
}


# Types many commands in one process, which is left with an exit code each time.
TYPE_ALL = """
import contextlib, io, json, os, sys
from hydra.core.global_hydra import GlobalHydra
from kv_align.config.cli import train_main
from kv_align.train import train

results = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["train", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train_main(train)
        except SystemExit as left:
            code = left.code
    results.append([code, out.getvalue(), err.getvalue(), os.listdir()])
    GlobalHydra.instance().clear()
print(json.dumps(results))
"""


def test_bad_input_ends_in_one_sentence_and_exit_code_2_before_torch_is_imported(tmp_path: Path, trap: Path) -> None:
    table = [row for topic in BAD_INPUT.values() for row in topic]
    assert len(table) >= 50
    done = subprocess.run(
        [sys.executable, "-c", TYPE_ALL, json.dumps([command.split(" ") for command, _ in table])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{trap}{os.pathsep}{ROOT}", "HYDRA_FULL_ERROR": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == len(table)
    for (command, says), (code, out, err, written) in zip(table, results, strict=True):
        assert (code, out, written) == (2, "", []), (command, err)
        assert re.fullmatch(r"kv-align: [^\n]+\.\n", err), (command, err)
        for part in says:
            assert part in err, (command, err)


def test_a_command_that_is_right_gets_as_far_as_the_trap(tmp_path: Path, trap: Path) -> None:
    (tmp_path / "off").write_text("a file with the name of what teacher_cache is by default")
    done = train("aligner=flat", folder=tmp_path, first=(trap,))
    assert done.returncode == 1
    note, trapped = done.stderr.splitlines()
    assert note == "note: init=uniform has no effect on aligner=flat: left out."
    assert trapped.startswith("trap: ")
    assert trapped.endswith(" was imported")


def test_one_wrong_cell_of_a_multirun_starts_none_of_them(tmp_path: Path, trap: Path) -> None:
    arguments = ("--multirun", "loss=ce,kv", "aligner=structured,none", "seed=0,1")
    done = train(*arguments, folder=tmp_path, first=(trap,))
    assert done.returncode == 2
    *notes, sentence = done.stderr.splitlines()
    assert notes == ["note: aligner=structured has no effect on loss=ce, which compares no keys and values: left out."]
    assert sentence.startswith("kv-align: loss=kv is not allowed with aligner=none: ")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_over_all_choices_of_a_group_is_checked_too(tmp_path: Path, trap: Path) -> None:
    done = train("--multirun", "aligner=glob(*)", folder=tmp_path, first=(trap,))
    assert done.returncode == 2
    assert "loss=kv is not allowed with aligner=none" in done.stderr.splitlines()[-1]


def test_bad_input_that_only_the_job_itself_finds_is_one_sentence_too(tmp_path: Path, trap: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 0\n")
    done = train("--config-dir=.", "--config-name=mine", folder=tmp_path, first=(trap,))
    assert done.returncode == 2
    assert done.stderr == "kv-align: arm is missing: add it to the configuration.\n"


def test_a_directory_that_holds_another_run_is_left_as_it_is(tmp_path: Path, trap: Path) -> None:
    other, _ = compose_config(["seed=7"])
    status = Status(
        state="finished",
        reason="",
        arm="flat",
        loss="kv",
        seed=7,
        content_hash=content_hash(other),
        step=1,
        total_steps=1,
        attempt=1,
        started=0.0,
        updated=0.0,
        host="",
        pid=0,
        job="",
    )
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    file = tmp_path / "outputs" / "mine" / "status.json"
    file.write_text(json.dumps(asdict(status)))
    done = train("run_name=mine", folder=tmp_path, first=(trap,))
    assert done.returncode == 2
    assert done.stderr == (
        f"kv-align: outputs/mine holds another run (flat, seed 7, hash {content_hash(other)[:8]}): nothing was "
        "overwritten; choose another run_name or output_dir.\n"
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert json.loads(file.read_text()) == asdict(status)


# What Hydra shows


def test_cfg_job_shows_what_would_be_run(tmp_path: Path, trap: Path) -> None:
    overrides = ["experiment=v4_0_3", "loss=kv+struct", "seed=3", "loss.lambda_struct=0.05"]
    done = train(*overrides, "--cfg", "job", folder=tmp_path, first=(trap,))
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout) == compose_raw(overrides)
    assert list(tmp_path.iterdir()) == []


# A user's own choice, beside the package

MEAN_OF_HEADS = '''
from torch import Tensor, nn

from kv_align.align.head_map import HeadMap, MapShape, MapInit
from kv_align.config.options import PositiveFloat


class MeanOfHeads(HeadMap):
    """Every student head sees the mean of the teacher's, through one linear map."""

    uses_init = False

    def __init__(self, shape: MapShape, start: MapInit, *, scale: PositiveFloat) -> None:
        super().__init__()
        self._heads, self._scale = shape.student_heads, scale
        self.width = nn.Linear(shape.teacher_width, shape.student_width)

    def forward(self, states: Tensor) -> Tensor:
        mean = self.width(states.mean(dim=2, keepdim=True)) * self._scale
        return mean.expand(-1, -1, self._heads, -1, -1)
'''


@pytest.fixture
def own_aligner(tmp_path: Path) -> Path:
    """A folder with a user's module, and `conf/aligner/mean.yaml` that names its class."""
    (tmp_path / "conf" / "aligner").mkdir(parents=True)
    (tmp_path / "conf" / "aligner" / "mean.yaml").write_text(
        "name: mean\n_target_: mean_of_heads.MeanOfHeads\nscale: 1.0\n"
    )
    (tmp_path / "mean_of_heads.py").write_text(MEAN_OF_HEADS)
    return tmp_path


def test_a_config_dir_adds_a_choice_that_is_checked_like_the_packages_own(own_aligner: Path, trap: Path) -> None:
    before = sorted(own_aligner.rglob("*"))
    shown = train("--config-dir=conf", "aligner=mean", "--cfg", "job", folder=own_aligner, first=(trap,))
    assert yaml.safe_load(shown.stdout)["aligner"] == {
        "name": "mean",
        "_target_": "mean_of_heads.MeanOfHeads",
        "scale": 1.0,
    }
    for override, sentence in (
        ("aligner.scale=-1", "kv-align: aligner.scale=-1 is not allowed: set aligner.scale to a number above 0.\n"),
        ("+aligner.share=true", "kv-align: aligner.share is an unknown key: aligner=mean has the keys scale; "),
    ):
        refused = train("--config-dir=conf", "aligner=mean", override, folder=own_aligner, first=(trap,))
        assert refused.returncode == 2
        assert refused.stderr.startswith(sentence)
    missing = train("aligner=mean", folder=own_aligner, first=(trap,))
    assert missing.stderr.startswith("kv-align: aligner=mean is not allowed: aligner must be one of flat, none, ortho")
    assert sorted(own_aligner.rglob("*")) == before


def test_a_broken_file_of_the_users_is_one_sentence(own_aligner: Path, trap: Path) -> None:
    (own_aligner / "conf" / "aligner" / "mean.yaml").write_text("name: [mean\n")
    done = train("--config-dir=conf", "aligner=mean", folder=own_aligner, first=(trap,))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "conf/aligner/mean.yaml" in done.stderr


def test_a_run_whose_configuration_is_damaged_is_left_as_it_is(tmp_path: Path, trap: Path) -> None:
    """Hydra's own files of it too: they say how it was started."""
    run = RunDirectory(tmp_path / "outputs" / "mine")
    run.begin({"seed": 0, "loss": {"name": "kv"}}, arm="a", content_hash="b" * 64, total_steps=2)
    (run.path / ".hydra").mkdir()
    (run.path / ".hydra" / "overrides.yaml").write_text("[]\n")
    run.config_file.write_text("a: [1,")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = train("run_name=mine", folder=tmp_path, first=(trap,))
    assert (done.returncode, done.stderr) == (
        2,
        "kv-align: outputs/mine/config.yaml cannot be read: restore it, or choose another run_name.\n",
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("scale", "sentence"),
    [
        ("010", "YAML reads 010 in line 3 in base 8; write a decimal number, or put quotes around it for text."),
        ("1:30", "YAML reads 1:30 in line 3 in base 60; write a decimal number, or put quotes around it for text."),
        ("1:30.5", "YAML reads 1:30.5 in line 3 in base 60; write a decimal number, or put quotes around it for text."),
    ],
)
def test_what_yaml_would_read_otherwise_than_it_is_written_is_refused(
    scale: str, sentence: str, own_aligner: Path
) -> None:
    file = own_aligner / "conf" / "aligner" / "mean.yaml"
    file.write_text(f"name: mean\n_target_: mean_of_heads.MeanOfHeads\nscale: {scale}\n")
    with pytest.raises(ConfigError) as refused:
        compose_raw(["aligner=mean"], config_dir=str(own_aligner / "conf"))
    assert str(refused.value) == f"{file} is not allowed: {sentence}"


BOMB = "a0: &a0 [x, x, x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name: mean\nscale: &a [1, *a]\n", "is not YAML: an alias to line 2 leads back to itself; correct it."),
        ("name: mean\nscale: &a {b: {c: *a}}\n", "is not YAML: an alias to line 2 leads back to itself; correct it."),
        (BOMB, "is not YAML: with its aliases it stands for more than 100000 values; correct it."),
        (f"name: mean\nscale: {'[' * 3000}{']' * 3000}\n", "is not YAML: it is nested too deeply; correct it."),
        (
            "name: other\n_target_: mean_of_heads.MeanOfHeads\n",
            "its name is other, and a choice is named as its file; write",
        ),
        (b"name: \x80\n", "is not allowed: it is not UTF-8 (invalid start byte); save it as UTF-8."),
        ("name: mean\n---\nname: mean\n", "is not YAML: expected a single document"),
        ("name: mean\n", "aligner=mean is not allowed: its file has no _target_; name the class there"),
    ],
    ids=["self", "far self", "bomb", "deep", "name", "binary", "documents", "no target"],
)
def test_a_file_of_the_users_that_is_no_choice_is_named(content: str | bytes, sentence: str, own_aligner: Path) -> None:
    file = own_aligner / "conf" / "aligner" / "mean.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as refused:
        compose_config(["aligner=mean"], config_dir=str(own_aligner / "conf"))
    assert sentence in str(refused.value)
    assert (str(file) in str(refused.value)) or "_target_" in sentence


def test_numbers_in_other_words_and_values_named_twice_are_read_as_they_are(own_aligner: Path) -> None:
    file = own_aligner / "conf" / "aligner" / "mean.yaml"
    file.write_text(
        "name: mean\n_target_: mean_of_heads.MeanOfHeads\nscale: &a 0.5\ntwice: [*a, *a, 0, -0.0, 1e-3, '010', 0x10]\n"
    )
    aligner = compose_raw(["aligner=mean"], config_dir=str(own_aligner / "conf"))["aligner"]
    assert aligner["twice"] == [0.5, 0.5, 0, -0.0, 0.001, "010", 16]


def test_a_users_own_aligner_trains(own_aligner: Path) -> None:
    arguments = ("--config-dir=conf", "aligner=mean", "aligner.scale=0.5", *SHORT, "trainer.max_steps=3")
    done = train(*arguments, 'arm="the mean (of heads), at half"', folder=own_aligner)
    assert done.returncode == 0, done.stderr
    (path,) = (own_aligner / "outputs").iterdir()
    run = RunDirectory(path)
    assert path.name.startswith("the mean (of heads), at half-kv-seed0-")
    assert run.is_complete()
    assert run.read_config()["aligner"] == {"name": "mean", "_target_": "mean_of_heads.MeanOfHeads", "scale": 0.5}
    assert run.read_config()["init"] is None
    summary = read_json(run.summary_file)
    assert summary is not None
    assert summary["steps"] == 3
    assert summary["kv_grad_norm_median"] > 0
